#include "qempo/logps.h"

#include <algorithm>
#include <cmath>

namespace qempo::cpu {
namespace {

// splitmix64: a bijection of its state whose output passes for 64 independent bits.
uint64_t mix(uint64_t seed, uint64_t counter) {
  uint64_t x = seed + (counter + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

double uniform(uint64_t key, uint64_t counter) { return static_cast<double>(mix(key, counter) >> 11) * 0x1p-53; }

}  // namespace

const LogpsKernels& logps_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::logps_kernels();
  if (isa() == Isa::avx2) return avx2::logps_kernels();
#endif
  return baseline::logps_kernels();
}

template <class A>
int64_t select_columns(const A* statistic, int64_t copies, int64_t vocabulary, double tau, double entropy,
                       const uint8_t* forced, uint64_t seed, int64_t chunk, int64_t first_column, int64_t* kept,
                       A* inverse) {
  int64_t count = 0;
  const uint64_t key = mix(seed, static_cast<uint64_t>(chunk));
  for (int64_t j = 0; j < vocabulary; ++j) {
    double log_u = statistic[j];
    for (int64_t c = 1; c < copies; ++c) log_u = std::max<double>(log_u, statistic[c * vocabulary + j]);
    double u = std::exp(log_u);
    // x (1 - log x) rises on (0, 1]: the column's largest softmax bound also bounds its entropy gradient.
    if (entropy >= 0) u = u > 0 ? std::min(u, 1.0) * (1 - std::min(log_u, 0.0) + entropy) : 0;
    // A NaN bound keeps its column, so that a NaN logit shows in the gradient.
    const double q = forced[j] || !(u < tau) ? 1.0 : u / tau;
    if (q < 1 && !(uniform(key, static_cast<uint64_t>(first_column + j)) < q)) continue;
    kept[count] = j;
    inverse[count++] = static_cast<A>(1 / q);
  }
  return count;
}

template int64_t select_columns<float>(const float*, int64_t, int64_t, double, double, const uint8_t*, uint64_t,
                                       int64_t, int64_t, int64_t*, float*);
template int64_t select_columns<double>(const double*, int64_t, int64_t, double, double, const uint8_t*, uint64_t,
                                        int64_t, int64_t, int64_t*, double*);

}  // namespace qempo::cpu
