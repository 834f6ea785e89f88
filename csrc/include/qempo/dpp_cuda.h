// DPP launchers for NVIDIA GPUs, torch-free: device addresses, sizes and a stream. Formulae: docs/dpp.md.
#pragma once

#include <cstdint>

namespace qempo::cuda {

// f64: of log_quality alone.
enum class DppDtype { f32, bf16, f16, f64 };

// Groups of more rows than this become NaN; Python sends them to plain torch where it knows of them.
constexpr int kDppLargest = 64;

// Equal groups of k rows, or ragged ones by offsets (k unused).
struct DppGroups {
  const void* x;            // (rows, width), contiguous
  const void* log_quality;  // (rows) or null for 0
  DppDtype quality;         // what log_quality holds
  const int64_t* offsets;   // (groups + 1) or null
  int64_t groups, rows, width;
  int k;
  double ridge;
  bool normalize;
};

// What the backward pass needs. Row i of a group holds its i-th line of P and of Q, `pitch` apart, pitch >= k.
struct DppKept {
  double* p;        // (rows, pitch) M_ij / sqrt(M_ii M_jj)
  double* q;        // (rows, pitch) second factor of careful groups; of the others not touched
  double* rows;     // (rows, 3) s_i sqrt(M_ii), ridge M_ii, length of the embedding
  double* careful;  // (groups) 1 where the group took the careful path, else 0
  int pitch;
};

// Its parts in one slab, each from an even number of doubles on: 16 bytes. kept_doubles of qempo_fast/dpp/_gpu.py is
// their size.
inline DppKept kept_in(double* slab, const DppGroups& in) {
  const int64_t most = in.rows < kDppLargest ? in.rows : kDppLargest;
  const int64_t pitch = in.offsets ? most : in.k;
  const int64_t square = (in.rows * pitch + 1) / 2 * 2, lines = (3 * in.rows + 1) / 2 * 2;
  double *q = slab + square, *rows = q + square;
  return {slab, q, rows, rows + lines, static_cast<int>(pitch)};
}

struct DppForward {
  DppGroups in;
  DppKept kept;
  float *logdet, *gains, *baselines;  // (groups), (rows), (rows)
};

struct DppBackward {
  DppGroups in;
  DppKept kept;
  const float *grad_logdet, *grad_gains;  // (groups), (rows); null for 0
  void* grad_x;                           // (rows, width), dtype of x
  float* grad_log_quality;                // (rows) or null
};

struct DppSelect {
  DppGroups in;
  int n;
  int64_t* picks;  // (groups, n)
};

// Enqueue on the stream and return a cudaError_t, 0 for success. They wait for nothing and allocate nothing, so a CUDA
// graph may capture them.
int dpp_fwd(DppDtype dtype, const DppForward& call, void* stream);
int dpp_bwd(DppDtype dtype, const DppBackward& call, void* stream);
int dpp_select(DppDtype dtype, const DppSelect& call, void* stream);
const char* error_text(int error);

}  // namespace qempo::cuda
