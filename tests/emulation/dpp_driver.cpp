// The launchers under C names, for ctypes.
#include "cuda_runtime.h"
#include "qempo/dpp_cuda.h"

using namespace qempo::cuda;

extern "C" {

void reseed(uint64_t seed) { emulation::reseed(seed); }

const char* emulated_fwd(int dtype, const DppGroups* in, double* kept, float* const* out) {
  const int error = dpp_fwd(static_cast<DppDtype>(dtype), {*in, kept_in(kept, *in), out[0], out[1], out[2]}, nullptr);
  return error == 0 ? "" : error_text(error);
}

const char* emulated_bwd(int dtype, const DppGroups* in, double* kept, float* const* grads) {
  const DppBackward call{*in, kept_in(kept, *in), grads[0], grads[1], grads[2], grads[3]};
  const int error = dpp_bwd(static_cast<DppDtype>(dtype), call, nullptr);
  return error == 0 ? "" : error_text(error);
}

const char* emulated_select(int dtype, const DppGroups* in, int n, int64_t* picks) {
  const int error = dpp_select(static_cast<DppDtype>(dtype), {*in, n, picks}, nullptr);
  return error == 0 ? "" : error_text(error);
}
}
