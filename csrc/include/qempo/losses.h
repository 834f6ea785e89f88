// Losses of log-probs and their coefficients d loss / d log-prob, one pass each.
//
// Each struct says its loss, the file that has the loop, and the reference: the same loss in plain torch, which tests
// hold it to. s(h) is the logistic sigmoid, l a log-prob, f the reference model's; docs/losses.md derives the formulae.
#pragma once

#include <cstdint>

#include "qempo/cpu.h"
#include "qempo/segments.h"

namespace qempo::cpu {

// Tensors are dense and of one type A, float or double; arithmetic is double, or float where its rounding is the last.

// The words of Python's settings, in the order of the tables in qempo_fast/losses/cpu.py.
enum class Reduction { mean, sum, none };
enum class Baseline { none, mean, loo };
enum class Scale { none, std };
enum class Normalize { sequence, token, number };
enum class Surrogate { clip };

// What a kernel answers: everything written, or values that the loss does not take, found before anything is used.
enum class Status { done, bad_values };

// pair_loss: -(1 - e) log s(h) - e log s(-h),  h = alpha (l_chosen - l_rejected) - beta (f_chosen - f_rejected),
// e = label_smoothing. Loop: csrc/cpu/loss_pairs.cpp; reference: qempo_fast/reference/pairs.py.
template <class A>
struct Pairs {
  int64_t rows;
  const A *chosen, *rejected, *ref_chosen, *ref_rejected;  // (rows); the last two may be null
  double alpha, beta, label_smoothing;
  Reduction reduction;
  A *value, *coef_chosen, *coef_rejected;  // scalar or (rows); (rows)
};

// poft_loss: -log s(h),  h = beta l / length - beta mean over models of aligned + gamma.
// Loop: csrc/cpu/loss_contrastive.cpp; reference: qempo_fast/reference/contrastive.py.
template <class A>
struct Poft {
  int64_t rows, models;
  const A *logps, *lengths, *aligned;  // (rows), (rows), (rows, models)
  double beta, gamma;
  Reduction reduction;
  A *value, *coef;
};

// epa_loss: log(1 + sum_j e^(u_j - u_positive)),  u = beta (l - f), j over the strong and weak negatives.
// Loop: csrc/cpu/loss_contrastive.cpp; reference: qempo_fast/reference/contrastive.py.
template <class A>
struct Epa {
  int64_t rows, strong_count, weak_count;
  const A *positive, *strong, *weak, *ref_positive, *ref_strong, *ref_weak;  // (rows), (rows, count)
  double beta;
  Reduction reduction;
  A *value, *coef_positive, *coef_strong, *coef_weak;
};

// group_loss: -mean_i (S_i - b_i + bonus_i) l_i,  S_i = r_i - alpha l_i + beta f_i without gradient, b_i the baseline.
// variance_loss: mean over groups of sum_i d_i^2 / (2 (k - 1)),  d_i = alpha l_i - beta f_i - r_i less its group's
// mean. Loops: csrc/cpu/loss_groups.cpp; reference: qempo_fast/reference/groups.py.
template <class A>
struct Groups {
  Segments groups;
  int64_t samples, at_least;
  const A *logps, *ref_logps, *rewards, *bonus;  // (samples); ref_logps and bonus may be null
  double alpha, beta;
  Baseline baseline;
  A *value, *coef;  // scalar, (samples)
};

// group_advantages: (r_i - b_i) / (std + epsilon), std with k - 1; or r_i - b_i for Scale::none.
// Loop: csrc/cpu/loss_groups.cpp; reference: qempo_fast/reference/groups.py.
template <class A>
struct Advantages {
  Segments groups;
  int64_t samples;
  const A* rewards;
  Scale scale;
  double epsilon;  // added to the standard deviation
  Baseline baseline;
  A* out;
};

// rspo_loss: -mean_i k w_i l_i,  w_i = mean over (k - 1)-subsets T of the group's others of max(r_i - max_T r, 0).
// Loop: csrc/cpu/loss_risk.cpp; reference: qempo_fast/reference/risk.py.
template <class A>
struct Risk {
  Segments groups;
  int64_t samples, k;
  const A *logps, *rewards;
  A *value, *coef;
};

// token_loss: sum_it norm_i (surrogate(rho, A_i) + kl (e^d - d - 1)),  rho = e^(l - old) of the token, or of the
// sequence's means; d = f - l; norm as normalize says; clip: -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A).
// Loop and surrogates: csrc/cpu/loss_tokens.cpp; reference: qempo_fast/reference/tokens.py.
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
  Surrogate surrogate;
  A *value, *coef;
};

template <class A>
struct LossKernels {
  Status (*pair_loss)(const Pairs<A>&, int threads);
  Status (*poft_loss)(const Poft<A>&, int threads);
  Status (*epa_loss)(const Epa<A>&, int threads);
  Status (*group_loss)(const Groups<A>&, int threads);
  Status (*variance_loss)(const Groups<A>&, int threads);
  Status (*group_advantages)(const Advantages<A>&, int threads);
  Status (*rspo_loss)(const Risk<A>&, int threads);
  Status (*token_loss)(const Tokens<A>&, int threads);
};

// One table per instruction set, each from its own compilation of csrc/cpu/losses.cpp.
namespace baseline {
template <class A>
const LossKernels<A>& loss_kernels();
}
namespace avx2 {
template <class A>
const LossKernels<A>& loss_kernels();
}
namespace avx512 {
template <class A>
const LossKernels<A>& loss_kernels();
}
template <class A>
const LossKernels<A>& loss_kernels();

}  // namespace qempo::cpu
