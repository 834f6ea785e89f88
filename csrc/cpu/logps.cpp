// Compiled once per instruction set, with that set's flags and QEMPO_ISA as its namespace. Loops are plain C++ that the
// compiler vectorises; nothing here may be called on a processor without the set.
#include "qempo/logps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "vecmath.h"

namespace qempo::cpu::QEMPO_ISA {
namespace {

template <class A>
A capped(A x, A softcap) {
  return softcap * tanh_(x / softcap);
}

// Logits of one row after bias, scale, cap and temperature, in the accumulation type.
template <class S, class A>
const A* logits(const S* row, int64_t c, const Head<A>& head, int64_t i, A* scratch) {
  if constexpr (std::is_same_v<S, A>) {
    if (head.identity()) return row;
  }
  const A inv_t = head.inv_temperature ? head.inv_temperature[i] : A(1);
  const A scale = head.scale, cap = head.softcap;
  if (head.bias) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) scratch[j] = (load<A>(row + j) + head.bias[j]) * scale;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) scratch[j] = load<A>(row + j) * scale;
  }
  if (cap > A(0)) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) scratch[j] = capped(scratch[j], cap) * inv_t;
  } else if (inv_t != A(1)) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) scratch[j] *= inv_t;
  }
  return scratch;
}

template <class A>
A row_max(const A* x, int64_t c) {
  constexpr int kLanes = 128 / sizeof(A);  // two widest vectors in flight
  A best[kLanes];
  for (int l = 0; l < kLanes; ++l) best[l] = -std::numeric_limits<A>::infinity();
  int64_t j = 0;
  for (; j + kLanes <= c; j += kLanes)
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) best[l] = x[j + l] > best[l] ? x[j + l] : best[l];
  for (; j < c; ++j) best[0] = x[j] > best[0] ? x[j] : best[0];
  return *std::max_element(best, best + kLanes);
}

// Sums over one row relative to the maximum m: exp, and where asked (z - m) exp and exp^2.
template <bool kEntropy, bool kSumSq, class A>
void row_sums(const A* x, int64_t c, A m, A& sum, A& sum_z, A& sum_sq) {
  A s = 0, sz = 0, ss = 0;
#pragma omp simd reduction(+ : s, sz, ss)
  for (int64_t j = 0; j < c; ++j) {
    const A d = x[j] - m, e = exp_(d);
    s += e;
    // exp(-inf) is 0 and 0 * -inf is NaN: a masked logit adds nothing.
    if constexpr (kEntropy) sz += e * (d < A(-1e4) ? A(0) : d);
    if constexpr (kSumSq) ss += e * e;
  }
  sum = s, sum_z = sz, sum_sq = ss;
}

template <class A>
void add_row(const A* x, int64_t c, const RowStats<A>& stats, int64_t i) {
  const A before = stats.max[i], m = std::max(before, row_max(x, c));
  if (m == -std::numeric_limits<A>::infinity()) {  // every logit so far is -inf, or NaN
    if (std::any_of(x, x + c, [](A z) { return z != z; })) stats.sum[i] = std::numeric_limits<A>::quiet_NaN();
    return;
  }
  A sum, sum_z, sum_sq;
  if (stats.sum_z && stats.sum_sq)
    row_sums<true, true>(x, c, m, sum, sum_z, sum_sq);
  else if (stats.sum_z)
    row_sums<true, false>(x, c, m, sum, sum_z, sum_sq);
  else if (stats.sum_sq)
    row_sums<false, true>(x, c, m, sum, sum_z, sum_sq);
  else
    row_sums<false, false>(x, c, m, sum, sum_z, sum_sq);
  const A shift = before - m, k = std::exp(shift);  // exp(-inf) = 0 on the first tile
  // Moving the reference from `before` to m adds sum * (before - m) to the sum of (z - max) exp(z - max).
  if (stats.sum_z) stats.sum_z[i] = sum_z + (k > A(0) ? k * (stats.sum_z[i] + stats.sum[i] * shift) : A(0));
  if (stats.sum_sq) stats.sum_sq[i] = sum_sq + k * k * stats.sum_sq[i];
  stats.sum[i] = sum + k * stats.sum[i];
  stats.max[i] = m;
}

