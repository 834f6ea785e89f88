// What both sizes of team share: a warp for groups of up to 16 rows, a block above; one group each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "qempo/dpp_cuda.h"

// All shared memory is dynamic, so that one declaration serves every kernel.
extern __shared__ double qempo_shared[];

namespace qempo::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct WarpTeam {
  static constexpr int kThreads = 32;
  int rank = threadIdx.x % 32;
  __device__ void sync() const { __syncwarp(); }
};

struct BlockTeam {
  static constexpr int kThreads = 256;
  int rank = threadIdx.x;
  __device__ void sync() const { __syncthreads(); }
};

// Each thread keeps kRows x kCols entries of a K x K matrix in registers, at (row(a), col(b)). K = 4 leaves lanes idle.
template <int K>
struct Tile {
  using Team = WarpTeam;
  static constexpr int kCols = K / 4, kRows = K == 16 ? 2 : 1, kAcross = 4;
  double at[kRows][kCols];
  int i0, j0;
  __device__ explicit Tile(int rank) : i0(rank / kAcross * kRows), j0(rank % kAcross * kCols) {}
};
template <>
struct Tile<64> {
  using Team = BlockTeam;
  static constexpr int kCols = 4, kRows = 4, kAcross = 16;
  double at[kRows][kCols];
  int i0, j0;
  __device__ explicit Tile(int rank) : i0(rank / kAcross * kRows), j0(rank % kAcross * kCols) {}
};

// Columns of embeddings that a block turns into float at a time, and their distance: 132 = 4 mod 32 banks, so that
// 16-byte reads of 8 successive rows meet no conflict.
constexpr int kStage = 128, kStageLd = kStage + 4;

template <int K>
constexpr int kLd = K + 1;  // odd: a column of doubles lies in different banks

// Shared memory of one team. `b` is also the stage of a block.
template <int K>
struct Room {
  static constexpr int kMatrix = K * kLd<K>;
  static constexpr int kSecond = K == 64 && K * kStageLd / 2 > kMatrix ? K * kStageLd / 2 : kMatrix;
  static constexpr int kVectors = 9;
  static constexpr int kDoubles = (kMatrix + kSecond + kVectors * K + 1) / 2 * 2;
  double *a, *b, *vectors;
  __device__ explicit Room(int team) : a(qempo_shared + team * kDoubles), b(a + (kMatrix + 1) / 2 * 2) {
    vectors = b + kSecond;
  }
  __device__ double* vector(int n) const { return vectors + n * K; }
};

struct Span {
  int64_t start, k;
  bool valid;
};

// Rows of group g, cut to [0, rows). Offsets are not checked on a GPU unless asked: a wrong group becomes NaN and reads
// nothing outside. Every row of x lies in some span, because the offsets pass over it on their way, or before the first
// or behind the last.
__device__ inline Span span_of(const DppGroups& in, int64_t g) {
  if (!in.offsets) return {g * in.k, in.k, true};
  const int64_t from = in.offsets[g], to = in.offsets[g + 1];
  const int64_t low = min(max(from, int64_t(0)), in.rows), high = min(max(to, int64_t(0)), in.rows);
  return {low, max(high - low, int64_t(0)), low == from && high == to && low < high && high - low <= kDppLargest};
}

// The rows that no valid group owns: the whole span of a wrong group, what lies before the first, behind the last.
template <class F>
__device__ void for_orphans(const DppGroups& in, int64_t g, const Span& span, bool whole, F&& fill) {
  if (whole && !span.valid) fill(span.start, span.start + span.k);
  if (!in.offsets) return;
  if (g == 0) fill(int64_t(0), min(max(in.offsets[0], int64_t(0)), in.rows));
  if (g == in.groups - 1) fill(min(max(in.offsets[in.groups], int64_t(0)), in.rows), in.rows);
}

// 16 bytes of a row as they lie in memory.
template <class T>
struct Pack {
  static constexpr int kCount = 16 / sizeof(T);
  uint4 bits;

  __device__ unsigned word(int w) const { return w == 0 ? bits.x : w == 1 ? bits.y : w == 2 ? bits.z : bits.w; }
  __device__ void put(int w, unsigned v) { (w == 0 ? bits.x : w == 1 ? bits.y : w == 2 ? bits.z : bits.w) = v; }
};

__device__ inline float get(const Pack<float>& p, int e) { return __uint_as_float(p.word(e)); }
__device__ inline float get(const Pack<__nv_bfloat16>& p, int e) {
  return __uint_as_float(e % 2 ? p.word(e / 2) & 0xffff0000u : p.word(e / 2) << 16);
}
__device__ inline float get(const Pack<__half>& p, int e) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(p.word(e / 2) >> (e % 2 * 16))));
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }

__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ inline unsigned bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ inline unsigned bits_of(__half x) { return __half_as_ushort(x); }

template <class T>
__device__ void put(Pack<T>& p, int e, float x) {
  T y;
  narrow(x, y);
  if constexpr (sizeof(T) == 4)
    p.put(e, bits_of(y));
  else
    p.put(e / 2, e % 2 ? p.word(e / 2) | bits_of(y) << 16 : bits_of(y));
}

// A pack from column c on; behind the row's end 0. `aligned`: every pack of the tensor lies on a 16-byte boundary.
template <class T>
__device__ Pack<T> load(const T* row, int64_t c, int64_t width, bool aligned) {
  Pack<T> pack{};
  if (aligned) {
    if (c < width) pack.bits = *reinterpret_cast<const uint4*>(row + c);
    return pack;
  }
#pragma unroll
  for (int e = 0; e < Pack<T>::kCount; ++e) put(pack, e, c + e < width ? widen(row[c + e]) : 0.f);
  return pack;
}

template <class T>
__device__ void store(T* row, int64_t c, int64_t width, bool aligned, const Pack<T>& pack) {
  if (aligned) {
    if (c < width) *reinterpret_cast<uint4*>(row + c) = pack.bits;
    return;
  }
#pragma unroll
  for (int e = 0; e < Pack<T>::kCount; ++e)
    if (c + e < width) narrow(get(pack, e), row[c + e]);
}

template <class T>
__device__ bool in_packs(const void* x, int64_t width) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && width % Pack<T>::kCount == 0;
}

}  // namespace qempo::cuda
