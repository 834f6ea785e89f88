// Inner products of a group's rows: x_i . x_j into a K x K matrix of doubles in shared memory.
#pragma once

#include "dpp_team.cuh"

namespace qempo::cuda {

// Sums N values a lane over the warp in N - N / 32 shuffles: each step halves what a lane answers for. Lane l ends with
// the sums of values l N / 32 and on. A template, because a loop over halving sizes put the values into local memory.
template <int N, int Step, int Size>
__device__ __forceinline__ void fold(float (&v)[Size], int lane) {
  const bool upper = lane & Step;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float mine = upper ? v[i + N / 2] : v[i], other = upper ? v[i] : v[i + N / 2];
    v[i] = mine + __shfl_xor_sync(kAllLanes, other, Step);
  }
  if constexpr (Step > 1) fold<N / 2, Step / 2>(v, lane);
}

// A lane takes 16 bytes of every row, multiplies all pairs in registers, and goes 512 bytes on: no shared memory, all
// rows in flight at once. A lane adds d / 32 terms, then the warp's tree: float32 loses a few roundings at most.
template <class T, int K>
__device__ void gram_fast(const T* x, int k, int64_t width, WarpTeam team, const Room<K> room) {
  constexpr int kPairs = K * (K + 1) / 2, kSums = (kPairs + 31) / 32 * 32;
  float sums[kSums] = {};
  const bool aligned = in_packs<T>(x, width);
  for (int64_t c = team.rank * Pack<T>::kCount; c < width; c += 32 * Pack<T>::kCount) {
    Pack<T> rows[K];
#pragma unroll
    for (int i = 0; i < K; ++i) rows[i] = i < k ? load(x + i * width, c, width, aligned) : Pack<T>{};
#pragma unroll
    for (int e = 0; e < Pack<T>::kCount; ++e) {
      float column[K];
#pragma unroll
      for (int i = 0; i < K; ++i) column[i] = get(rows[i], e);
#pragma unroll
      for (int i = 0, pair = 0; i < K; ++i)
#pragma unroll
        for (int j = 0; j <= i; ++j, ++pair) sums[pair] += column[i] * column[j];
    }
  }
  fold<kSums, 16>(sums, team.rank);
#pragma unroll
  for (int n = 0; n < kSums / 32; ++n) {
    const int pair = team.rank * (kSums / 32) + n;
    int i = 0;
    while ((i + 1) * (i + 2) / 2 <= pair) ++i;
    const int j = pair - i * (i + 1) / 2;
    if (i < k) room.a[i * kLd<K> + j] = room.a[j * kLd<K> + i] = sums[n];
  }
  team.sync();
}

// Rows of [first, first + kStage) columns as floats; 0 beyond k and beyond the width.
template <class T>
__device__ void stage_rows(const T* x, int k, int rows, int64_t first, int64_t width, BlockTeam team, float* stage) {
  constexpr int kPacks = kStage / Pack<T>::kCount;
  const bool aligned = in_packs<T>(x, width);
  for (int n = team.rank; n < rows * kPacks; n += BlockTeam::kThreads) {
    const int i = n / kPacks, c = n % kPacks * Pack<T>::kCount;
    const Pack<T> pack = i < k ? load(x + i * width, first + c, width, aligned) : Pack<T>{};
#pragma unroll
    for (int e = 0; e < Pack<T>::kCount; e += 4)
      *reinterpret_cast<float4*>(stage + i * kStageLd + c + e) =
          make_float4(get(pack, e), get(pack, e + 1), get(pack, e + 2), get(pack, e + 3));
  }
}

// A thread owns the 16 products of rows {t + a tiles} and {u + b tiles}, t >= u; threads left over share the columns.
template <class T, int K>
__device__ void gram_fast(const T* x, int k, int64_t width, BlockTeam team, const Room<K> room) {
  float* stage = reinterpret_cast<float*>(room.b);
  const int tiles = (k + 3) / 4, pairs = tiles * (tiles + 1) / 2;
  const int slices = min(BlockTeam::kThreads / pairs, 8), slice = team.rank / pairs, pair = team.rank % pairs;
  int t = 0;
  while ((t + 1) * (t + 2) / 2 <= pair) ++t;
  const int u = pair - t * (t + 1) / 2;
  float sums[4][4] = {};
  for (int64_t first = 0; first < width; first += kStage) {
    team.sync();
    stage_rows(x, k, 4 * tiles, first, width, team, stage);
    team.sync();
    if (slice >= slices) continue;
    for (int c = 4 * slice; c < kStage; c += 4 * slices) {
      float4 left[4], right[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        left[n] = *reinterpret_cast<const float4*>(stage + (t + n * tiles) * kStageLd + c);
        right[n] = *reinterpret_cast<const float4*>(stage + (u + n * tiles) * kStageLd + c);
      }
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          sums[m][n] += left[m].x * right[n].x;
          sums[m][n] += left[m].y * right[n].y;
          sums[m][n] += left[m].z * right[n].z;
          sums[m][n] += left[m].w * right[n].w;
        }
    }
  }
  // In the order of the slices: two runs agree bitwise.
  for (int s = 0; s < slices; ++s) {
    if (slice == s)
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int i = t + m * tiles, j = u + n * tiles;
          if (i >= k || j >= k || (t == u && m < n)) continue;
          const double sum = s == 0 ? sums[m][n] : room.a[i * kLd<K> + j] + sums[m][n];
          room.a[i * kLd<K> + j] = room.a[j * kLd<K> + i] = sum;
        }
    team.sync();
  }
}

// The same in float64, where float32 products would decide the answer. A warp takes a pair; rows come from the caches.
template <class T, int K>
__device__ __noinline__ void gram_careful(const T* x, int k, int64_t width, int rank, const Room<K> room) {
  constexpr int kWarps = Tile<K>::Team::kThreads / 32;
  const int lane = rank % 32;
  for (int pair = rank / 32; pair < k * (k + 1) / 2; pair += kWarps) {
    int i = 0;
    while ((i + 1) * (i + 2) / 2 <= pair) ++i;
    const int j = pair - i * (i + 1) / 2;
    double sum = 0;
    for (int64_t c = lane; c < width; c += 32)
      sum += static_cast<double>(widen(x[i * width + c])) * static_cast<double>(widen(x[j * width + c]));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane == 0) room.a[i * kLd<K> + j] = room.a[j * kLd<K> + i] = sum;
  }
  typename Tile<K>::Team{}.sync();
}

}  // namespace qempo::cuda
