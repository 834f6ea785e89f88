// The fused row and column pass of the CPU log-probs: one read of a tile of logits forward, one in place backward.
// Loops: csrc/cpu/logps.cpp; reference: qempo_fast/reference/logps.py; derivations: docs/linear_logps.md.
#pragma once

#include <cstdint>
#include <utility>

#include "qempo/cpu.h"

namespace qempo::cpu {

// A (n, c) tile of raw head outputs hidden @ weight.T, rows ld apart, whose first column is v0 of the vocabulary; or n
// ragged rows, row i of which has the entries offsets[i] to offsets[i + 1] of z, at most c.
struct Tile {
  void* z;
  int64_t ld, n, c, v0;
  const int64_t* offsets = nullptr;
  int64_t begin(int64_t i) const { return offsets ? offsets[i] : i * ld; }
  int64_t width(int64_t i) const { return offsets ? offsets[i + 1] - offsets[i] : c; }
};

// z = softcap * tanh(scale * (raw + bias) / softcap) * inv_temperature. A is float, or double for f64 tiles.
template <class A>
struct Head {
  const A* bias;             // (c) or null
  const A* inv_temperature;  // (n) or null for 1
  A scale, softcap;          // softcap 0: none
  bool identity() const { return !bias && !inv_temperature && scale == A(1) && softcap == A(0); }
};

// Running statistics of each row, (n) each; entropy and sum_sq parts may be null.
template <class A>
struct RowStats {
  A* max;           // largest logit so far; NaN counts nowhere here and makes every sum NaN
  A* sum;           // sum exp(z - max)
  A* sum_z;         // sum (z - max) exp(z - max), or null
  A* sum_sq;        // sum exp(2 (z - max)), or null
  A* target;        // logit of the target, written in the tile that holds it
  const A* floor_;  // lower bound on the row's log-sum-exp known beforehand (its target logit), or null
};

// Column statistic (threads, V): max over rows of z - max(running log-sum-exp, floor), or null.
template <class A>
using LogpsForward = void (*)(const Tile&, const Head<A>&, const int64_t* targets, const RowStats<A>&, A* columns,
                              int64_t vocabulary, int threads);

template <class A>
struct RowGrads {
  const A* lse;           // (n, 2) max z and log sum exp(z - max): their rounded sum loses the digits of the second
  const A* grad;          // (n) dloss / dlogp
  const A* grad_h;        // (n) dloss / dentropy, or null
  const A* entropy;       // (n), or null with grad_h
  const A* inverse;       // (c) 1 / keep probability of each column, or null for 1
  const int64_t* target;  // (n) column of the target within the tile; any other value: not here
  A* row_sum;             // (n) sum of dloss / draw as stored over the tile's columns, or null
};

// In place: raw outputs become dloss / draw.
template <class A>
using LogpsBackward = void (*)(const Tile&, const Head<A>&, const RowGrads<A>&, int threads);

struct LogpsKernels {
  ByDtype<LogpsForward<float>, LogpsForward<double>> forward;
  ByDtype<LogpsBackward<float>, LogpsBackward<double>> backward;
};

// Products of a head with the tokens that each of n rows keeps: row i has ids[offsets[i]] to ids[offsets[i + 1]] out of
// [0, v). hidden (n, d) and weight (v, d) are dense. Loops: csrc/cpu/support.cpp; docs/support.md.
struct KeptTokens {
  const int64_t *ids, *offsets;
  int64_t n, d, v;
};

// z (m) = hidden[row] . weight[id] of every entry.
template <class A>
using KeptDots = void (*)(const KeptTokens&, const void* hidden, const void* weight, A* z, int threads);
// out (n, d) = the sum over each row's entries of dz weight[id].
template <class A>
using KeptToHidden = void (*)(const KeptTokens&, const A* dz, const void* weight, A* out, int threads);
// total (v, d)[id] += dz hidden[row] over all entries; a row that seen (v) does not mark is written and marked.
template <class A>
using KeptToWeight = void (*)(const KeptTokens&, const A* dz, const void* hidden, A* total, uint8_t* seen, int threads);

struct SupportKernels {
  ByDtype<KeptDots<float>, KeptDots<double>> dots;
  ByDtype<KeptToHidden<float>, KeptToHidden<double>> to_hidden;
  ByDtype<KeptToWeight<float>, KeptToWeight<double>> to_weight;
};

// One table per instruction set, each from its own compilation of cpu/logps.cpp.
namespace baseline {
const LogpsKernels& logps_kernels();
const SupportKernels& support_kernels();
}  // namespace baseline
namespace avx2 {
const LogpsKernels& logps_kernels();
const SupportKernels& support_kernels();
}  // namespace avx2
namespace avx512 {
const LogpsKernels& logps_kernels();
const SupportKernels& support_kernels();
}  // namespace avx512
const LogpsKernels& logps_kernels();
const SupportKernels& support_kernels();

// Chooses the kept columns of one row chunk (csrc/cpu/common/logps_select.cpp). statistic (copies, vocabulary): maxima
// of log u as the forward left them, reduced here. Column j is kept with probability q = min(1, u' / tau), u' = u, or u
// (1 - log u + entropy) where entropy >= 0; columns with forced[j] != 0 always. Uniform numbers are a function of
// (seed, chunk, first_column + j) alone. Writes kept indices, ascending, and 1 / q, into room for vocabulary of them;
// returns how many, and how many were to be expected (the sum of q, to 6%; infinity where a bound is NaN).
template <class A>
std::pair<int64_t, double> select_columns(const A* statistic, int64_t copies, int64_t vocabulary, double tau,
                                          double entropy, const uint8_t* forced, uint64_t seed, int64_t chunk,
                                          int64_t first_column, int64_t* kept, A* inverse, int threads);

}  // namespace qempo::cpu