template <class S, class A>
void forward(const Tile& tile, const Head<A>& head, const int64_t* targets, const RowStats<A>& stats, A* columns,
             int64_t vocabulary, int threads) {
  auto rows = [&](int thread, int64_t begin, int64_t end) {
    std::vector<A> scratch(std::is_same_v<S, A> && head.identity() ? 0 : tile.c);
    A* best = columns ? columns + thread * vocabulary + tile.v0 : nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const S* row = static_cast<const S*>(tile.z) + tile.begin(i);
      const int64_t c = tile.width(i);
      const A* x = logits(row, c, head, i, scratch.data());
      add_row(x, c, stats, i);
      const int64_t t = targets[i] - tile.v0;
      if (t >= 0 && t < c) stats.target[i] = x[t];
      if (!best) continue;
      A top = stats.max[i], log_sum = std::log(stats.sum[i]);
      if (log_sum != log_sum) {
        // Stays: nothing is above it. The row's gradient is NaN in all columns.
        std::fill(best, best + tile.c, log_sum);
        continue;
      }
      if (stats.floor_ && stats.floor_[i] - top > log_sum) top = stats.floor_[i], log_sum = 0;
#pragma omp simd
      for (int64_t j = 0; j < tile.c; ++j) {
        const A u = (x[j] - top) - log_sum;
        best[j] = u > best[j] ? u : best[j];
      }
    }
  };
  parallel(threads, tile.n, rows);
}

// d raw of one row without its target entry; chain is d z / d raw for the uncapped part.
template <bool kEntropy, class S, class A>
void row_grad(S* row, const A* x, int64_t c, const RowGrads<A>& grads, int64_t i, A chain) {
  const A top = grads.lse[2 * i], log_sum = grads.lse[2 * i + 1], k = std::exp(-log_sum) * chain;
  const A g = -grads.grad[i] * k;
  if constexpr (kEntropy) {
    const A gh = grads.grad_h[i] * k, shift = grads.entropy[i] - log_sum;
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) {
      const A d = x[j] - top;
      store(row + j, exp_(d) * (g - gh * ((d < A(-1e4) ? A(0) : d) + shift)));
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) store(row + j, exp_(x[j] - top) * g);
  }
}

template <class S, class A>
void backward(const Tile& tile, const Head<A>& head, const RowGrads<A>& grads, int threads) {
  auto rows = [&](int, int64_t begin, int64_t end) {
    std::vector<A> scratch(tile.c), out(std::is_same_v<S, A> ? 0 : tile.c);
    for (int64_t i = begin; i < end; ++i) {
      S* row = static_cast<S*>(tile.z) + tile.begin(i);
      const int64_t c = tile.width(i);
      const A* x = logits(row, c, head, i, scratch.data());
      const A inv_t = head.inv_temperature ? head.inv_temperature[i] : A(1), chain = head.scale * inv_t;
      A* d;
      if constexpr (std::is_same_v<S, A>)
        d = row;
      else
        d = out.data();
      // The target's entry is g (1 - p) - ...: expm1 keeps the digits that 1 - p loses as p nears 1, and it is
      // computed before the row is overwritten.
      const int64_t t = grads.target[i];
      const bool here = t >= 0 && t < c;
      A target = 0, zt = 0;
      if (here) {
        const A lp = (x[t] - grads.lse[2 * i]) - grads.lse[2 * i + 1];
        zt = x[t];
        target = -grads.grad[i] * std::expm1(lp);
        if (grads.grad_h && lp > A(-1e4)) target -= grads.grad_h[i] * std::exp(lp) * (lp + grads.entropy[i]);
        target *= chain;
      }
      const A cap = head.softcap;
      // d tanh = 1 - tanh^2 with tanh = z / (inv_t softcap); x may be overwritten by d, so it goes to scratch first.
      if (cap > A(0)) {
        const A k = A(1) / (inv_t * cap);
        if (here) target *= A(1) - (zt * k) * (zt * k);
        A* slope = scratch.data();  // x is scratch here: a capped head is never the identity
        if (grads.grad_h)
          row_grad<true>(d, x, c, grads, i, chain);
        else
          row_grad<false>(d, x, c, grads, i, chain);
#pragma omp simd
        for (int64_t j = 0; j < c; ++j) d[j] *= A(1) - (slope[j] * k) * (slope[j] * k);
      } else if (grads.grad_h) {
        row_grad<true>(d, x, c, grads, i, chain);
      } else {
        row_grad<false>(d, x, c, grads, i, chain);
      }
      if (grads.inverse) {
#pragma omp simd
        for (int64_t j = 0; j < c; ++j) d[j] *= grads.inverse[j];
      }
      if (here) d[t] = target;
      if constexpr (!std::is_same_v<S, A>) {
#pragma omp simd
        for (int64_t j = 0; j < c; ++j) store(row + j, d[j]);
      }
      if (grads.row_sum) {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < c; ++j) sum += load<A>(row + j);
        grads.row_sum[i] = sum;
      }
    }
  };
  parallel(threads, tile.n, rows);
}

}  // namespace

const LogpsKernels& logps_kernels() {
  static const LogpsKernels kernels{
      {forward<float, float>, forward<bf16, float>, forward<double, double>},
      {backward<float, float>, backward<bf16, float>, backward<double, double>},
  };
  return kernels;
}

}  // namespace qempo::cpu::QEMPO_ISA
