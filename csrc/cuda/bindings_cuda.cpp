// What the Python module gains where CUDA is compiled in. Each function returns an empty string, or CUDA's error.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "qempo/cuda_dpp.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace qempo::cuda {
namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// x, log_quality, offsets, groups, rows, width, k, ridge, normalize
using In = std::tuple<Address, Address, Address, int64_t, int64_t, int64_t, int, double, bool>;
// p, q, rows, careful, pitch
using Kept = std::tuple<Address, Address, Address, Address, int>;

DppGroups groups_of(const In& in) {
  const auto& [x, log_quality, offsets, groups, rows, width, k, ridge, normalize] = in;
  return {at<const void>(x), at<const double>(log_quality), at<const int64_t>(offsets), groups, rows, width, k, ridge,
          normalize};
}

DppKept kept_of(const Kept& kept) {
  const auto& [p, q, rows, careful, pitch] = kept;
  return {at<double>(p), at<double>(q), at<double>(rows), at<int>(careful), pitch};
}

std::string said(int error) { return error == 0 ? "" : error_text(error); }

std::string forward(int dtype, const In& in, const Kept& kept, const std::tuple<Address, Address, Address>& out,
                    Address stream) {
  const auto& [logdet, gains, baselines] = out;
  const DppForward call{groups_of(in), kept_of(kept), at<float>(logdet), at<float>(gains), at<float>(baselines)};
  return said(dpp_fwd(static_cast<DppDtype>(dtype), call, at<void>(stream)));
}

std::string backward(int dtype, const In& in, const Kept& kept,
                     const std::tuple<Address, Address, Address, Address>& grads, Address stream) {
  const auto& [logdet, gains, x, log_quality] = grads;
  const DppBackward call{groups_of(in),          kept_of(kept), at<const float>(logdet),
                         at<const float>(gains), at<void>(x),   at<float>(log_quality)};
  return said(dpp_bwd(static_cast<DppDtype>(dtype), call, at<void>(stream)));
}

std::string select(int dtype, const In& in, int n, Address picks, Address stream) {
  const DppSelect call{groups_of(in), n, at<int64_t>(picks)};
  return said(dpp_select(static_cast<DppDtype>(dtype), call, at<void>(stream)));
}

}  // namespace

void bind(py::module_& m) {
  m.def("dpp_cuda_fwd", &forward);
  m.def("dpp_cuda_bwd", &backward);
  m.def("dpp_cuda_select", &select);
}

}  // namespace qempo::cuda
