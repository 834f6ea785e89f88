// The losses' part of the Python module. Each function says whether all values were good.
#include "qempo/losses.h"

#include "bindings.h"

namespace qempo::cpu {
namespace {

template <class A>
struct Reader {
  const A* in(Address address) const { return at<const A>(address); }
  const A* in(Maybe address) const { return at<const A>(address); }
  A* out(Address address) const { return at<A>(address); }
};

// run(Reader<float>) or run(Reader<double>).
template <class F>
bool typed(bool f64, F run) {
  return (f64 ? run(Reader<double>{}) : run(Reader<float>{})) == Status::done;
}

template <class A>
const LossKernels<A>& kernels(Reader<A>) {
  return loss_kernels<A>();
}

bool pair_loss(bool f64, int64_t rows, Address w, Address l, Maybe fw, Maybe fl, double alpha, double beta,
               double smoothing, int reduction, Address value, Address coef_w, Address coef_l, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).pair_loss({rows, as.in(w), as.in(l), as.in(fw), as.in(fl), alpha, beta, smoothing,
                                  static_cast<Reduction>(reduction), as.out(value), as.out(coef_w), as.out(coef_l)},
                                 threads);
  });
}

bool poft_loss(bool f64, int64_t rows, int64_t models, Address logps, Address lengths, Address aligned, double beta,
               double gamma, int reduction, Address value, Address coef, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).poft_loss({rows, models, as.in(logps), as.in(lengths), as.in(aligned), beta, gamma,
                                  static_cast<Reduction>(reduction), as.out(value), as.out(coef)},
                                 threads);
  });
}

bool epa_loss(bool f64, int64_t rows, int64_t strong_count, int64_t weak_count, Address positive, Address strong,
              Address weak, Address ref_positive, Address ref_strong, Address ref_weak, double beta, int reduction,
              Address value, Address coef_positive, Address coef_strong, Address coef_weak, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).epa_loss(
        {rows, strong_count, weak_count, as.in(positive), as.in(strong), as.in(weak), as.in(ref_positive),
         as.in(ref_strong), as.in(ref_weak), beta, static_cast<Reduction>(reduction), as.out(value),
         as.out(coef_positive), as.out(coef_strong), as.out(coef_weak)},
        threads);
  });
}

bool group_loss(bool f64, bool variance, int64_t samples, Maybe offsets, bool wide, int64_t count, int64_t size,
                int64_t at_least, Address logps, Maybe ref, Address rewards, Maybe bonus, double alpha, double beta,
                int baseline, Address value, Address coef, int threads) {
  return typed(f64, [&](auto as) {
    const auto& table = kernels(as);
    return (variance ? table.variance_loss : table.group_loss)(
        {segments(offsets, wide, count, size), samples, at_least, as.in(logps), as.in(ref), as.in(rewards),
         as.in(bonus), alpha, beta, static_cast<Baseline>(baseline), as.out(value), as.out(coef)},
        threads);
  });
}

bool rspo_loss(bool f64, int64_t samples, Maybe offsets, bool wide, int64_t count, int64_t size, int64_t k,
               Address logps, Address rewards, Address value, Address coef, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).rspo_loss(
        {segments(offsets, wide, count, size), samples, k, as.in(logps), as.in(rewards), as.out(value), as.out(coef)},
        threads);
  });
}

bool group_advantages(bool f64, int64_t samples, Maybe offsets, bool wide, int64_t count, int64_t size, Address rewards,
                      int scale, double epsilon, int baseline, Address out, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).group_advantages(
        {segments(offsets, wide, count, size), samples, as.in(rewards), static_cast<Scale>(scale), epsilon,
         static_cast<Baseline>(baseline), as.out(out)},
        threads);
  });
}

bool token_loss(bool f64, int64_t count, Maybe offsets, bool wide, int64_t sequences, Address logps, Address old,
                Maybe ref, Address advantages, double kl, double eps_low, double eps_high, bool sequence_ratio,
                int normalize, double limit, int surrogate, Address value, Address coef, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).token_loss(
        {segments(offsets, wide, sequences, 0), count, as.in(logps), as.in(old), as.in(ref), as.in(advantages), kl,
         eps_low, eps_high, sequence_ratio, static_cast<Normalize>(normalize), limit, static_cast<Surrogate>(surrogate),
         as.out(value), as.out(coef)},
        threads);
  });
}

}  // namespace

void bind_losses(py::module_& m) {
  m.def("pair_loss", &pair_loss, release());
  m.def("poft_loss", &poft_loss, release());
  m.def("epa_loss", &epa_loss, release());
  m.def("group_loss", &group_loss, release());
  m.def("rspo_loss", &rspo_loss, release());
  m.def("group_advantages", &group_advantages, release());
  m.def("token_loss", &token_loss, release());
}

}  // namespace qempo::cpu
