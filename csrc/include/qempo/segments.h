// Consecutive segments of a flat tensor, as offsets or as one size, and their sums. csrc/cpu/common/segments.cpp.
#pragma once

#include <cstdint>

namespace qempo::cpu {

// (n + 1) first entries of consecutive segments, int32 or int64; or segments of one size where data is null.
struct Segments {
  const void* data;
  bool wide;
  int64_t count, size;

  int64_t first(int64_t i) const {
    if (!data) return i * size;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  int64_t length(int64_t i) const { return first(i + 1) - first(i); }
  // Whether they cover [0, total) and each has at_least entries.
  bool cover(int64_t total, int64_t at_least) const;
};

// segment_sum: out_s = sum of segment s, pairwise in double, rounded once; false, and nothing written, unless the
// segments cover all n values. Reference: qempo_fast/reference/segments.py.
template <class A>
bool sum_segments(const Segments& segments, const A* values, int64_t n, A* out, int threads);

// Its gradient: each of n tokens gets its segment's entry.
template <class A>
bool spread_segments(const Segments& segments, const A* grad, int64_t n, A* out, int threads);

}  // namespace qempo::cpu
