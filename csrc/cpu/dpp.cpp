// Compiled once per instruction set. One group's rows are read, widened to double and multiplied at a time; the k x k
// algebra of eight groups then runs side by side, one group a lane. Everything is double: the pass over the embeddings
// waits for memory, not for arithmetic. Formulae: docs/dpp.md.
#include "qempo/dpp.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "qempo/memory.h"
#include "vecmath.h"

namespace qempo::cpu::QEMPO_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWide = 8;
#elif defined(__AVX__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
// Rows of a register tile of the Gram matrix; four columns of it. 16 of 32 registers with AVX-512, else 8 of 16.
constexpr int kTile = kWide == 8 ? 4 : 2;
constexpr int kBlock = 4 * kWide;  // columns of a register tile of the backward product
constexpr int kLanes = 8;
constexpr int kPad = 4;  // rows are padded to a multiple of it

typedef double Vec __attribute__((vector_size(kWide * sizeof(double))));
struct alignas(64) Lane {
  double at[kLanes];
};

struct Free {
  void operator()(double* p) const { std::free(p); }
};

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of one group as doubles, zero-padded to ld columns and to a multiple of kPad rows.
struct Rows {
  explicit Rows(int64_t width) : ld(round_up(width, kBlock)), d(width) {}
  int64_t ld, d, room = 0;
  std::unique_ptr<double, Free> data;
  double top[kDppLargest];  // what each row was divided by; only double rows need it

  template <class S>
  void load_group(const S* x, int64_t k) {
    const int64_t rows = round_up(k, kPad);
    if (rows > room) {
      data.reset(static_cast<double*>(std::aligned_alloc(64, static_cast<size_t>(rows * ld) * sizeof(double))));
      if (!data) throw std::bad_alloc();
      room = rows;
    }
    for (int64_t i = 0; i < k; ++i) load_row(x + i * d, data.get() + i * ld, i);
    std::fill(data.get() + k * ld, data.get() + rows * ld, 0.0);
  }

 private:
  template <class S>
  void load_row(const S* x, double* y, int64_t i) {
    top[i] = 1;
    if constexpr (std::is_same_v<S, double>) {
      // Squares of 1e-200 or 1e200 leave the range of double; those of float do not.
      double best = 0;
      for (int64_t c = 0; c < d; ++c) best = std::abs(x[c]) > best ? std::abs(x[c]) : best;
      if (best > 0) top[i] = best;
      for (int64_t c = 0; c < d; ++c) y[c] = x[c] / top[i];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) y[c] = static_cast<double>(load<float>(x + c));
    }
    std::fill(y + d, y + ld, 0.0);
  }
};

double sum(const Vec& v) {
  double s = 0;
  for (int l = 0; l < kWide; ++l) s += v[l];
  return s;
}

// Dot products of all rows, (k, k).
void gram(const Rows& rows, int64_t k, double* out) {
  const double* y = rows.data.get();
  const int64_t ld = rows.ld;
  for (int64_t i0 = 0; i0 < k; i0 += kTile)
    for (int64_t j0 = 0; j0 < i0 + kTile; j0 += 4) {
      Vec acc[kTile][4] = {};
      for (int64_t c = 0; c < ld; c += kWide) {
        Vec b[4];
        for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const Vec*>(y + (j0 + j) * ld + c);
        for (int i = 0; i < kTile; ++i) {
          const Vec a = *reinterpret_cast<const Vec*>(y + (i0 + i) * ld + c);
          for (int j = 0; j < 4; ++j) acc[i][j] += a * b[j];
        }
      }
      for (int64_t i = i0; i < std::min(i0 + kTile, k); ++i)
        for (int64_t j = j0; j < std::min(j0 + 4, i + 1); ++j)
          out[i * k + j] = out[j * k + i] = sum(acc[i - i0][j - j0]);
    }
}

