// The CPU's part of the DPP op: qempo/dpp.h to Python.
#include "qempo/dpp.h"

#include "bindings.h"

namespace qempo::cpu {
namespace {

DppGroups groups_of(Address x, int64_t d, int64_t groups, int64_t k, Maybe offsets, Maybe matrices, Maybe log_quality,
                    double ridge, bool normalize) {
  return {at<const void>(x),
          d,
          groups,
          k,
          at<const int64_t>(offsets),
          at<const int64_t>(matrices),
          at<const double>(log_quality),
          ridge,
          normalize};
}

void dpp_fwd(int dtype, Address x, int64_t d, int64_t groups, int64_t k, Maybe offsets, Maybe matrices,
             Maybe log_quality, double ridge, bool normalize, Address logdet, Address gains, Address baselines,
             Address inverse, Address lengths, int threads) {
  const DppGroups of = groups_of(x, d, groups, k, offsets, matrices, log_quality, ridge, normalize);
  const DppResults results{at<double>(logdet), at<double>(gains), at<double>(baselines), at<double>(inverse),
                           at<double>(lengths)};
  dpp_kernels().forward.with(dtype, [&](auto, auto kernel) { kernel(of, results, threads); });
}

void dpp_bwd(int dtype, Address x, int64_t d, int64_t groups, int64_t k, Maybe offsets, Maybe matrices,
             Maybe log_quality, double ridge, bool normalize, Address grad_logdet, Address grad_gains, Address inverse,
             Address lengths, Address grad_x, Address grad_log_quality, int threads) {
  const DppGroups of = groups_of(x, d, groups, k, offsets, matrices, log_quality, ridge, normalize);
  const DppGrads grads{at<const double>(grad_logdet),
                       at<const double>(grad_gains),
                       at<const double>(inverse),
                       at<const double>(lengths),
                       at<void>(grad_x),
                       at<double>(grad_log_quality)};
  dpp_kernels().backward.with(dtype, [&](auto, auto kernel) { kernel(of, grads, threads); });
}

void dpp_select(int dtype, Address x, int64_t d, int64_t groups, int64_t k, Maybe offsets, Maybe log_quality,
                double ridge, int64_t n, Address picks, int threads) {
  const DppGroups of = groups_of(x, d, groups, k, offsets, std::nullopt, log_quality, ridge, true);
  dpp_kernels().select.with(dtype, [&](auto, auto kernel) { kernel(of, n, at<int64_t>(picks), threads); });
}

}  // namespace

void bind_dpp(py::module_& m) {
  m.attr("dpp_largest") = kDppLargest;
  m.def("dpp_fwd", &dpp_fwd, release());
  m.def("dpp_bwd", &dpp_bwd, release());
  m.def("dpp_select", &dpp_select, release());
}

}  // namespace qempo::cpu
