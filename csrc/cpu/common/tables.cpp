// Which instruction set's kernels an op runs: those of isa(), which may change between two calls of a test.
#include "qempo/cpu.h"
#include "qempo/dpp.h"
#include "qempo/logps.h"
#include "qempo/losses.h"

namespace qempo::cpu {

// Other architectures have the baseline alone; isa() still refuses a word that names none.
#if defined(__x86_64__)
#define QEMPO_TABLE(table) \
  (isa() == Isa::avx512 ? avx512::table() : isa() == Isa::avx2 ? avx2::table() : baseline::table())
#else
#define QEMPO_TABLE(table) (isa(), baseline::table())
#endif

const DppKernels& dpp_kernels() { return QEMPO_TABLE(dpp_kernels); }
const LogpsKernels& logps_kernels() { return QEMPO_TABLE(logps_kernels); }
const SupportKernels& support_kernels() { return QEMPO_TABLE(support_kernels); }
template <class A>
const LossKernels<A>& loss_kernels() {
  return QEMPO_TABLE(loss_kernels<A>);
}
template const LossKernels<float>& loss_kernels<float>();
template const LossKernels<double>& loss_kernels<double>();

#undef QEMPO_TABLE

}  // namespace qempo::cpu
