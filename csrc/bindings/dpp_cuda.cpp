// What the Python module gains where CUDA is compiled in. Each function returns an empty string, or CUDA's error.
#include "qempo/dpp_cuda.h"

#include <string>
#include <tuple>

#include "bindings.h"

namespace qempo::cuda {
namespace {

// x, log_quality, its dtype, offsets, groups, rows, width, k, ridge, normalize
using In = std::tuple<Address, Maybe, int, Maybe, int64_t, int64_t, int64_t, int, double, bool>;

DppGroups groups_of(const In& in) {
  const auto& [x, log_quality, quality, offsets, groups, rows, width, k, ridge, normalize] = in;
  return {at<const void>(x),
          at<const void>(log_quality),
          static_cast<DppDtype>(quality),
          at<const int64_t>(offsets),
          groups,
          rows,
          width,
          k,
          ridge,
          normalize};
}

std::string said(int error) { return error == 0 ? "" : error_text(error); }

std::string forward(int dtype, const In& in, Address kept, const std::tuple<Address, Address, Address>& out,
                    Address stream) {
  const auto& [logdet, gains, baselines] = out;
  const DppGroups groups = groups_of(in);
  const DppForward call{groups, kept_in(at<double>(kept), groups), at<float>(logdet), at<float>(gains),
                        at<float>(baselines)};
  return said(dpp_fwd(static_cast<DppDtype>(dtype), call, at<void>(stream)));
}

std::string backward(int dtype, const In& in, Address kept, const std::tuple<Maybe, Maybe, Address, Maybe>& grads,
                     Address stream) {
  const auto& [logdet, gains, x, log_quality] = grads;
  const DppGroups groups = groups_of(in);
  const DppBackward call{groups,
                         kept_in(at<double>(kept), groups),
                         at<const float>(logdet),
                         at<const float>(gains),
                         at<void>(x),
                         at<float>(log_quality)};
  return said(dpp_bwd(static_cast<DppDtype>(dtype), call, at<void>(stream)));
}

std::string select(int dtype, const In& in, int n, Address picks, Address stream) {
  const DppSelect call{groups_of(in), n, at<int64_t>(picks)};
  return said(dpp_select(static_cast<DppDtype>(dtype), call, at<void>(stream)));
}

}  // namespace

void bind_dpp(py::module_& m) {
  m.def("dpp_cuda_fwd", &forward);
  m.def("dpp_cuda_bwd", &backward);
  m.def("dpp_cuda_select", &select);
}

}  // namespace qempo::cuda
