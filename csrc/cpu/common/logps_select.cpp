// The columns that a sampled backward pass keeps. Formulae: docs/linear_logps.md.
#include "qempo/logps.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace qempo::cpu {
namespace {

// splitmix64: a bijection of its state whose output passes for 64 independent bits.
uint64_t mix(uint64_t seed, uint64_t counter) {
  uint64_t x = seed + (counter + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// 2^ceil(x / log 2) >= exp(x) for x < 0, the power made from its exponent bits.
double above_exp(double x) {
  const double power = std::max(x * 1.4426950408889634, -1021.0);
  const int64_t bits = (1023 + static_cast<int64_t>(power)) << 52;
  double out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// exp(x) for x < 0 to 6% above: the power's fraction as the mantissa. Exact enough to count columns.
double about_exp(double x) {
  const double power = std::max(x * 1.4426950408889634, -1021.0);
  const int64_t bits = static_cast<int64_t>((1023.0 + power) * 0x1p52);
  double out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

double uniform(uint64_t key, uint64_t counter) { return static_cast<double>(mix(key, counter) >> 11) * 0x1p-53; }

}  // namespace

template <class A>
std::pair<int64_t, double> select_columns(const A* statistic, int64_t copies, int64_t vocabulary, double tau,
                                          double entropy, const uint8_t* forced, uint64_t seed, int64_t chunk,
                                          int64_t first_column, int64_t* kept, A* inverse, int threads) {
  const uint64_t key = mix(seed, static_cast<uint64_t>(chunk));
  struct Found {
    int64_t begin, count;
    uint64_t expected;  // in units of 2^-32: the sum is the same for any number of threads
    bool broken;        // a bound is NaN
  };
  std::vector<Found> found(std::max(threads, 1));
  auto part = [&](int thread, int64_t begin, int64_t end) {
    int64_t count = begin;
    uint64_t expected = 0;
    bool broken = false;
    for (int64_t j = begin; j < end; ++j) {
      double log_u = statistic[j];
      for (int64_t c = 1; c < copies; ++c) {
        const double other = statistic[c * vocabulary + j];
        if (!(other <= log_u) && log_u == log_u) log_u = other;  // NaN stays
      }
      broken |= log_u != log_u;
      const double draw = uniform(key, static_cast<uint64_t>(first_column + j));
      // Nine columns in ten end here: exp took most of the time.
      if (entropy < 0 && !forced[j] && log_u < 0 && draw * tau >= above_exp(log_u)) {
        expected += static_cast<uint64_t>(std::min(about_exp(log_u) / tau, 1.0) * 0x1p32);
        continue;
      }
      double u = std::exp(log_u);
      // x (1 - log x) rises on (0, 1]: the column's largest softmax bound also bounds its entropy gradient.
      if (entropy >= 0) u = u > 0 ? std::min(u, 1.0) * (1 - std::min(log_u, 0.0) + entropy) : u;
      // A NaN bound keeps its column, so that a NaN logit shows in the gradient.
      const double q = forced[j] || !(u < tau) ? 1.0 : u / tau;
      expected += static_cast<uint64_t>(q * 0x1p32);
      if (q < 1 && !(draw < q)) continue;
      kept[count] = j;
      inverse[count++] = static_cast<A>(1 / q);
    }
    found[thread] = {begin, count - begin, expected, broken};
  };
  parallel(threads, vocabulary, part);
  int64_t total = 0;
  uint64_t expected = 0;
  bool broken = false;
  for (const auto& [begin, count, part_expected, part_broken] : found) {
    expected += part_expected;
    broken |= part_broken;
    if (total < begin) {
      std::copy(kept + begin, kept + begin + count, kept + total);
      std::copy(inverse + begin, inverse + begin + count, inverse + total);
    }
    total += count;
  }
  // More than any share of the vocabulary: a row of NaN has a gradient of NaN in every column.
  if (broken) return {total, std::numeric_limits<double>::infinity()};
  return {total, static_cast<double>(expected) * 0x1p-32};
}

template std::pair<int64_t, double> select_columns<float>(const float*, int64_t, int64_t, double, double,
                                                          const uint8_t*, uint64_t, int64_t, int64_t, int64_t*, float*,
                                                          int);
template std::pair<int64_t, double> select_columns<double>(const double*, int64_t, int64_t, double, double,
                                                           const uint8_t*, uint64_t, int64_t, int64_t, int64_t*,
                                                           double*, int);

}  // namespace qempo::cpu
