// The losses' part of the native module; addresses as in bindings.cpp. Each function says whether all values were good.
#include <pybind11/pybind11.h>

#include "qempo/losses.h"

namespace py = pybind11;

namespace qempo::cpu {
namespace {

using Address = std::uintptr_t;

template <class A>
struct Reader {
  const A* in(Address address) const { return reinterpret_cast<const A*>(address); }
  A* out(Address address) const { return reinterpret_cast<A*>(address); }
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

// offsets 0: groups of one size.
Segments segments(Address offsets, bool wide, int64_t count, int64_t size) {
  return {reinterpret_cast<const void*>(offsets), wide, count, size};
}

bool pairs(bool f64, int64_t rows, Address w, Address l, Address fw, Address fl, double alpha, double beta,
           double smoothing, int reduction, Address value, Address coef_w, Address coef_l, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).pairs({rows, as.in(w), as.in(l), as.in(fw), as.in(fl), alpha, beta, smoothing,
                              static_cast<Reduction>(reduction), as.out(value), as.out(coef_w), as.out(coef_l)},
                             threads);
  });
}

bool poft(bool f64, int64_t rows, int64_t models, Address logps, Address lengths, Address aligned, double beta,
          double gamma, int reduction, Address value, Address coef, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).poft({rows, models, as.in(logps), as.in(lengths), as.in(aligned), beta, gamma,
                             static_cast<Reduction>(reduction), as.out(value), as.out(coef)},
                            threads);
  });
}

bool epa(bool f64, int64_t rows, int64_t strong_count, int64_t weak_count, Address positive, Address strong,
         Address weak, Address ref_positive, Address ref_strong, Address ref_weak, double beta, int reduction,
         Address value, Address coef_positive, Address coef_strong, Address coef_weak, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).epa(
        {rows, strong_count, weak_count, as.in(positive), as.in(strong), as.in(weak), as.in(ref_positive),
         as.in(ref_strong), as.in(ref_weak), beta, static_cast<Reduction>(reduction), as.out(value),
         as.out(coef_positive), as.out(coef_strong), as.out(coef_weak)},
        threads);
  });
}

bool groups(bool f64, bool variance, int64_t samples, Address offsets, bool wide, int64_t count, int64_t size,
            int64_t at_least, Address logps, Address ref, Address rewards, Address bonus, double alpha, double beta,
            int baseline, Address value, Address coef, int threads) {
  return typed(f64, [&](auto as) {
    const auto& table = kernels(as);
    return (variance ? table.variance : table.groups)(
        {segments(offsets, wide, count, size), samples, at_least, as.in(logps), as.in(ref), as.in(rewards),
         as.in(bonus), alpha, beta, static_cast<Baseline>(baseline), as.out(value), as.out(coef)},
        threads);
  });
}

bool risk(bool f64, int64_t samples, Address offsets, bool wide, int64_t count, int64_t size, int64_t k, Address logps,
          Address rewards, Address value, Address coef, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).risk(
        {segments(offsets, wide, count, size), samples, k, as.in(logps), as.in(rewards), as.out(value), as.out(coef)},
        threads);
  });
}

bool advantages(bool f64, int64_t samples, Address offsets, bool wide, int64_t count, int64_t size, Address rewards,
                bool standardize, double epsilon, int baseline, Address out, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).advantages({segments(offsets, wide, count, size), samples, as.in(rewards), standardize, epsilon,
                                   static_cast<Baseline>(baseline), as.out(out)},
                                  threads);
  });
}

bool tokens(bool f64, int64_t count, Address offsets, bool wide, int64_t sequences, Address logps, Address old,
            Address ref, Address advantages, double kl, double eps_low, double eps_high, bool sequence_ratio,
            int normalize, double limit, Address value, Address coef, int threads) {
  return typed(f64, [&](auto as) {
    return kernels(as).tokens(
        {segments(offsets, wide, sequences, 0), count, as.in(logps), as.in(old), as.in(ref), as.in(advantages), kl,
         eps_low, eps_high, sequence_ratio, static_cast<Normalize>(normalize), limit, as.out(value), as.out(coef)},
        threads);
  });
}

}  // namespace

void bind_losses(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("pair_loss", &pairs, release());
  m.def("poft_loss", &poft, release());
  m.def("epa_loss", &epa, release());
  m.def("group_loss", &groups, release());
  m.def("rspo_loss", &risk, release());
  m.def("group_advantages", &advantages, release());
  m.def("token_loss", &tokens, release());
}

}  // namespace qempo::cpu
