// Surrogates of importance ratios over packed tokens: GRPO, Dr.GRPO, DAPO and GSPO. Compiled once per instruction set.
#include "loss_math.h"

namespace qempo::cpu::QEMPO_ISA {
namespace {

// The k3 estimate of a KL, e^d - d - 1, and its slope by d, e^d - 1.
template <class A>
struct K3 {
  A loss, slope;
};

// near is d^2 times the Taylor series of (e^d - d - 1) / d^2, for below 1/2, where the formulae as written cancel. The
// slope is formed from e^d and never from the loss, whose d is all that is left of it beyond 2^24.
template <class A>
inline K3<A> k3_of(A d, A e, A near) {
  const bool small = d > A(-0.5) && d < A(0.5);
  // At infinity, infinity less infinity; e is infinite long before.
  const A less = d < A(1e4) ? d : A(1e4);
  return {small ? near : e - less - A(1), small ? near + d : e - A(1)};
}
// Next term 7e-17 of the series, or 2e-9 for float.
inline K3<double> k3(double d, double) {
  double p = 1.0 / 355687428096000;
  p = p * d + 1.0 / 20922789888000;
  p = p * d + 1.0 / 1307674368000;
  p = p * d + 1.0 / 87178291200;
  p = p * d + 1.0 / 6227020800;
  p = p * d + 1.0 / 479001600;
  p = p * d + 1.0 / 39916800;
  p = p * d + 1.0 / 3628800;
  p = p * d + 1.0 / 362880;
  p = p * d + 1.0 / 40320;
  p = p * d + 1.0 / 5040;
  p = p * d + 1.0 / 720;
  p = p * d + 1.0 / 120;
  p = p * d + 1.0 / 24;
  p = p * d + 1.0 / 6;
  p = p * d + 0.5;
  return k3_of(d, exp_as(d, 0.0), d * d * p);
}
inline K3<float> k3(double x, float) {
  const float d = static_cast<float>(x);
  float p = 1.f / 3628800;
  p = p * d + 1.f / 362880;
  p = p * d + 1.f / 40320;
  p = p * d + 1.f / 5040;
  p = p * d + 1.f / 720;
  p = p * d + 1.f / 120;
  p = p * d + 1.f / 24;
  p = p * d + 1.f / 6;
  p = p * d + 0.5f;
  return k3_of(d, exp_as(x, 0.f), d * d * p);
}

// A surrogate is the loss of one ratio, given with its logarithm, and the slope, its derivative by that logarithm.

// min(rho A, clip(rho) A) with its sign changed; the slope is 0 where clipped.
template <class A>
struct Clip {
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();
  A low, high;

  // An infinite bound would leave an infinite ratio to an advantage of 0.
  explicit Clip(const Tokens<A>& in)
      : low(static_cast<A>(1 - in.eps_low)),
        high(static_cast<A>(std::min(1 + in.eps_high, static_cast<double>(std::numeric_limits<A>::max())))) {}
  A upper(A advantage) const { return advantage >= A(0) ? high : kInfinity; }
  A lower(A advantage) const { return advantage <= A(0) ? low : -kInfinity; }
  A loss(A, A ratio, A advantage) const {
    const A cut = ratio > upper(advantage) ? upper(advantage) : ratio;
    return -advantage * (cut < lower(advantage) ? lower(advantage) : cut);
  }
  A slope(A, A ratio, A advantage) const {
    const A live = ratio > upper(advantage) ? A(0) : -advantage * ratio;
    return ratio < lower(advantage) ? A(0) : live;
  }
};

// What each token of a block has from its sequence.
template <class A>
struct Expanded {
  A advantage[kBlock], loss[kBlock], slope[kBlock];
  double norm[kBlock];
};

template <class A>
double norm_of(const Tokens<A>& in, int64_t length) {
  const double count = static_cast<double>(std::max<int64_t>(in.sequences.count, 1));
  switch (in.normalize) {
    case Normalize::sequence: return 1.0 / (count * static_cast<double>(length));
    case Normalize::token: return 1.0 / static_cast<double>(std::max<int64_t>(in.tokens, 1));
    default: return 1.0 / (count * in.limit);
  }
}

// Last sequence that begins at or before token t.
int64_t sequence_at(const Segments& sequences, int64_t t) {
  int64_t low = 0, high = sequences.count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (sequences.first(middle) <= t ? low : high) = middle;
  }
  return low;
}

template <class A>
void expand(const Tokens<A>& in, int64_t begin, int64_t end, const A* loss, const A* slope, Expanded<A>& out) {
  for (int64_t s = sequence_at(in.sequences, begin), t = begin; t < end; ++s) {
    const int64_t stop = std::min(in.sequences.first(s + 1), end), from = t - begin, to = stop - begin;
    if (stop <= t) continue;
    std::fill(out.norm + from, out.norm + to, norm_of(in, in.sequences.length(s)));
    if (loss) {
      std::fill(out.loss + from, out.loss + to, loss[s]);
      std::fill(out.slope + from, out.slope + to, slope[s]);
    } else {
      std::fill(out.advantage + from, out.advantage + to, in.advantages[s]);
    }
    t = stop;
  }
}

// Loss and slope of whole sequences, whose ratio is that of their mean log-prob.
template <class S, class A>
void per_sequence(const Tokens<A>& in, A* loss, A* slope, int threads) {
  sum_of_blocks(threads, in.sequences.count, kBlock, in.tokens, [&](int64_t begin, int64_t end) {
    const S surrogate(in);
    double mean[kBlock];
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = in.sequences.first(s), n = in.sequences.length(s);
      const A *logps = in.logps + first, *old = in.old + first;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t t = 0; t < n; ++t) sum += static_cast<double>(logps[t]) - static_cast<double>(old[t]);
      mean[s - begin] = sum / static_cast<double>(std::max<int64_t>(n, 1));
    }
    const A* advantages = in.advantages + begin;
#pragma omp simd
    for (int64_t i = 0; i < end - begin; ++i) {
      const A x = static_cast<A>(mean[i]), ratio = exp_as(mean[i], A(0));
      loss[begin + i] = surrogate.loss(x, ratio, advantages[i]);
      slope[begin + i] = surrogate.slope(x, ratio, advantages[i]);
    }
    return 0.0;
  });
}

