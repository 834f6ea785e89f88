// What the loss kernels share: logarithms and sigmoids that keep their relative accuracy, and sums of fixed order.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "qempo/losses.h"
#include "vecmath.h"

namespace qempo::cpu::QEMPO_ISA {

// Entries of a block, whose partial sum is one whatever the threads: 4 KiB of doubles stay in the first cache.
constexpr int64_t kBlock = 512;

// exp(x) of a double in A: float's polynomial, but the argument keeps the digits that float cuts off. Above A's range
// infinity; float's from e^88.38 on, 0.7 of its largest number.
inline double exp_as(double x, double) { return x > 709.0 ? std::numeric_limits<double>::infinity() : exp_(x); }
inline float exp_as(double x, float) {
  const float high = static_cast<float>(x);
  // Beyond, the result is 0 or infinity. From 2^24 on what float cuts off may be -1 and less, and infinity times 1 +
  // low NaN or below 0: a mask fill of -1e9 in old log-probs.
  const float low = high > -128.f && high < 128.f ? static_cast<float>(x - static_cast<double>(high)) : 0.f;
  return exp_(high) * (1.f + low);
}

// log(1 + t), t >= 0: 1 + t = 2^k m with m in [0.7, 1.42), log m = 2 atanh((m - 1) / (m + 1)) by its series, next term
// below 2e-17, or 2e-9 for float. What is not finite stays what it is.
inline double log1p_as(double t) {
  const double y = 1.0 + t;
  const uint64_t k = (bits_as<uint64_t>(y) - 0x3fe6a09e667f3bcdull) >> 52;
  const double n = bits_as<double>(k + 0x4330000000000000ull) - 4503599627370496.0;
  const double f = k ? bits_as<double>(bits_as<uint64_t>(y) - (k << 52)) - 1.0 : t;
  const double s = f / (2.0 + f), z = s * s;
  double p = 1.0 / 21;
  p = p * z + 1.0 / 19;
  p = p * z + 1.0 / 17;
  p = p * z + 1.0 / 15;
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  return y - y == 0.0 ? n * 0.69314718055994531 + 2.0 * (s + s * z * p) : y;
}
inline float log1p_as(float t) {
  const float y = 1.f + t;
  const uint32_t k = (bits_as<uint32_t>(y) - 0x3f3504f3u) >> 23;
  const float n = bits_as<float>(k + 0x4b000000u) - 8388608.f;
  const float f = k ? bits_as<float>(bits_as<uint32_t>(y) - (k << 23)) - 1.f : t;
  const float s = f / (2.f + f), z = s * s;
  float p = 1.f / 11;
  p = p * z + 1.f / 9;
  p = p * z + 1.f / 7;
  p = p * z + 1.f / 5;
  p = p * z + 1.f / 3;
  return y - y == 0.f ? n * 0.693147181f + 2.f * (s + s * z * p) : y;
}

// Margins h become losses -(1 - e) log s(h) - e log s(-h), e = smoothing; slope is their derivative. In A.
template <class A>
void log_sigmoids(int64_t n, double smoothing, double* h, double* slope) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double x = h[i], size = x < 0 ? -x : x;
    const A e = exp_as(-size, A(0));
    // -log s(-h) = h - log s(h). One term for each sign: infinity less a share of it is NaN, and so is 0 times it.
    const double wrong = smoothing > 0 ? smoothing * size : 0.0;
    h[i] = (x < 0 ? (1.0 - smoothing) * size : wrong) + static_cast<double>(log1p_as(e));
    slope[i] = smoothing - static_cast<double>((x < 0 ? A(1) : e) / (A(1) + e));
  }
}

inline double row_weight(Reduction reduction, int64_t rows) {
  return reduction == Reduction::mean ? 1.0 / static_cast<double>(std::max<int64_t>(rows, 1)) : 1.0;
}

// Sum over blocks of body(begin, end), added in the blocks' order: the same bits for any number of threads.
template <class F>
double sum_of_blocks(int threads, int64_t items, int64_t block, int64_t entries, const F& body) {
  const int64_t blocks = (items + block - 1) / block;
  std::array<double, 64> few;
  std::vector<double> many(blocks > 64 ? blocks : 0);
  double* partial = blocks > 64 ? many.data() : few.data();
  auto run = [&](int, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) partial[b] = body(b * block, std::min((b + 1) * block, items));
  };
  parallel(entries < kThreadPays ? 1 : threads, blocks, run);
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += partial[b];
  return total;
}

// Losses of rows that know nothing of each other, reduced as in.reduction says: body(first row, rows, their losses) for
// each block of at most kBlock rows.
template <class A, template <class> class In, class F>
void over_rows(int threads, const In<A>& in, int64_t block, int64_t entries, const F& body) {
  const bool each = in.reduction == Reduction::none;
  const double total = sum_of_blocks(threads, in.rows, block, entries, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    double loss[kBlock], sum = 0;
    body(begin, n, loss);
    if (each) {
      for (int64_t i = 0; i < n; ++i) in.value[begin + i] = static_cast<A>(loss[i]);
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += loss[i];
    }
    return sum;
  });
  if (!each) *in.value = static_cast<A>(total * row_weight(in.reduction, in.rows));
}

// Sum over blocks of groups, about kBlock samples each, of body(first sample, samples, first group, groups, room for a
// double each).
template <class F>
double over_groups(int threads, const Segments& groups, int64_t samples, int64_t entries, const F& body) {
  const int64_t block = std::max<int64_t>(1, kBlock * groups.count / std::max<int64_t>(samples, 1));
  return sum_of_blocks(threads, groups.count, block, entries, [&](int64_t begin, int64_t end) {
    const int64_t first = groups.first(begin), n = groups.first(end) - first;
    double few[2 * kBlock];
    std::vector<double> many(n > 2 * kBlock ? n : 0);
    return body(first, n, begin, end, n > 2 * kBlock ? many.data() : few);
  });
}

// -sum_i weight_i l_i, and its coefficients times scale. No weight times an infinite log-prob is 0.
template <class A>
double weighted(int64_t n, const double* weight, const A* logps, double scale, A* coef) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    total -= weight[i] * static_cast<double>(logps[i]);
    coef[i] = static_cast<A>(-scale * weight[i]);
  }
  if (total == total) return total;
  // Once more, slower: in the loop above the comparison took a third of the time of a small loss's arithmetic.
  total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double l = static_cast<double>(logps[i]);
    total -= weight[i] == 0.0 && l == l ? 0.0 : weight[i] * l;
  }
  return total;
}

template <class A>
bool finite(int64_t n, const A* x) {
  int bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) bad |= x[i] - x[i] != A(0);
  return !bad;
}

}  // namespace qempo::cpu::QEMPO_ISA
