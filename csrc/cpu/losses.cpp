// The table of the losses, whose loops are in the loss_*.cpp beside this file. Compiled once per instruction set.
#include "qempo/losses.h"

namespace qempo::cpu::QEMPO_ISA {

template <class A>
Status pair_loss(const Pairs<A>&, int threads);
template <class A>
Status poft_loss(const Poft<A>&, int threads);
template <class A>
Status epa_loss(const Epa<A>&, int threads);
template <class A>
Status group_loss(const Groups<A>&, int threads);
template <class A>
Status variance_loss(const Groups<A>&, int threads);
template <class A>
Status group_advantages(const Advantages<A>&, int threads);
template <class A>
Status rspo_loss(const Risk<A>&, int threads);
template <class A>
Status token_loss(const Tokens<A>&, int threads);

template <class A>
const LossKernels<A>& loss_kernels() {
  static const LossKernels<A> kernels{pair_loss<A>,     poft_loss<A>,        epa_loss<A>,  group_loss<A>,
                                      variance_loss<A>, group_advantages<A>, rspo_loss<A>, token_loss<A>};
  return kernels;
}

template const LossKernels<float>& loss_kernels<float>();
template const LossKernels<double>& loss_kernels<double>();

}  // namespace qempo::cpu::QEMPO_ISA
