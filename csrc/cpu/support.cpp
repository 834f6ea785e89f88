// Products of hidden states with the tokens that each row keeps, token by token rather than row by row: a token's row
// of the weight is read once for all rows of a block that keep it, and the block's hidden states stay in the cache.
// Row by row the weight came from memory for each entry, three times over. Compiled once per instruction set.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "qempo/logps.h"
#include "vecmath.h"

namespace qempo::cpu::QEMPO_ISA {
namespace {

// 128 rows of 576 floats are 288 KiB, of a second-level cache of 512.
constexpr int64_t kRows = 128;

// Entries first to last of tokens begin to end, token after token, and in each by rising row. Tokens whose row of the
// weight is not there are left out.
struct ByToken {
  std::vector<int64_t> start, entry;

  void sort(const int64_t* ids, int64_t first, int64_t last, int64_t begin, int64_t end) {
    start.assign(end - begin + 1, 0);
    for (int64_t e = first; e < last; ++e)
      if (ids[e] >= begin && ids[e] < end) ++start[ids[e] - begin + 1];
    for (int64_t j = 0; j < end - begin; ++j) start[j + 1] += start[j];
    entry.resize(start[end - begin]);
    next.assign(start.begin(), start.end() - 1);
    for (int64_t e = first; e < last; ++e)
      if (ids[e] >= begin && ids[e] < end) entry[next[ids[e] - begin]++] = e;
  }

 private:
  std::vector<int64_t> next;
};

std::vector<int64_t> rows_of(const KeptTokens& kept, int64_t a, int64_t b) {
  std::vector<int64_t> rows(kept.offsets[b] - kept.offsets[a]);
  for (int64_t i = a; i < b; ++i)
    std::fill(rows.begin() + (kept.offsets[i] - kept.offsets[a]),
              rows.begin() + (kept.offsets[i + 1] - kept.offsets[a]), i);
  return rows;
}

// Row i of (., d) in the type of sums: where it lies, or copied to scratch.
template <class S, class A>
const A* wide(const void* x, int64_t i, int64_t d, A* scratch) {
  const S* row = static_cast<const S*>(x) + i * d;
  if constexpr (std::is_same_v<S, A>) {
    return row;
  } else {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) scratch[k] = load<A>(row + k);
    return scratch;
  }
}

template <class A>
A dot(const A* x, const A* y, int64_t d) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) sum += x[k] * y[k];
  return sum;
}

// Four at once: a single sum waits for each addition.
template <class A>
void dot4(const A* w, const A* const* h, int64_t d, A* out) {
  const A *h0 = h[0], *h1 = h[1], *h2 = h[2], *h3 = h[3];
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t k = 0; k < d; ++k) {
    s0 += w[k] * h0[k];
    s1 += w[k] * h1[k];
    s2 += w[k] * h2[k];
    s3 += w[k] * h3[k];
  }
  out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

// run(first entry, one past the last, entries by token, row of each entry from the first on) for each block of rows.
template <class F>
void by_blocks(const KeptTokens& kept, int threads, const F& run) {
  auto part = [&](int, int64_t begin, int64_t end) {
    ByToken tokens;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t a = b * kRows, z = std::min(kept.n, a + kRows), first = kept.offsets[a];
      if (kept.offsets[z] == first) continue;
      tokens.sort(kept.ids, first, kept.offsets[z], 0, kept.v);
      run(a, z, first, tokens, rows_of(kept, a, z));
    }
  };
  parallel(threads, (kept.n + kRows - 1) / kRows, part);
}

template <class S, class A>
void dots(const KeptTokens& kept, const void* hidden, const void* weight, A* z, int threads) {
  const int64_t d = kept.d;
  by_blocks(kept, threads, [&](int64_t a, int64_t b, int64_t first, const ByToken& tokens, const auto& rows) {
    std::vector<A> scratch(std::is_same_v<S, A> ? 0 : (b - a + 1) * d);
    std::vector<const A*> h(b - a);
    for (int64_t i = a; i < b; ++i) h[i - a] = wide<S>(hidden, i, d, scratch.data() + (i - a) * d);
    for (int64_t j = 0; j < kept.v; ++j) {
      int64_t e = tokens.start[j];
      const int64_t end = tokens.start[j + 1];
      if (e == end) continue;
      const A* w = wide<S>(weight, j, d, scratch.data() + (b - a) * d);
      auto row = [&](int64_t k) { return h[rows[tokens.entry[k] - first] - a]; };
      for (; e + 4 <= end; e += 4) {
        const A* four[] = {row(e), row(e + 1), row(e + 2), row(e + 3)};
        A out[4];
        dot4(w, four, d, out);
        for (int64_t k = 0; k < 4; ++k) z[tokens.entry[e + k]] = out[k];
      }
      for (; e < end; ++e) z[tokens.entry[e]] = dot(w, row(e), d);
    }
  });
}

