// The k x k algebra of most groups: A = D^-1 (L + ridge I) D^-1, D = diag(max(1, s)), inverted in registers.
// Everything k x k is float64: logarithms of qualities and 1 - P_ij^2 cancel digits that float32 does not have, and
// beside the passes over the embeddings it costs nothing.
#pragma once

#include "dpp_team.cuh"

namespace qempo::cuda {

// Names of the vectors in a Room.
enum Vector { kLogScale, kLength, kScale, kRidge, kPivot, kDiagonal, kGain, kColumn, kColumnToo };

// 1 - R_i^2 = 1 / (A_ii (A^-1)_ii) below which row i depends on others so closely that float32 products, off by 1e-7 or
// so, would be off by more than 2^8 times that in the answer.
constexpr double kIndependent = 1.0 / 256;
// Squared lengths whose float32 products neither overflow nor lose digits as subnormal numbers.
constexpr double kShortest = 1e-24, kLongest = 1e30;

__device__ inline double log_quality_of(const DppGroups& in, int64_t row) {
  if (!in.log_quality) return 0.0;
  switch (in.quality) {
    case DppDtype::f32: return static_cast<const float*>(in.log_quality)[row];
    case DppDtype::bf16: return widen(static_cast<const __nv_bfloat16*>(in.log_quality)[row]);
    case DppDtype::f16: return widen(static_cast<const __half*>(in.log_quality)[row]);
    case DppDtype::f64: break;
  }
  return static_cast<const double*>(in.log_quality)[row];
}

template <int K>
__device__ void set_scale(const DppGroups& in, int64_t row, int i, double length, const Room<K> room) {
  double log_s = log_quality_of(in, row) / 2;
  if (!in.normalize) log_s += log(length);
  // A row of zeros is the zero vector whatever its quality.
  room.vector(kLogScale)[i] = length == 0 ? -INFINITY : log_s;
  room.vector(kLength)[i] = length;
}

// Writes -A^-1 over A by sweeping each diagonal entry. One barrier a step: the column of the next is published into the
// other of two buffers. Pivots are the squares of Cholesky's diagonal.
template <int K>
__device__ void sweep(Tile<K>& tile, int k, typename Tile<K>::Team team, const Room<K> room) {
  auto publish = [&](int p) {
    double* column = room.vector(p % 2 ? kColumnToo : kColumn);
#pragma unroll
    for (int a = 0; a < Tile<K>::kRows; ++a)
      if (tile.i0 + a == p)
#pragma unroll
        for (int b = 0; b < Tile<K>::kCols; ++b) column[tile.j0 + b] = tile.at[a][b];
  };
  publish(0);
  for (int p = 0; p < k; ++p) {
    team.sync();
    const double* column = room.vector(p % 2 ? kColumnToo : kColumn);
    const double pivot = column[p], inverse = 1 / pivot;
    if (team.rank == 0) room.vector(kPivot)[p] = pivot;
    if (tile.i0 < K) {
#pragma unroll
      for (int a = 0; a < Tile<K>::kRows; ++a) {
        const int i = tile.i0 + a;
        const double left = column[i] * inverse;
#pragma unroll
        for (int b = 0; b < Tile<K>::kCols; ++b) {
          const int j = tile.j0 + b;
          double& entry = tile.at[a][b];
          if (i == p)
            entry = j == p ? -inverse : column[j] * inverse;
          else
            entry = j == p ? left : entry - left * column[j];
        }
      }
    }
    if (p + 1 < k) publish(p + 1);
  }
}

// (A^-1)_ii^-1/2, behind the partial products of direct_results in the second matrix.
template <int K>
__device__ double* inverse_root(const Room<K> room) {
  return room.b + K * Tile<K>::kAcross;
}

// Leaves -A^-1 in the tile, its negated diagonal and the pivots in shared memory; says whether float32 products
// suffice.
template <int K>
__device__ bool invert(const DppGroups& in, const Span& span, Tile<K>& tile, typename Tile<K>::Team team,
                       const Room<K> room) {
  const int k = static_cast<int>(span.k);
  double *scale = room.vector(kScale), *ridge = room.vector(kRidge), *diagonal = room.vector(kDiagonal);
  if (team.rank < k) {
    const int i = team.rank;
    const double square = room.a[i * kLd<K> + i];
    set_scale(in, span.start + i, i, sqrt(square), room);
    const double log_s = room.vector(kLogScale)[i], log_d = fmax(log_s, 0.0);
    scale[i] = square >= kShortest && square <= kLongest ? exp(log_s - log_d) : NAN;
    ridge[i] = in.ridge * exp(-2 * log_d);
  }
  team.sync();
  const double* length = room.vector(kLength);
#pragma unroll
  for (int a = 0; a < Tile<K>::kRows; ++a)
#pragma unroll
    for (int b = 0; b < Tile<K>::kCols; ++b) {
      const int i = tile.i0 + a, j = tile.j0 + b;
      double entry = i == j ? 1.0 : 0.0;
      if (i < k && j < k)
        entry = i == j ? scale[i] * scale[i] + ridge[i]
                       : scale[i] / length[i] * room.a[i * kLd<K> + j] * (scale[j] / length[j]);
      tile.at[a][b] = entry;
    }
  sweep(tile, k, team, room);
#pragma unroll
  for (int a = 0; a < Tile<K>::kRows; ++a)
#pragma unroll
    for (int b = 0; b < Tile<K>::kCols; ++b)
      if (tile.i0 + a == tile.j0 + b && tile.i0 + a < k) {
        diagonal[tile.i0 + a] = -tile.at[a][b];
        inverse_root(room)[tile.i0 + a] = 1 / sqrt(-tile.at[a][b]);
      }
  team.sync();
  // Every thread reads all, so that all agree. A comparison with NaN is false.
  bool fine = true;
  for (int i = 0; i < k; ++i)
    fine = fine && room.vector(kPivot)[i] > 0 && diagonal[i] * (scale[i] * scale[i] + ridge[i]) * kIndependent < 1 &&
           diagonal[i] > 0;
  return fine;
}

__device__ inline void keep_row(const DppKept& kept, int64_t row, double factor, double ridge_m, double length) {
  kept.rows[3 * row] = factor;
  kept.rows[3 * row + 1] = ridge_m;
  kept.rows[3 * row + 2] = length;
}

// gain_i and what the backward pass keeps of row i; P_ij = A^-1_ij / sqrt(A^-1_ii A^-1_jj) of the tile.
template <int K>
__device__ void direct_results(const DppForward& call, int64_t g, const Span& span, const Tile<K>& tile,
                               typename Tile<K>::Team team, const Room<K> room) {
  const int k = static_cast<int>(span.k);
  const double *diagonal = room.vector(kDiagonal), *scale = room.vector(kScale), *root = inverse_root(room);
  // The pivots themselves may still be read by slower threads.
  double *gain = room.vector(kGain), *log_pivot = room.vector(kColumn), *rest = room.b;
  if (team.rank < k) {
    const int i = team.rank;
    const double log_d = fmax(room.vector(kLogScale)[i], 0.0);
    gain[i] = 2 * log_d - log(diagonal[i]);
    log_pivot[i] = log(room.vector(kPivot)[i]) + 2 * log_d;
    keep_row(call.kept, span.start + i, scale[i] * sqrt(diagonal[i]), room.vector(kRidge)[i] * diagonal[i],
             room.vector(kLength)[i]);
  }
#pragma unroll
  for (int a = 0; a < Tile<K>::kRows; ++a) {
    const int i = tile.i0 + a;
    if (i >= k) continue;
    // A product of factors in [1/256, 1]: 2^-512 at worst, and one logarithm instead of k.
    double product = 1;
#pragma unroll
    for (int b = 0; b < Tile<K>::kCols; ++b) {
      const int j = tile.j0 + b;
      if (j >= k) continue;
      const double p = i == j ? 1.0 : -tile.at[a][b] * root[i] * root[j];
      call.kept.p[(span.start + i) * call.kept.pitch + j] = p;
      if (i != j) product *= 1 - p * p;
    }
    rest[i * Tile<K>::kAcross + tile.j0 / Tile<K>::kCols] = product;
  }
  team.sync();
  if (team.rank < k) {
    const int i = team.rank, across = (k + Tile<K>::kCols - 1) / Tile<K>::kCols;
    double total = 0, product = 1;
    for (int j = 0; j < k; ++j) total += j == i ? 0.0 : gain[j];
    for (int n = 0; n < across; ++n) product *= rest[i * Tile<K>::kAcross + n];
    call.gains[span.start + i] = static_cast<float>(gain[i]);
    call.baselines[span.start + i] = k > 1 ? static_cast<float>((total - log(product)) / (k - 1)) : NAN;
  }
  if (team.rank == 0) {
    double logdet = 0;
    for (int i = 0; i < k; ++i) logdet += log_pivot[i];
    call.logdet[g] = static_cast<float>(logdet);
    call.kept.careful[g] = 0;
  }
}

}  // namespace qempo::cuda