// out (k, d) = B Y, row i divided by top_i; b (k, k).
template <class S>
void product(const Rows& rows, int64_t k, const double* b, S* out) {
  const double* y = rows.data.get();
  const int64_t ld = rows.ld, d = rows.d;
  alignas(64) double result[4][kBlock];
  for (int64_t i0 = 0; i0 < k; i0 += 4) {
    const int64_t count = std::min<int64_t>(4, k - i0);
    const double* row[4];
    for (int i = 0; i < 4; ++i) row[i] = b + std::min(i0 + i, k - 1) * k;
    for (int64_t c0 = 0; c0 < d; c0 += kBlock) {
      Vec acc[4][4] = {};
      for (int64_t j = 0; j < k; ++j) {
        const Vec* v = reinterpret_cast<const Vec*>(y + j * ld + c0);
        for (int i = 0; i < 4; ++i)
          for (int c = 0; c < 4; ++c) acc[i][c] += row[i][j] * v[c];
      }
      const int64_t width = std::min<int64_t>(kBlock, d - c0);
      for (int64_t i = 0; i < count; ++i) {
        for (int c = 0; c < 4; ++c) *reinterpret_cast<Vec*>(&result[i][c * kWide]) = acc[i][c];
        S* to = out + (i0 + i) * d + c0;
        if constexpr (std::is_same_v<S, double>) {
          for (int64_t c = 0; c < width; ++c) to[c] = result[i][c] / rows.top[i0 + i];
        } else if (width == kBlock) {
          for (int c = 0; c < kBlock; ++c) store(to + c, static_cast<float>(result[i][c]));
        } else {
          for (int64_t c = 0; c < width; ++c) store(to + c, static_cast<float>(result[i][c]));
        }
      }
    }
  }
}

// What the quality of one group's rows comes to. Lengths are those of the loaded rows.
struct Scales {
  double log_s[kDppLargest], log_d[kDppLargest], t[kDppLargest], ridge[kDppLargest], inverse_length[kDppLargest];
  bool careful;

  void set(const DppGroups& groups, int64_t g, const double* length, const double* top) {
    const int64_t k = groups.size(g), first = groups.first_row(g);
    bool broken = false;
    for (int64_t i = 0; i < k; ++i) {
      const bool zero = length[i] == 0;
      broken |= length[i] != length[i];
      inverse_length[i] = zero ? 0 : 1 / length[i];
      double s = groups.log_quality ? groups.log_quality[first + i] / 2 : 0;
      if (!groups.normalize) s += std::log(length[i]) + std::log(top[i]);
      log_s[i] = zero ? -std::numeric_limits<double>::infinity() : s;
      log_d[i] = log_s[i] < 0 ? 0 : log_s[i];
      const bool plain = log_s[i] == 0;
      t[i] = plain ? 1 : std::exp(log_s[i] - log_d[i]);
      ridge[i] = plain ? groups.ridge : groups.ridge * std::exp(-2 * log_d[i]);
    }
    // A NaN row goes the direct way, where it spreads to its whole group and no further.
    careful = !broken && dpp_is_careful(k, log_s, groups.ridge);
  }
};

// Dot products (k, k) become cosines with diagonal exactly 1, or 0 for a zero row.
void to_cosines(int64_t k, const Scales& scales, double* dots) {
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) dots[i * k + j] *= scales.inverse_length[i] * scales.inverse_length[j];
  for (int64_t i = 0; i < k; ++i)
    if (dots[i * k + i] == dots[i * k + i]) dots[i * k + i] = scales.inverse_length[i] != 0;
}

// Up to eight groups: matrices of the largest size k, one group a lane; what a smaller group lacks is the identity.
struct Pack {
  int64_t k = 0;
  std::vector<Lane> a, inverse, extra;
  std::vector<Lane> diagonal;

  void reset(int64_t size) {
    k = size;
    a.assign(k * k, Lane{});
    inverse.resize(k * k);
    extra.resize(k * k);
    diagonal.resize(k);
  }
};

#define QEMPO_EACH_LANE for (int l = 0; l < kLanes; ++l)

// a = L L^T in place, then inverse = a^-1.
void invert(Pack& pack) {
  const int64_t k = pack.k;
  Lane* a = pack.a.data();
  Lane* low = pack.extra.data();  // L^-1
  for (int64_t j = 0; j < k; ++j) {
    Lane root, reciprocal;
    QEMPO_EACH_LANE root.at[l] = a[j * k + j].at[l];
    for (int64_t p = 0; p < j; ++p) QEMPO_EACH_LANE root.at[l] -= a[j * k + p].at[l] * a[j * k + p].at[l];
    QEMPO_EACH_LANE root.at[l] = std::sqrt(root.at[l]);
    QEMPO_EACH_LANE reciprocal.at[l] = 1 / root.at[l];
    a[j * k + j] = root;
    pack.diagonal[j] = reciprocal;
    for (int64_t i = j + 1; i < k; ++i) {
      Lane s = a[i * k + j];
      for (int64_t p = 0; p < j; ++p) QEMPO_EACH_LANE s.at[l] -= a[i * k + p].at[l] * a[j * k + p].at[l];
      QEMPO_EACH_LANE a[i * k + j].at[l] = s.at[l] * reciprocal.at[l];
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    low[j * k + j] = pack.diagonal[j];
    for (int64_t i = j + 1; i < k; ++i) {
      Lane s{};
      for (int64_t p = j; p < i; ++p) QEMPO_EACH_LANE s.at[l] -= a[i * k + p].at[l] * low[p * k + j].at[l];
      QEMPO_EACH_LANE low[i * k + j].at[l] = s.at[l] * pack.diagonal[i].at[l];
    }
  }
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      Lane s{};
      for (int64_t p = i; p < k; ++p) QEMPO_EACH_LANE s.at[l] += low[p * k + i].at[l] * low[p * k + j].at[l];
      pack.inverse[i * k + j] = pack.inverse[j * k + i] = s;
    }
}

