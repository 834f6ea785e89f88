// Policy gradient of Max@k: a rank and a sum of positive terms for each sample. Compiled once per instruction set.
#include <array>
#include <numeric>

#include "loss_math.h"

namespace qempo::cpu::QEMPO_ISA {
namespace {

// Up to here all pairs are compared, at once for each sample; beyond, a radix sort.
constexpr int64_t kCounted = 320;
// Groups of one size whose weights are computed side by side: a vector of doubles.
constexpr int kLanes = 8;
using Lanes = double __attribute__((vector_size(8 * kLanes)));

// Weights of one group of n, in the order of its samples; what it has written for n serves the next group of n.
struct Weights {
  int64_t k, n = -1;
  std::vector<double> below, key, value, sum;
  std::vector<uint64_t> bits;
  std::vector<int32_t> rank, sorted, other;

  // below_m, m = 1 .. n - 1: C(m, k - 1) / C(n - 1, k - 1), from 1 down by (m - k + 2) / (m + 1).
  void resize(int64_t size) {
    if (size == n) return;
    n = size;
    below.assign(n, 1.0);
    key.resize(n);
    value.resize(n);
    sum.resize(n);
    rank.resize(n);
    bits.resize(n);
    sorted.resize(n);
    other.resize(n);
    for (int64_t m = n - 2; m > 0; --m)
      below[m] = below[m + 1] * static_cast<double>(std::max<int64_t>(m - k + 2, 0)) / static_cast<double>(m + 1);
  }

  // rank_i: samples that come before i, by reward and then by place.
  void count() {
    const double* r = key.data();
    const int size = static_cast<int>(n);
    for (int i = 0; i < size; ++i) {
      int32_t before = 0;
      for (int j = 0; j < i; ++j) before += r[j] <= r[i];
      for (int j = i + 1; j < size; ++j) before += r[j] < r[i];
      rank[i] = before;
    }
  }

  // sorted, by the bytes of the keys from the last to the first. std::sort, whose branches nothing predicts, took twice
  // as long on 1024 random rewards.
  void radix() {
    constexpr uint64_t kSign = 1ull << 63;
    std::array<std::array<int32_t, 256>, 8> next{};
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t x = bits_as<uint64_t>(key[i]);
      bits[i] = x & kSign ? ~x : x | kSign;
      for (int byte = 0; byte < 8; ++byte) ++next[byte][bits[i] >> 8 * byte & 255];
    }
    std::iota(sorted.begin(), sorted.end(), 0);
    for (int byte = 0; byte < 8; ++byte) {
      auto& places = next[byte];
      // All keys have this byte in common, as those of floats have the last three.
      if (places[bits[0] >> 8 * byte & 255] == n) continue;
      int32_t before = 0;
      for (int32_t& place : places) {
        const int32_t count = place;
        place = before;
        before += count;
      }
      for (const int32_t i : sorted) other[places[bits[i] >> 8 * byte & 255]++] = i;
      sorted.swap(other);
    }
  }

  void order() {
    const double* r = key.data();
    if (n <= kCounted) {
      count();
    } else {
      radix();
      for (int64_t m = 0; m < n; ++m) rank[sorted[m]] = static_cast<int32_t>(m);
    }
    for (int64_t i = 0; i < n; ++i) value[rank[i]] = r[i];
  }

  // w_i = sum_{rank i}, sum_m = sum over j < m of below_{j + 1} (r_(j + 1) - r_(j)): terms above 0, so no digits
  // cancel.
  template <class A>
  void run(const A* r, double* w) {
    for (int64_t i = 0; i < n; ++i) key[i] = static_cast<double>(r[i]);
    order();
    sum[0] = 0;
    for (int64_t m = 1; m < n; ++m) sum[m] = sum[m - 1] + below[m] * (value[m] - value[m - 1]);
    for (int64_t i = 0; i < n; ++i) w[i] = sum[rank[i]];
  }
};

// Weights of kLanes groups of N at once, a group a lane. Ties need no rank: their differences are 0.
template <int N, class A>
void weights_of_lanes(const A* r, const double* below, double* w) {
  Lanes key[N], value[N];
  for (int i = 0; i < N; ++i)
    for (int l = 0; l < kLanes; ++l) key[i][l] = static_cast<double>(r[l * N + i]);
  std::copy_n(key, N, value);
  // Odd-even transposition: N rounds of neighbours.
  for (int round = 0; round < N; ++round)
    for (int i = round % 2; i + 1 < N; i += 2) {
      const Lanes a = value[i], b = value[i + 1];
      value[i] = a < b ? a : b;
      value[i + 1] = a < b ? b : a;
    }
  Lanes step[N];
  for (int m = 1; m < N; ++m) step[m] = below[m] * (value[m] - value[m - 1]);
  for (int i = 0; i < N; ++i) {
    Lanes sum = {};
    for (int m = 1; m < N; ++m) sum += value[m] <= key[i] ? step[m] : Lanes{};
    for (int l = 0; l < kLanes; ++l) w[l * N + i] = sum[l];
  }
}

template <class A>
using OfLanes = void (*)(const A*, const double*, double*);

// For the sizes of groups that have one, 512 groups of 8: 6 microseconds against 18 group by group.
template <class A>
OfLanes<A> of_lanes(int64_t n) {
  switch (n) {
    case 4: return weights_of_lanes<4, A>;
    case 8: return weights_of_lanes<8, A>;
    case 16: return weights_of_lanes<16, A>;
    default: return nullptr;
  }
}

}  // namespace

template <class A>
Status rspo_loss(const Risk<A>& in, int threads) {
  if (!in.groups.cover(in.samples, in.k) || !finite(in.samples, in.rewards)) return Status::bad_values;
  const double scale = static_cast<double>(in.k) * row_weight(Reduction::mean, in.samples);
  // A comparison costs more than what other losses do to a sample: twice the entries.
  auto body = [&](int64_t first, int64_t n, int64_t begin, int64_t end, double* w) {
    Weights weights{in.k, -1, {}, {}, {}, {}, {}, {}, {}, {}};
    int64_t g = begin;
    if (const OfLanes<A> lanes = in.groups.data ? nullptr : of_lanes<A>(in.groups.size)) {
      weights.resize(in.groups.size);
      for (; g + kLanes <= end; g += kLanes) {
        const int64_t start = in.groups.first(g);
        lanes(in.rewards + start, weights.below.data(), w + start - first);
      }
    }
    for (; g < end; ++g) {
      const int64_t start = in.groups.first(g);
      weights.resize(in.groups.length(g));
      weights.run(in.rewards + start, w + start - first);
    }
    return weighted(n, w, in.logps + first, scale, in.coef + first);
  };
  *in.value = static_cast<A>(over_groups(threads, in.groups, in.samples, 2 * in.samples, body) * scale);
  return Status::done;
}

template Status rspo_loss(const Risk<float>&, int);
template Status rspo_loss(const Risk<double>&, int);

}  // namespace qempo::cpu::QEMPO_ISA