template <class S, class A>
void to_hidden(const KeptTokens& kept, const A* dz, const void* weight, A* out, int threads) {
  const int64_t d = kept.d;
  auto zero = [&](int, int64_t begin, int64_t end) { std::fill(out + begin * d, out + end * d, A(0)); };
  parallel(threads, kept.n, zero);
  by_blocks(kept, threads, [&](int64_t, int64_t, int64_t first, const ByToken& tokens, const auto& rows) {
    std::vector<A> scratch(d);
    for (int64_t j = 0; j < kept.v; ++j) {
      if (tokens.start[j] == tokens.start[j + 1]) continue;
      const A* w = wide<S>(weight, j, d, scratch.data());
      for (int64_t k = tokens.start[j]; k < tokens.start[j + 1]; ++k) {
        const int64_t e = tokens.entry[k];
        A* sum = out + rows[e - first] * d;
        const A g = dz[e];
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) sum[i] += g * w[i];
      }
    }
  });
}

// By blocks of rows as well: with the hidden states of all rows out of the second-level cache it took 1.7 times as
// long.
template <class S, class A>
void to_weight(const KeptTokens& kept, const A* dz, const void* hidden, A* total, uint8_t* seen, int threads) {
  const int64_t d = kept.d;
  auto part = [&](int, int64_t begin, int64_t end) {
    ByToken tokens;
    std::vector<A> scratch(std::is_same_v<S, A> ? 0 : kRows * d);
    std::vector<const A*> h(kRows);
    for (int64_t a = 0; a < kept.n; a += kRows) {
      const int64_t b = std::min(kept.n, a + kRows), first = kept.offsets[a];
      if (kept.offsets[b] == first) continue;
      tokens.sort(kept.ids, first, kept.offsets[b], begin, end);
      const std::vector<int64_t> rows = rows_of(kept, a, b);
      for (int64_t i = a; i < b; ++i) h[i - a] = wide<S>(hidden, i, d, scratch.data() + (i - a) * d);
      for (int64_t j = begin; j < end; ++j) {
        int64_t k = tokens.start[j - begin];
        const int64_t stop = tokens.start[j - begin + 1];
        if (k == stop) continue;
        A* sum = total + j * d;
        if (!seen[j]) std::fill(sum, sum + d, A(0));
        seen[j] = 1;
        auto row = [&](int64_t at) { return h[rows[tokens.entry[at] - first] - a]; };
        auto coefficient = [&](int64_t at) { return dz[tokens.entry[at]]; };
        for (; k + 4 <= stop; k += 4) {
          const A *h0 = row(k), *h1 = row(k + 1), *h2 = row(k + 2), *h3 = row(k + 3);
          const A g0 = coefficient(k), g1 = coefficient(k + 1), g2 = coefficient(k + 2), g3 = coefficient(k + 3);
#pragma omp simd
          for (int64_t i = 0; i < d; ++i) sum[i] += (g0 * h0[i] + g1 * h1[i]) + (g2 * h2[i] + g3 * h3[i]);
        }
        for (; k < stop; ++k) {
          const A* one = row(k);
          const A g = coefficient(k);
#pragma omp simd
          for (int64_t i = 0; i < d; ++i) sum[i] += g * one[i];
        }
      }
    }
  };
  parallel(threads, kept.v, part);
}

}  // namespace

const SupportKernels& support_kernels() {
  static const SupportKernels kernels{
      {dots<float, float>, dots<bf16, float>, dots<double, double>},
      {to_hidden<float, float>, to_hidden<bf16, float>, to_hidden<double, double>},
      {to_weight<float, float>, to_weight<bf16, float>, to_weight<double, double>},
  };
  return kernels;
}

}  // namespace qempo::cpu::QEMPO_ISA