// Product over j != i of 1 - P_ij^2 into pack.diagonal. Each factor is above 1e-4 here, 64 of them above 1e-256.
void unexplained(Pack& pack) {
  const int64_t k = pack.k;
  const Lane* n = pack.inverse.data();
  for (int64_t i = 0; i < k; ++i) {
    Lane product;
    QEMPO_EACH_LANE product.at[l] = 1;
    for (int64_t j = 0; j < k; ++j) {
      if (j == i) continue;
      QEMPO_EACH_LANE {
        const double off = n[i * k + j].at[l];
        product.at[l] *= 1 - off * off / (n[i * k + i].at[l] * n[j * k + j].at[l]);
      }
    }
    pack.diagonal[i] = product;
  }
}

void write(const DppGroups& groups, const DppResults& out, const Pack& pack, const Scales& scales, int64_t g,
           int lane) {
  const int64_t k = groups.size(g), first = groups.first_row(g), ld = pack.k;
  double logdet = 0, total = 0;
  for (int64_t i = 0; i < k; ++i) {
    logdet += 2 * (std::log(pack.a[i * ld + i].at[lane]) + scales.log_d[i]);
    out.gains[first + i] = 2 * scales.log_d[i] - std::log(pack.inverse[i * ld + i].at[lane]);
    total += out.gains[first + i];
    double* inverse = out.inverse + groups.matrix(g) + i * k;
    for (int64_t j = 0; j < k; ++j) inverse[j] = pack.inverse[i * ld + j].at[lane];
  }
  out.logdet[g] = logdet;
  for (int64_t i = 0; i < k; ++i) {
    const double others = total - out.gains[first + i] - std::log(pack.diagonal[i].at[lane]);
    out.baselines[first + i] = k > 1 ? others / static_cast<double>(k - 1) : std::numeric_limits<double>::quiet_NaN();
  }
}

int64_t largest(const DppGroups& groups, int64_t begin, int64_t end) {
  int64_t k = 0;
  for (int64_t g = begin; g < end; ++g) k = std::max(k, groups.size(g));
  return k;
}

template <class S>
void forward(const DppGroups& groups, const DppResults& out, int threads) {
  auto packs = [&](int, int64_t begin, int64_t end) {
    Rows rows(groups.d);
    Pack pack;
    std::vector<Scales> scales(kLanes);
    std::vector<double> cosines;
    for (int64_t first = begin * kLanes; first < std::min(end * kLanes, groups.groups); first += kLanes) {
      const int64_t last = std::min<int64_t>(first + kLanes, groups.groups);
      pack.reset(largest(groups, first, last));
      for (int64_t i = 0; i < pack.k; ++i) QEMPO_EACH_LANE pack.a[i * pack.k + i].at[l] = 1;
      for (int64_t g = first; g < last; ++g) {
        const int lane = static_cast<int>(g - first);
        const int64_t k = groups.size(g), row = groups.first_row(g);
        rows.load_group(static_cast<const S*>(groups.x) + row * groups.d, k);
        cosines.resize(k * k);
        gram(rows, k, cosines.data());
        for (int64_t i = 0; i < k; ++i) out.lengths[row + i] = std::sqrt(cosines[i * k + i]);
        Scales& s = scales[lane];
        s.set(groups, g, out.lengths + row, rows.top);
        to_cosines(k, s, cosines.data());
        if (s.careful) {
          dpp_careful_forward(k, cosines.data(), s.log_s, groups.ridge, out.logdet + g, out.gains + row,
                              out.baselines + row);
          continue;
        }
        for (int64_t i = 0; i < k; ++i) {
          for (int64_t j = 0; j < k; ++j) pack.a[i * pack.k + j].at[lane] = s.t[i] * s.t[j] * cosines[i * k + j];
          pack.a[i * pack.k + i].at[lane] += s.ridge[i];
        }
      }
      invert(pack);
      unexplained(pack);
      for (int64_t g = first; g < last; ++g)
        if (!scales[g - first].careful) write(groups, out, pack, scales[g - first], g, static_cast<int>(g - first));
    }
  };
  parallel(threads, (groups.groups + kLanes - 1) / kLanes, packs);
}

