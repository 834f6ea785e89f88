// Greedy choice of diverse rows by incremental Cholesky: with c_i the row of i in the factor of the chosen rows, the
// gain of i is log(ridge + s_i^2 v_i), v_i = 1 - |c_i|^2. One barrier a step. Formulae: docs/dpp.md.
#pragma once

#include "dpp_careful.cuh"

namespace qempo::cuda {

// Gains closer than this are a tie, which the lowest index wins.
constexpr double kTie = 1e-10;

// Cosines in a, qualities in kLogScale; b receives the factor, a line each step.
template <int K>
__device__ void greedy(const DppSelect& call, int64_t g, int k, typename Tile<K>::Team team, const Room<K> room) {
  constexpr int ld = kLd<K>;
  const int own = team.rank;
  const double* log_s = room.vector(kLogScale);
  const double floor = dependence_floor(k), log_ridge = log(call.in.ridge);
  double v = own < k ? room.a[own * ld + own] : 0.0;
  bool taken = false;
  for (int step = 0; step < call.n; ++step) {
    // Two buffers: a slow thread may still read those of the step before.
    double *gain = room.vector(step % 2 ? kColumnToo : kColumn), *weight = room.vector(step % 2 ? kDiagonal : kGain);
    if (own < k) {
      const double signal = v > floor ? 2 * log_s[own] + log(v) : -INFINITY;
      // s / sqrt(ridge + s^2 v), not by way of the gain: rounding of a gain near 500 would leave a repetition 1e-13.
      weight[own] = v > floor ? 1 / sqrt(v + exp(log_ridge - 2 * log_s[own])) : 0.0;
      gain[own] = taken ? -INFINITY : fmax(signal, log_ridge) + log1p(exp(-fabs(signal - log_ridge)));
    }
    team.sync();
    double best = -INFINITY;
    for (int i = 0; i < k; ++i) best = fmax(best, gain[i]);
    int p = 0;
    while (gain[p] < best - kTie) ++p;
    if (own == 0) call.picks[g * call.n + step] = p;
    taken = taken || own == p;
    if (own < k) {
      double column = room.a[p * ld + own];
      for (int u = 0; u < step; ++u) column -= room.b[u * ld + p] * room.b[u * ld + own];
      const double c = column * weight[p];
      room.b[step * ld + own] = c;
      v -= c * c;
    }
  }
}

}  // namespace qempo::cuda
