// The k x k algebra where rows depend on each other at a high quality or a small ridge: rounding of L would drown what
// is left of a row, e^-1000 of it at log_quality 1000. With L = N diag(delta) N^T from pivoted elimination (N unit
// triangular, entries at most 1), Y = N^-1, e = min(1, sqrt(ridge / delta)), h = min(1, delta / ridge) and E = diag(e)
// Y,
//   ridge (L + ridge I)^-1 = E^T H^-1 E,  H = diag(h) + E E^T,
// where H is well conditioned and a dependent row has delta = 0 exactly. Derivation: docs/dpp.md.
#pragma once

#include "dpp_direct.cuh"

namespace qempo::cuda {

// Other names for a Room's vectors; kLogScale and kLength keep theirs.
enum CarefulVector {
  kHeavy = kScale,
  kLogDelta = kRidge,
  kDone = kPivot,
  kScore = kDiagonal,
  kWeight = kColumn,
  kRoot
};

// Squared sine, and weight, that rounding leaves between dependent rows.
__device__ inline double dependence_floor(int k) { return 8 * k * 2.220446049250313e-16; }

// cosines over the inner products in a; false where a row is not finite.
template <int K>
__device__ bool cosines(const DppGroups& in, const Span& span, int rank, const Room<K> room) {
  constexpr int kThreads = Tile<K>::Team::kThreads;
  const typename Tile<K>::Team team{};
  const int k = static_cast<int>(span.k);
  double* length = room.vector(kLength);
  if (rank < k) {
    set_scale(in, span.start + rank, rank, sqrt(room.a[rank * kLd<K> + rank]), room);
    room.vector(kDone)[rank] = 0;
    room.vector(kLogDelta)[rank] = -INFINITY;
  }
  team.sync();
  bool finite = true;
  for (int i = 0; i < k; ++i) finite = finite && isfinite(length[i]) && room.vector(kLogScale)[i] < INFINITY;
  for (int n = rank; n < k * k; n += kThreads) {
    const int i = n / k, j = n % k;
    double& entry = room.a[i * kLd<K> + j];
    const double product = length[i] * length[j];
    entry = product == 0 ? 0.0 : i == j ? 1.0 : entry / product;
    room.b[i * kLd<K> + j] = i == j ? 1.0 : 0.0;
  }
  team.sync();
  return finite;
}

// Pivoted elimination of the cosines in a, largest s^2 v first (v: squared sine to the rows before), with the inverse
// of the triangular factor in b, unscaled. Rows whose v falls below rounding are dependent and stop there.
template <int K>
__device__ void eliminate(int k, int rank, const Room<K> room) {
  constexpr int kThreads = Tile<K>::Team::kThreads, ld = kLd<K>;
  const typename Tile<K>::Team team{};
  double *score = room.vector(kScore), *weight = room.vector(kWeight), *done = room.vector(kDone);
  const double floor = dependence_floor(k);
  for (int step = 0; step < k; ++step) {
    if (rank < k) {
      const double v = room.a[rank * ld + rank];
      const bool live = done[rank] == 0 && v > floor;
      score[rank] = live ? 2 * room.vector(kLogScale)[rank] + log(v) : -INFINITY;
    }
    team.sync();
    int p = -1;
    for (int i = 0; i < k; ++i)
      if (score[i] > -INFINITY && (p < 0 || score[i] > score[p])) p = i;
    if (p < 0) return;
    if (rank < k) {
      weight[rank] = rank != p && score[rank] > -INFINITY ? room.a[rank * ld + p] / room.a[p * ld + p] : 0.0;
      if (rank == p) room.vector(kLogDelta)[p] = score[p];
      if (rank == p) done[p] = 1;
    }
    team.sync();
    for (int n = rank; n < k * k; n += kThreads) {
      const int i = n / k, j = n % k;
      if (weight[i] == 0) continue;
      room.a[i * ld + j] -= weight[i] * room.a[p * ld + j];
      room.b[i * ld + j] -= weight[i] * room.b[p * ld + j];
    }
    team.sync();
  }
}

// E into b, E S restricted to independent rows into z, H into a.
template <int K>
__device__ void well_conditioned(const DppGroups& in, int k, int rank, const Room<K> room, double* z, int pitch) {
  constexpr int kThreads = Tile<K>::Team::kThreads, ld = kLd<K>;
  const typename Tile<K>::Team team{};
  const double *log_s = room.vector(kLogScale), *log_delta = room.vector(kLogDelta), *done = room.vector(kDone);
  const double floor = dependence_floor(k), log_ridge = log(in.ridge);
  if (rank < k) room.vector(kHeavy)[rank] = exp(fmin(0.0, (log_ridge - log_delta[rank]) / 2));
  team.sync();
  for (int n = rank; n < k * k; n += kThreads) {
    const int i = n / k, j = n % k;
    double& entry = room.b[i * ld + j];
    // A weight that is only rounding must not meet s_i / s_j = e^500.
    const double y = i == j ? 1.0 : fabs(entry) <= floor ? 0.0 : entry * exp(log_s[i] - log_s[j]);
    entry = room.vector(kHeavy)[i] * y;
    z[i * pitch + j] = done[i] != 0 && entry != 0 ? entry * exp(log_s[j]) : 0.0;
  }
  team.sync();
  for (int n = rank; n < k * k; n += kThreads) {
    const int i = n / k, j = n % k;
    double sum = i == j ? exp(fmin(0.0, log_delta[i] - log_ridge)) : 0.0;
    for (int c = 0; c < k; ++c) sum += room.b[i * ld + c] * room.b[j * ld + c];
    room.a[i * ld + j] = sum;
  }
  team.sync();
}

// H = C C^T in a; b and z become C^-1 b and C^-1 z.
template <int K>
__device__ void solve(int k, int rank, const Room<K> room, double* z, int pitch) {
  constexpr int kThreads = Tile<K>::Team::kThreads, ld = kLd<K>;
  const typename Tile<K>::Team team{};
  double *root = room.vector(kRoot), *weight = room.vector(kWeight);
  for (int p = 0; p < k; ++p) {
    const double pivot = room.a[p * ld + p];
    if (rank == p) root[p] = sqrt(pivot);
    if (rank < k) weight[rank] = rank > p ? room.a[rank * ld + p] / pivot : 0.0;
    team.sync();
    for (int n = rank; n < k * k; n += kThreads) {
      const int i = n / k, j = n % k;
      if (i <= p) continue;
      if (j > p) room.a[i * ld + j] -= weight[i] * room.a[p * ld + j];
      room.b[i * ld + j] -= weight[i] * room.b[p * ld + j];
      z[i * pitch + j] -= weight[i] * z[p * pitch + j];
    }
    team.sync();
  }
  for (int n = rank; n < k * k; n += kThreads) {
    const int i = n / k, j = n % k;
    room.b[i * ld + j] /= root[i];
    z[i * pitch + j] /= root[i];
  }
  team.sync();
}

// Columns of b scaled to length 1, gains, and what the backward pass keeps of each row.
template <int K>
__device__ void unit_columns(const DppForward& call, const Span& span, int rank, const Room<K> room) {
  constexpr int ld = kLd<K>;
  const typename Tile<K>::Team team{};
  const int k = static_cast<int>(span.k);
  if (rank < k) {
    // Divided by the largest first: entries reach e^-500, whose squares leave the range.
    double top = 0, sum = 0;
    for (int i = 0; i < k; ++i) top = fmax(top, fabs(room.b[i * ld + rank]));
    for (int i = 0; i < k; ++i) {
      const double u = room.b[i * ld + rank] / top;
      sum += u * u;
    }
    const double length = sqrt(sum), log_length = log(top) + log(length), log_ridge = log(call.in.ridge);
    for (int i = 0; i < k; ++i) room.b[i * ld + rank] = room.b[i * ld + rank] / top / length;
    const double gain = log_ridge - 2 * log_length;
    room.vector(kGain)[rank] = gain;
    call.gains[span.start + rank] = static_cast<float>(gain);
    keep_row(call.kept, span.start + rank, exp(room.vector(kLogScale)[rank] - gain / 2), exp(2 * log_length),
             room.vector(kLength)[rank]);
  }
  team.sync();
}

// P and baselines from the unit columns u of b, then Q = U^T z / sqrt(ridge) over z.
template <int K>
__device__ void careful_results(const DppForward& call, const Span& span, int rank, const Room<K> room, double* z) {
  constexpr int kThreads = Tile<K>::Team::kThreads, ld = kLd<K>;
  const typename Tile<K>::Team team{};
  const int k = static_cast<int>(span.k), pitch = call.kept.pitch;
  const double* gain = room.vector(kGain);
  // P below the diagonal of a, log(1 - P^2) above.
  for (int n = rank; n < k * k; n += kThreads) {
    const int i = n / k, j = n % k;
    if (i <= j) continue;
    double p = 0, distance = 0;
    for (int c = 0; c < k; ++c) p += room.b[c * ld + i] * room.b[c * ld + j];
    // 1 - |p| = |u_i -+ u_j|^2 / 2 keeps its digits near 0.
    for (int c = 0; c < k; ++c) distance = hypot(distance, room.b[c * ld + i] - copysign(1.0, p) * room.b[c * ld + j]);
    room.a[i * ld + j] = p;
    room.a[j * ld + i] = 2 * log(distance) - log(2.0) + log1p(fabs(p));
  }
  team.sync();
  if (rank < k) {
    double sum = 0;
    for (int j = 0; j < k; ++j) sum += j == rank ? 0.0 : gain[j] - room.a[min(j, rank) * ld + max(j, rank)];
    call.baselines[span.start + rank] = k > 1 ? static_cast<float>(sum / (k - 1)) : NAN;
  }
  for (int n = rank; n < k * k; n += kThreads) {
    const int i = n / k, j = n % k;
    call.kept.p[(span.start + i) * pitch + j] = i == j ? 1.0 : room.a[max(i, j) * ld + min(i, j)];
  }
  team.sync();
  for (int n = rank; n < k * k; n += kThreads) {
    const int i = n / k, j = n % k;
    double sum = 0;
    for (int c = 0; c < k; ++c) sum += room.b[c * ld + i] * z[c * pitch + j];
    room.a[i * ld + j] = sum / sqrt(call.in.ridge);
  }
  team.sync();
  for (int n = rank; n < k * k; n += kThreads) z[n / k * pitch + n % k] = room.a[n / k * ld + n % k];
}

// From the inner products in a to every output of group g. Q's place in global memory serves as a third matrix
// meanwhile.
template <int K>
__device__ __noinline__ void careful(const DppForward& call, int64_t g, Span span, int rank, const Room<K> room) {
  const int k = static_cast<int>(span.k);
  const bool finite = cosines(call.in, span, rank, room);
  if (rank == 0) call.kept.careful[g] = 1;
  if (!finite) {
    if (rank < k) {
      call.gains[span.start + rank] = call.baselines[span.start + rank] = NAN;
      keep_row(call.kept, span.start + rank, NAN, NAN, NAN);
      for (int j = 0; j < k; ++j)
        call.kept.p[(span.start + rank) * call.kept.pitch + j] =
            call.kept.q[(span.start + rank) * call.kept.pitch + j] = NAN;
    }
    if (rank == 0) call.logdet[g] = NAN;
    return;
  }
  double* z = call.kept.q + span.start * call.kept.pitch;
  eliminate(k, rank, room);
  well_conditioned(call.in, k, rank, room, z, call.kept.pitch);
  solve(k, rank, room, z, call.kept.pitch);
  if (rank == 0) {
    double logdet = 0;
    for (int i = 0; i < k; ++i)
      logdet += 2 * log(room.vector(kRoot)[i]) + fmax(room.vector(kLogDelta)[i], log(call.in.ridge));
    call.logdet[g] = static_cast<float>(logdet);
  }
  unit_columns(call, span, rank, room);
  careful_results(call, span, rank, room, z);
}

}  // namespace qempo::cuda
