// The pairwise losses of the (alpha, beta) family. Compiled once per instruction set.
#include "loss_math.h"

namespace qempo::cpu::QEMPO_ISA {

template <class A>
Status pair_loss(const Pairs<A>& in, int threads) {
  const double weight = row_weight(in.reduction, in.rows);
  over_rows(threads, in, kBlock, in.rows, [&](int64_t begin, int64_t n, double* h) {
    double slope[kBlock];
    const A *w = in.chosen + begin, *l = in.rejected + begin;
    for (int64_t i = 0; i < n; ++i) h[i] = in.alpha * (static_cast<double>(w[i]) - static_cast<double>(l[i]));
    if (in.ref_chosen && in.beta != 0) {
      const A *fw = in.ref_chosen + begin, *fl = in.ref_rejected + begin;
      for (int64_t i = 0; i < n; ++i) h[i] -= in.beta * (static_cast<double>(fw[i]) - static_cast<double>(fl[i]));
    }
    log_sigmoids<A>(n, in.label_smoothing, h, slope);
    A *chosen = in.coef_chosen + begin, *rejected = in.coef_rejected + begin;
    for (int64_t i = 0; i < n; ++i) {
      const A c = static_cast<A>(in.alpha * weight * slope[i]);
      chosen[i] = c;
      rejected[i] = -c;
    }
  });
  return Status::done;
}

template Status pair_loss(const Pairs<float>&, int);
template Status pair_loss(const Pairs<double>&, int);

}  // namespace qempo::cpu::QEMPO_ISA
