#include "qempo/losses.h"

namespace qempo::cpu {

bool Segments::cover(int64_t total, int64_t at_least) const {
  if (!data) return true;  // checked with the sizes in Python
  int64_t before = first(0);
  if (before != 0) return false;
  for (int64_t i = 1; i <= count; ++i) {
    const int64_t next = first(i);
    // Not next - before < at_least: the difference of wild offsets may overflow.
    if (next < before || next > total || next - before < at_least) return false;
    before = next;
  }
  return before == total;
}

#define QEMPO_TABLE(isa)                                                             \
  {isa::pairs_loss<A>,    isa::poft_loss<A>,  isa::epa_loss<A>,  isa::group_loss<A>, \
   isa::variance_loss<A>, isa::advantages<A>, isa::risk_loss<A>, isa::token_loss<A>}

template <class A>
const LossKernels<A>& loss_kernels() {
#if defined(__x86_64__)
  static const LossKernels<A> wide QEMPO_TABLE(avx512), narrow QEMPO_TABLE(avx2);
  if (isa() == Isa::avx512) return wide;
  if (isa() == Isa::avx2) return narrow;
#endif
  static const LossKernels<A> plain QEMPO_TABLE(baseline);
  return plain;
}

template const LossKernels<float>& loss_kernels<float>();
template const LossKernels<double>& loss_kernels<double>();

}  // namespace qempo::cpu
