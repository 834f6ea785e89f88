// Losses and advantages whose samples are compared within their group. Compiled once per instruction set.
#include <cmath>

#include "loss_math.h"

namespace qempo::cpu::QEMPO_ISA {
namespace {

double mean_of(int64_t n, const double* x) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total / static_cast<double>(n);
}

// x less the group's mean, or less the mean of the others, which is n / (n - 1) times as far.
void centre(int64_t n, Baseline baseline, double* x) {
  if (baseline == Baseline::none) return;
  const double mean = mean_of(n, x), size = static_cast<double>(n);
  const double scale = baseline == Baseline::loo ? size / (size - 1) : 1.0;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * scale;
}

// The same for `count` groups of K, in registers.
template <int K>
void centre_each(int64_t count, Baseline baseline, double* x) {
  if (baseline == Baseline::none) return;
  const double scale = baseline == Baseline::loo ? K / (K - 1.0) : 1.0;
  for (int64_t g = 0; g < count; ++g, x += K) {
    double sum[K];
    for (int i = 0; i < K; ++i) sum[i] = x[i];
    for (int width = K / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
    const double mean = sum[0] / K;
    for (int i = 0; i < K; ++i) x[i] = (x[i] - mean) * scale;
  }
}

void centre_groups(const Segments& groups, int64_t begin, int64_t end, Baseline baseline, double* x) {
  if (!groups.data) switch (groups.size) {
      case 2: return centre_each<2>(end - begin, baseline, x);
      case 4: return centre_each<4>(end - begin, baseline, x);
      case 8: return centre_each<8>(end - begin, baseline, x);
      case 16: return centre_each<16>(end - begin, baseline, x);
    }
  const int64_t start = groups.first(begin);
  for (int64_t g = begin; g < end; ++g) centre(groups.length(g), baseline, x + groups.first(g) - start);
}

// Standard deviation, with n - 1, of n numbers whose mean is 0 and whose squares overflow, as those of 1e154 do: as
// infinity it made every advantage 0.
double deviation_of_large(int64_t n, const double* x) {
  double squares = 0, top = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, std::abs(x[i]));
  for (int64_t i = 0; i < n; ++i) squares += (x[i] / top) * (x[i] / top);
  return top * std::sqrt(squares / static_cast<double>(n - 1));
}

template <class A>
bool valid(const Groups<A>& in) {
  return in.groups.cover(in.samples, in.at_least) && finite(in.samples, in.rewards);
}

// r - alpha l + beta f; an infinite log-prob counts where it has a weight.
template <class A>
void shaped(const Groups<A>& in, int64_t first, int64_t n, double* x) {
  const A* r = in.rewards + first;
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<double>(r[i]);
  if (in.alpha != 0)
    for (int64_t i = 0; i < n; ++i) x[i] -= in.alpha * static_cast<double>(in.logps[first + i]);
  if (in.ref_logps && in.beta != 0)
    for (int64_t i = 0; i < n; ++i) x[i] += in.beta * static_cast<double>(in.ref_logps[first + i]);
}

}  // namespace

template <class A>
Status group_loss(const Groups<A>& in, int threads) {
  if (!valid(in)) return Status::bad_values;
  const double weight = row_weight(Reduction::mean, in.samples);
  auto body = [&](int64_t first, int64_t n, int64_t begin, int64_t end, double* x) {
    shaped(in, first, n, x);
    centre_groups(in.groups, begin, end, in.baseline, x);
    if (in.bonus)
      for (int64_t i = 0; i < n; ++i) x[i] += static_cast<double>(in.bonus[first + i]);
    return weighted(n, x, in.logps + first, weight, in.coef + first);
  };
  *in.value = static_cast<A>(over_groups(threads, in.groups, in.samples, in.samples, body) * weight);
  return Status::done;
}

template <class A>
Status variance_loss(const Groups<A>& in, int threads) {
  if (!valid(in)) return Status::bad_values;
  const double weight = row_weight(Reduction::mean, in.groups.count);
  // x is minus the residual alpha l - beta f - r.
  auto body = [&](int64_t first, int64_t n, int64_t begin, int64_t end, double* x) {
    shaped(in, first, n, x);
    centre_groups(in.groups, begin, end, Baseline::mean, x);
    double total = 0;
    if (!in.groups.data) {
      const double scale = weight / static_cast<double>(in.groups.size - 1);
      A* coef = in.coef + first;
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) {
        total += x[i] * x[i];
        coef[i] = static_cast<A>(-in.alpha * scale * x[i]);
      }
      return total * scale / 2;
    }
    for (int64_t g = begin; g < end; ++g) {
      const int64_t start = in.groups.first(g), k = in.groups.length(g);
      const double scale = weight / static_cast<double>(k - 1), *of = x + start - first;
      A* coef = in.coef + start;
      double squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < k; ++i) {
        squares += of[i] * of[i];
        coef[i] = static_cast<A>(-in.alpha * scale * of[i]);
      }
      total += squares * scale / 2;
    }
    return total;
  };
  *in.value = static_cast<A>(over_groups(threads, in.groups, in.samples, in.samples, body));
  return Status::done;
}

template <class A>
Status group_advantages(const Advantages<A>& in, int threads) {
  if (!in.groups.cover(in.samples, 2) || !finite(in.samples, in.rewards)) return Status::bad_values;
  over_groups(threads, in.groups, in.samples, in.samples,
              [&](int64_t first, int64_t n, int64_t begin, int64_t end, double* x) {
                const A* r = in.rewards + first;
                for (int64_t i = 0; i < n; ++i) x[i] = static_cast<double>(r[i]);
                centre_groups(in.groups, begin, end, Baseline::mean, x);
                for (int64_t g = begin; g < end; ++g) {
                  const int64_t start = in.groups.first(g), k = in.groups.length(g);
                  const double size = static_cast<double>(k), *of = x + start - first;
                  double squares = 0;
#pragma omp simd reduction(+ : squares)
                  for (int64_t i = 0; i < k; ++i) squares += of[i] * of[i];
                  double deviation = std::sqrt(squares / (size - 1));
                  if (deviation > std::numeric_limits<double>::max()) deviation = deviation_of_large(k, of);
                  double scale = in.baseline == Baseline::loo ? size / (size - 1) : 1.0;
                  switch (in.scale) {
                    case Scale::none: break;
                    case Scale::std: scale /= deviation + in.epsilon;
                  }
                  for (int64_t i = 0; i < k; ++i) in.out[start + i] = static_cast<A>(of[i] * scale);
                }
                return 0.0;
              });
  return Status::done;
}

template Status group_loss(const Groups<float>&, int);
template Status group_loss(const Groups<double>&, int);
template Status variance_loss(const Groups<float>&, int);
template Status variance_loss(const Groups<double>&, int);
template Status group_advantages(const Advantages<float>&, int);
template Status group_advantages(const Advantages<double>&, int);

}  // namespace qempo::cpu::QEMPO_ISA
