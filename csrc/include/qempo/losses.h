// Losses of log-probs and their coefficients d loss / d log-prob, one pass each. Formulae: docs/losses.md.
#pragma once

#include <cstdint>

#include "qempo/cpu.h"

namespace qempo::cpu {

// Tensors are dense and of one type A, float or double; arithmetic is double, or float where its rounding is the last.
enum class Reduction { mean, sum, none };
enum class Baseline { none, mean, loo };

// What a kernel answers: everything written, or values that the loss does not take, found before anything is used.
enum class Status { done, bad_values };

// (n + 1) first entries of consecutive segments, int32 or int64; or segments of one size where data is null.
struct Segments {
  const void* data;
  bool wide;
  int64_t count, size;

  int64_t first(int64_t i) const {
    if (!data) return i * size;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  int64_t length(int64_t i) const { return first(i + 1) - first(i); }
  // Whether they cover [0, total) and each has at_least entries.
  bool cover(int64_t total, int64_t at_least) const;
};

template <class A>
struct Pairs {
  int64_t rows;
  const A *chosen, *rejected, *ref_chosen, *ref_rejected;  // (rows); the last two may be null
  double alpha, beta, label_smoothing;
  Reduction reduction;
  A *value, *coef_chosen, *coef_rejected;  // scalar or (rows); (rows)
};

template <class A>
struct Poft {
  int64_t rows, models;
  const A *logps, *lengths, *aligned;  // (rows), (rows), (rows, models)
  double beta, gamma;
  Reduction reduction;
  A *value, *coef;
};

template <class A>
struct Epa {
  int64_t rows, strong_count, weak_count;
  const A *positive, *strong, *weak, *ref_positive, *ref_strong, *ref_weak;  // (rows), (rows, count)
  double beta;
  Reduction reduction;
  A *value, *coef_positive, *coef_strong, *coef_weak;
};

template <class A>
struct Groups {
  Segments groups;
  int64_t samples, at_least;
  const A *logps, *ref_logps, *rewards, *bonus;  // (samples); ref_logps and bonus may be null
  double alpha, beta;
  Baseline baseline;
  A *value, *coef;  // scalar, (samples)
};

template <class A>
struct Risk {
  Segments groups;
  int64_t samples, k;
  const A *logps, *rewards;
  A *value, *coef;
};

template <class A>
struct Advantages {
  Segments groups;
  int64_t samples;
  const A* rewards;
  bool standardize;
  double epsilon;  // added to the standard deviation
  Baseline baseline;
  A* out;
};

enum class Normalize { sequence, token, number };

template <class A>
struct Tokens {
  Segments sequences;
  int64_t tokens;
  const A *logps, *old, *ref;  // (tokens); ref may be null
  const A* advantages;         // (sequences)
  double kl, eps_low, eps_high;
  bool sequence_ratio;
  Normalize normalize;
  double limit;  // of Normalize::number
  A *value, *coef;
};

template <class A>
struct LossKernels {
  Status (*pairs)(const Pairs<A>&, int threads);
  Status (*poft)(const Poft<A>&, int threads);
  Status (*epa)(const Epa<A>&, int threads);
  Status (*groups)(const Groups<A>&, int threads);
  Status (*variance)(const Groups<A>&, int threads);
  Status (*advantages)(const Advantages<A>&, int threads);
  Status (*risk)(const Risk<A>&, int threads);
  Status (*tokens)(const Tokens<A>&, int threads);
};

// Entries of one instruction set, each family from its own file; common/losses.cpp makes the tables.
#define QEMPO_LOSSES(isa)                       \
  namespace isa {                               \
  template <class A>                            \
  Status pairs_loss(const Pairs<A>&, int);      \
  template <class A>                            \
  Status poft_loss(const Poft<A>&, int);        \
  template <class A>                            \
  Status epa_loss(const Epa<A>&, int);          \
  template <class A>                            \
  Status group_loss(const Groups<A>&, int);     \
  template <class A>                            \
  Status variance_loss(const Groups<A>&, int);  \
  template <class A>                            \
  Status advantages(const Advantages<A>&, int); \
  template <class A>                            \
  Status risk_loss(const Risk<A>&, int);        \
  template <class A>                            \
  Status token_loss(const Tokens<A>&, int);     \
  }
QEMPO_LOSSES(baseline)
QEMPO_LOSSES(avx2)
QEMPO_LOSSES(avx512)
#undef QEMPO_LOSSES

template <class A>
const LossKernels<A>& loss_kernels();

}  // namespace qempo::cpu
