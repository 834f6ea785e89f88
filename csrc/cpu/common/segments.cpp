// Offsets as ops read them: the check that makes their loops safe, and sums over what they bound.
#include "qempo/segments.h"

#include <algorithm>

#include "qempo/cpu.h"

namespace qempo::cpu {
namespace {

// Entries that are added one after another, in 8 lanes: the rounding of longer sums grows with log2 of their length.
constexpr int64_t kRun = 512;

// No special case for infinities and NaN, which a sum that carries its own error along would need.
template <class A>
double pairwise(const A* x, int64_t n) {
  if (n > kRun) {
    const int64_t half = n / 16 * 8;
    return pairwise(x, half) + pairwise(x + half, n - half);
  }
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += static_cast<double>(x[i + j]);
  for (int j = 0; i < n; ++i, ++j) lanes[j] += static_cast<double>(x[i]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

template <class F>
bool over_segments(const Segments& segments, int64_t n, int threads, const F& body) {
  if (!segments.cover(n, 0)) return false;
  auto run = [&](int, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) body(s, segments.first(s), segments.length(s));
  };
  parallel(n < kThreadPays ? 1 : threads, segments.count, run);
  return true;
}

}  // namespace

bool Segments::cover(int64_t total, int64_t at_least) const {
  if (!data) return true;  // checked with the sizes in Python
  int64_t before = first(0);
  if (before != 0) return false;
  for (int64_t i = 1; i <= count; ++i) {
    const int64_t next = first(i);
    // Not next - before < at_least: the difference of wild offsets may overflow.
    if (next < before || next > total || next - before < at_least) return false;
    before = next;
  }
  return before == total;
}

template <class A>
bool sum_segments(const Segments& segments, const A* values, int64_t n, A* out, int threads) {
  return over_segments(segments, n, threads, [&](int64_t s, int64_t first, int64_t length) {
    out[s] = static_cast<A>(pairwise(values + first, length));
  });
}

template <class A>
bool spread_segments(const Segments& segments, const A* grad, int64_t n, A* out, int threads) {
  return over_segments(segments, n, threads,
                       [&](int64_t s, int64_t first, int64_t length) { std::fill_n(out + first, length, grad[s]); });
}

template bool sum_segments(const Segments&, const float*, int64_t, float*, int);
template bool sum_segments(const Segments&, const double*, int64_t, double*, int);
template bool spread_segments(const Segments&, const float*, int64_t, float*, int);
template bool spread_segments(const Segments&, const double*, int64_t, double*, int);

}  // namespace qempo::cpu
