// Log-determinants, gains and baselines of groups of embeddings, and their gradients: with A = L + ridge I of a group,
// logdet = log det A, gain_i = logdet - log det A without i, baseline_i = mean over the others j of gain_j without i.
// Loops: csrc/cpu/dpp.cpp, csrc/cpu/common/dpp_careful.cpp; reference: qempo_fast/reference/dpp.py; derivations:
// docs/dpp.md.
#pragma once

#include <cstdint>

#include "qempo/cpu.h"

namespace qempo::cpu {

// Largest group: the k x k algebra of eight groups side by side then takes 256 KiB a matrix.
constexpr int64_t kDppLargest = 64;

struct DppGroups {
  const void* x;              // (rows, d), contiguous
  int64_t d, groups, k;       // k: rows of each group where offsets is null
  const int64_t* offsets;     // (groups + 1) first row of each group, or null
  const int64_t* matrices;    // (groups + 1) first entry of each group's k x k matrix in `inverse`, null with offsets
  const double* log_quality;  // (rows), or null for 0
  double ridge;
  bool normalize;

  int64_t first_row(int64_t g) const { return offsets ? offsets[g] : g * k; }
  int64_t size(int64_t g) const { return offsets ? offsets[g + 1] - offsets[g] : k; }
  int64_t matrix(int64_t g) const { return matrices ? matrices[g] : g * k * k; }
};

struct DppResults {
  double *logdet, *gains, *baselines;  // (groups), (rows), (rows)
  double* inverse;                     // A^-1 of each group, kept for the backward pass
  double* lengths;                     // (rows), kept for the backward pass
};

struct DppGrads {
  const double *logdet, *gains;     // (groups), (rows): incoming
  const double *inverse, *lengths;  // as the forward pass left them
  void* x;                          // (rows, d), in the embeddings' type
  double* log_quality;              // (rows)
};

using DppForward = void (*)(const DppGroups&, const DppResults&, int threads);
using DppBackward = void (*)(const DppGroups&, const DppGrads&, int threads);

// Greedy choice of n rows from each group into picks (groups, n).
using DppSelect = void (*)(const DppGroups&, int64_t n, int64_t* picks, int threads);

struct DppKernels {
  ByDtype<DppForward> forward;
  ByDtype<DppBackward> backward;
  ByDtype<DppSelect> select;
};

// One table per instruction set, each from its own compilation of cpu/dpp.cpp.
namespace baseline { const DppKernels& dpp_kernels(); }
namespace avx2 { const DppKernels& dpp_kernels(); }
namespace avx512 { const DppKernels& dpp_kernels(); }
const DppKernels& dpp_kernels();

// Squared sine (and weight) that rounding of the products leaves between dependent rows.
double dpp_noise(int64_t k);

// Groups with s^2 / ridge above 1e4 take these, the square-root factorisation of docs/dpp.md, in scalar double.
// cosines (k, k) with diagonal 1, or 0 for a zero row; log_s (k), -infinity for a zero row.
bool dpp_is_careful(int64_t k, const double* log_s, double ridge);
void dpp_careful_forward(int64_t k, const double* cosines, const double* log_s, double ridge, double* logdet,
                         double* gains, double* baselines);
// W (k, k): d X = W X for unit rows X and incoming gradients of logdet and gains.
void dpp_careful_backward(int64_t k, const double* cosines, const double* log_s, double ridge, double grad_logdet,
                          const double* grad_gains, double* w);

}  // namespace qempo::cpu