template <class S, class A>
Status loss_by(const Tokens<A>& in, int threads) {
  if (!in.sequences.cover(in.tokens, 0) || !finite(in.sequences.count, in.advantages)) return Status::bad_values;
  std::vector<A> loss_of, slope_of;
  if (in.sequence_ratio) {
    loss_of.resize(in.sequences.count);
    slope_of.resize(in.sequences.count);
    per_sequence<S>(in, loss_of.data(), slope_of.data(), threads);
  }
  const double total = sum_of_blocks(threads, in.tokens, kBlock, in.tokens, [&](int64_t begin, int64_t end) {
    Expanded<A> of;
    expand(in, begin, end, in.sequence_ratio ? loss_of.data() : nullptr, slope_of.data(), of);
    const int64_t n = end - begin;
    const A *logps = in.logps + begin, *old = in.old + begin;
    A* coef = in.coef + begin;
    if (!in.sequence_ratio) {
      // Made here: through a reference of the lambda the loop would not vectorise.
      const S surrogate(in);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const double x = static_cast<double>(logps[i]) - static_cast<double>(old[i]);
        const A ratio = exp_as(x, A(0));
        of.loss[i] = surrogate.loss(static_cast<A>(x), ratio, of.advantage[i]);
        of.slope[i] = surrogate.slope(static_cast<A>(x), ratio, of.advantage[i]);
      }
    }
    if (in.ref && in.kl > 0) {
      const A* ref = in.ref + begin;
      // Within A's numbers: rounded to 0 or to infinity, it would make NaN of an infinite penalty or of none.
      const A kl = static_cast<A>(
          std::clamp<double>(in.kl, std::numeric_limits<A>::denorm_min(), std::numeric_limits<A>::max()));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const double d = static_cast<double>(ref[i]) - static_cast<double>(logps[i]);
        const K3<A> penalty = k3(d, A(0));
        of.loss[i] += kl * penalty.loss;
        of.slope[i] -= kl * penalty.slope;
      }
    }
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      sum += of.norm[i] * static_cast<double>(of.loss[i]);
      coef[i] = static_cast<A>(of.norm[i] * static_cast<double>(of.slope[i]));
    }
    return sum;
  });
  *in.value = static_cast<A>(total);
  return Status::done;
}

}  // namespace

template <class A>
Status token_loss(const Tokens<A>& in, int threads) {
  switch (in.surrogate) {
    case Surrogate::clip: return loss_by<Clip<A>>(in, threads);
  }
  return Status::bad_values;
}

template Status token_loss(const Tokens<float>&, int);
template Status token_loss(const Tokens<double>&, int);

}  // namespace qempo::cpu::QEMPO_ISA