// a = grad_logdet N + sum_l c_l N e_l e_l^T N / N_ll, N = pack.inverse; pack.diagonal holds c.
void cotangent(Pack& pack, const Lane& grad_logdet) {
  const int64_t k = pack.k;
  const Lane* n = pack.inverse.data();
  Lane* weighted = pack.extra.data();
  for (int64_t j = 0; j < k; ++j) {
    Lane c;
    QEMPO_EACH_LANE c.at[l] = pack.diagonal[j].at[l] / n[j * k + j].at[l];
    for (int64_t i = 0; i < k; ++i) QEMPO_EACH_LANE weighted[i * k + j].at[l] = c.at[l] * n[i * k + j].at[l];
  }
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      Lane s;
      QEMPO_EACH_LANE s.at[l] = grad_logdet.at[l] * n[i * k + j].at[l];
      for (int64_t p = 0; p < k; ++p) QEMPO_EACH_LANE s.at[l] += weighted[i * k + p].at[l] * n[j * k + p].at[l];
      pack.a[i * k + j] = pack.a[j * k + i] = s;
    }
}

// B with d x = B x of the rows as loaded, and d log_quality; w = W of docs/dpp.md, radial_i = W_i . x_i.
void finish(const DppGroups& groups, const DppGrads& grads, const Scales& scales, int64_t g, const double* radial,
            double* w) {
  const int64_t k = groups.size(g), first = groups.first_row(g);
  for (int64_t i = 0; i < k; ++i) {
    if (groups.normalize) w[i * k + i] -= radial[i];
    for (int64_t j = 0; j < k; ++j) w[i * k + j] *= scales.inverse_length[i] * scales.inverse_length[j];
    // Rounding must not give a zero row a gradient.
    grads.log_quality[first + i] = scales.inverse_length[i] == 0 ? 0 : radial[i] / 2;
  }
}

template <class S>
void backward(const DppGroups& groups, const DppGrads& grads, int threads) {
  ask_huge_pages(grads.x, groups.first_row(groups.groups) * groups.d * static_cast<int64_t>(sizeof(S)));
  auto packs = [&](int, int64_t begin, int64_t end) {
    Rows rows(groups.d);
    Pack pack;
    Scales scales;
    std::vector<double> w, cosines;
    double radial[kDppLargest];
    for (int64_t first = begin * kLanes; first < std::min(end * kLanes, groups.groups); first += kLanes) {
      const int64_t last = std::min<int64_t>(first + kLanes, groups.groups);
      pack.reset(largest(groups, first, last));
      for (int64_t i = 0; i < pack.k; ++i)
        for (int64_t j = 0; j < pack.k; ++j) QEMPO_EACH_LANE pack.inverse[i * pack.k + j].at[l] = i == j;
      std::fill(pack.diagonal.begin(), pack.diagonal.end(), Lane{});
      Lane grad_logdet{};
      for (int64_t g = first; g < last; ++g) {
        const int64_t k = groups.size(g), row = groups.first_row(g), lane = g - first;
        const double* inverse = grads.inverse + groups.matrix(g);
        for (int64_t i = 0; i < k; ++i) {
          pack.diagonal[i].at[lane] = grads.gains[row + i];
          for (int64_t j = 0; j < k; ++j) pack.inverse[i * pack.k + j].at[lane] = inverse[i * k + j];
        }
        grad_logdet.at[lane] = grads.logdet[g];
      }
      cotangent(pack, grad_logdet);
      for (int64_t g = first; g < last; ++g) {
        const int64_t k = groups.size(g), row = groups.first_row(g), lane = g - first;
        rows.load_group(static_cast<const S*>(groups.x) + row * groups.d, k);
        scales.set(groups, g, grads.lengths + row, rows.top);
        w.resize(k * k);
        if (scales.careful) {
          cosines.resize(k * k);
          gram(rows, k, cosines.data());
          to_cosines(k, scales, cosines.data());
          dpp_careful_backward(k, cosines.data(), scales.log_s, groups.ridge, grads.logdet[g], grads.gains + row,
                               w.data());
          for (int64_t i = 0; i < k; ++i) {
            radial[i] = 0;
            for (int64_t j = 0; j < k; ++j) radial[i] += w[i * k + j] * cosines[j * k + i];
          }
        } else {
          for (int64_t i = 0; i < k; ++i) {
            const Lane* a = &pack.a[i * pack.k];
            // (G L)_ii = (G (L + ridge I))_ii - ridge G_ii, and G (L + ridge I) has diagonal grad_logdet + c_i.
            radial[i] = 2 * (grads.logdet[g] + grads.gains[row + i] - scales.ridge[i] * a[i].at[lane]);
            for (int64_t j = 0; j < k; ++j) w[i * k + j] = 2 * scales.t[i] * scales.t[j] * a[j].at[lane];
          }
        }
        finish(groups, grads, scales, g, radial, w.data());
        product(rows, k, w.data(), static_cast<S*>(grads.x) + row * groups.d);
      }
    }
  };
  parallel(threads, (groups.groups + kLanes - 1) / kLanes, packs);
}

// Greedy choice by incremental Cholesky. With q_i = s_i^2 / ridge the gain of row i is log ridge + log(1 + q_i v_i),
// v_i what the chosen rows leave of its squared length: 1 - |c_i|^2.
struct Greedy {
  double v[kDppLargest], log_q[kDppLargest], q[kDppLargest], value[kDppLargest];
  std::vector<double> columns;

  void run(int64_t k, const double* cosines, const double* log_s, double ridge, int64_t n, int64_t* picks) {
    constexpr double kTie = 1e-10, kTaken = -std::numeric_limits<double>::infinity();
    const double floor = dpp_noise(k);
    // Without logarithms where q is a double: they would take longer than the products of the rows.
    bool large = false;
    for (int64_t i = 0; i < k; ++i) {
      v[i] = cosines[i * k + i];
      log_q[i] = 2 * log_s[i] - std::log(ridge);
      q[i] = std::exp(log_q[i]);
      large |= log_q[i] > 690;
      value[i] = 0;
    }
    columns.resize(n * k);
    for (int64_t step = 0; step < n; ++step) {
      double best = kTaken;
      for (int64_t i = 0; i < k; ++i) {
        if (value[i] == kTaken) continue;
        if (v[i] <= floor) {
          value[i] = large ? 0 : 1;
        } else if (large) {
          const double signal = log_q[i] + std::log(v[i]);
          value[i] = std::max(signal, 0.0) + std::log1p(std::exp(-std::abs(signal)));
        } else {
          value[i] = 1 + q[i] * v[i];
        }
        best = std::max(best, value[i]);
      }
      const double least = large ? best - kTie : best * (1 - kTie);
      int64_t p = 0;
      while (value[p] < least) ++p;
      picks[step] = p;
      // c_i = (cos_ip - sum of c_i c_p of the steps before) s_p / sqrt(ridge + s_p^2 v_p), below sqrt(v_i).
      const double weight = v[p] > floor ? 1 / std::sqrt(v[p] + std::exp(-log_q[p])) : 0;
      value[p] = kTaken;
      double* c = &columns[step * k];
      std::copy_n(cosines + p * k, k, c);
      for (int64_t u = 0; u < step; ++u) {
        const double* before = &columns[u * k];
        for (int64_t i = 0; i < k; ++i) c[i] -= before[p] * before[i];
      }
      for (int64_t i = 0; i < k; ++i) {
        c[i] *= weight;
        v[i] -= c[i] * c[i];
      }
    }
  }
};

template <class S>
void select(const DppGroups& groups, int64_t n, int64_t* picks, int threads) {
  auto each = [&](int, int64_t begin, int64_t end) {
    Rows rows(groups.d);
    Scales scales;
    Greedy greedy;
    std::vector<double> cosines;
    double length[kDppLargest];
    for (int64_t g = begin; g < end; ++g) {
      const int64_t k = groups.size(g);
      rows.load_group(static_cast<const S*>(groups.x) + groups.first_row(g) * groups.d, k);
      cosines.resize(k * k);
      gram(rows, k, cosines.data());
      for (int64_t i = 0; i < k; ++i) length[i] = std::sqrt(cosines[i * k + i]);
      scales.set(groups, g, length, rows.top);
      to_cosines(k, scales, cosines.data());
      greedy.run(k, cosines.data(), scales.log_s, groups.ridge, n, picks + g * n);
    }
  };
  parallel(threads, groups.groups, each);
}

#undef QEMPO_EACH_LANE

}  // namespace

const DppKernels& dpp_kernels() {
  static const DppKernels kernels{{forward<float>, forward<bf16>, forward<double>},
                                  {backward<float>, backward<bf16>, backward<double>},
                                  {select<float>, select<bf16>, select<double>}};
  return kernels;
}

}  // namespace qempo::cpu::QEMPO_ISA
