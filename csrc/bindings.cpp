// The whole Python surface of the native code. Pointers come as integers: Python checks, allocates and keeps alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "qempo/cpu.h"
#include "qempo/dpp.h"
#include "qempo/logps.h"

namespace qempo::cuda { void bind(pybind11::module_& m); }        // namespace qempo::cuda
namespace qempo::cpu { void bind_losses(pybind11::module_& m); }  // namespace qempo::cpu

namespace py = pybind11;
using namespace qempo::cpu;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Isa isa_from(const std::string& name) {
  for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (name == isa_name(level)) return level;
  throw std::invalid_argument("isa: wanted baseline, avx2 or avx512, got " + name);
}

template <class A>
Head<A> head_of(Address bias, Address inv_temperature, double scale, double softcap) {
  return {at<const A>(bias), at<const A>(inv_temperature), static_cast<A>(scale), static_cast<A>(softcap)};
}

void forward(int dtype, Address z, int64_t ld, int64_t n, int64_t c, int64_t v0, Address bias, Address inv_temperature,
             double scale, double softcap, Address targets, std::vector<Address> stats, Address columns,
             int64_t vocabulary, int threads) {
  const Tile tile{at<void>(z), ld, n, c, v0};
  const LogpsKernels& kernels = logps_kernels();
  auto run = [&](auto kernel, auto zero) {
    using A = decltype(zero);
    const RowStats<A> rows{at<A>(stats.at(0)), at<A>(stats.at(1)), at<A>(stats.at(2)),
                           at<A>(stats.at(3)), at<A>(stats.at(4)), at<const A>(stats.at(5))};
    kernel(tile, head_of<A>(bias, inv_temperature, scale, softcap), at<const int64_t>(targets), rows, at<A>(columns),
           vocabulary, threads);
  };
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return run(kernels.forward_f32, 0.f);
    case Dtype::bf16: return run(kernels.forward_bf16, 0.f);
    case Dtype::f64: return run(kernels.forward_f64, 0.0);
  }
}

void backward(int dtype, Address z, int64_t ld, int64_t n, int64_t c, Address bias, Address inv_temperature,
              double scale, double softcap, Address lse, Address grad, Address grad_h, Address entropy, Address inverse,
              Address target, Address row_sum, int threads) {
  const Tile tile{at<void>(z), ld, n, c, 0};
  const LogpsKernels& kernels = logps_kernels();
  auto run = [&](auto kernel, auto zero) {
    using A = decltype(zero);
    const RowGrads<A> rows{at<const A>(lse),     at<const A>(grad),         at<const A>(grad_h), at<const A>(entropy),
                           at<const A>(inverse), at<const int64_t>(target), at<A>(row_sum)};
    kernel(tile, head_of<A>(bias, inv_temperature, scale, softcap), rows, threads);
  };
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return run(kernels.backward_f32, 0.f);
    case Dtype::bf16: return run(kernels.backward_bf16, 0.f);
    case Dtype::f64: return run(kernels.backward_f64, 0.0);
  }
}

void add_rows_of(int dtype, Address out, Address seen, Address index, Address rows, int64_t n, int64_t d, int threads) {
  const auto* from = at<const int64_t>(index);
  auto* to = at<uint8_t>(seen);
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return add_rows(at<float>(out), to, from, at<const float>(rows), n, d, threads);
    case Dtype::bf16: return add_rows(at<float>(out), to, from, at<const uint16_t>(rows), n, d, threads);
    case Dtype::f64: return add_rows(at<double>(out), to, from, at<const double>(rows), n, d, threads);
  }
}

std::pair<int64_t, double> select_kept(bool f64, Address statistic, int64_t copies, int64_t vocabulary, double tau,
                                       double entropy, Address forced, uint64_t seed, int64_t chunk,
                                       int64_t first_column, Address kept, Address inverse, int threads) {
  if (f64)
    return select_columns(at<const double>(statistic), copies, vocabulary, tau, entropy, at<const uint8_t>(forced),
                          seed, chunk, first_column, at<int64_t>(kept), at<double>(inverse), threads);
  return select_columns(at<const float>(statistic), copies, vocabulary, tau, entropy, at<const uint8_t>(forced), seed,
                        chunk, first_column, at<int64_t>(kept), at<float>(inverse), threads);
}

DppGroups groups_of(Address x, int64_t d, int64_t groups, int64_t k, Address offsets, Address matrices,
                    Address log_quality, double ridge, bool normalize) {
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

void dpp_fwd(int dtype, Address x, int64_t d, int64_t groups, int64_t k, Address offsets, Address matrices,
             Address log_quality, double ridge, bool normalize, std::vector<Address> out, int threads) {
  const DppGroups of = groups_of(x, d, groups, k, offsets, matrices, log_quality, ridge, normalize);
  const DppResults results{at<double>(out.at(0)), at<double>(out.at(1)), at<double>(out.at(2)), at<double>(out.at(3)),
                           at<double>(out.at(4))};
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return dpp_kernels().forward_f32(of, results, threads);
    case Dtype::bf16: return dpp_kernels().forward_bf16(of, results, threads);
    case Dtype::f64: return dpp_kernels().forward_f64(of, results, threads);
  }
}

void dpp_bwd(int dtype, Address x, int64_t d, int64_t groups, int64_t k, Address offsets, Address matrices,
             Address log_quality, double ridge, bool normalize, std::vector<Address> in, Address grad_x,
             Address grad_log_quality, int threads) {
  const DppGroups of = groups_of(x, d, groups, k, offsets, matrices, log_quality, ridge, normalize);
  const DppGrads grads{at<const double>(in.at(0)), at<const double>(in.at(1)), at<const double>(in.at(2)),
                       at<const double>(in.at(3)), at<void>(grad_x),           at<double>(grad_log_quality)};
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return dpp_kernels().backward_f32(of, grads, threads);
    case Dtype::bf16: return dpp_kernels().backward_bf16(of, grads, threads);
    case Dtype::f64: return dpp_kernels().backward_f64(of, grads, threads);
  }
}

void dpp_select(int dtype, Address x, int64_t d, int64_t groups, int64_t k, Address offsets, Address log_quality,
                double ridge, int64_t n, Address picks, int threads) {
  const DppGroups of = groups_of(x, d, groups, k, offsets, 0, log_quality, ridge, true);
  auto* to = at<int64_t>(picks);
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return dpp_kernels().select_f32(of, n, to, threads);
    case Dtype::bf16: return dpp_kernels().select_bf16(of, n, to, threads);
    case Dtype::f64: return dpp_kernels().select_f64(of, n, to, threads);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of qempo_fast; torch-free.";
  m.def("isa", [] { return std::string(isa_name(isa())); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512})
      if (runs_here(level)) names.emplace_back(isa_name(level));
    return names;
  });
  m.def("use_isa", [](const std::string& name) {
    if (!use_isa(isa_from(name))) throw std::runtime_error("isa: this processor does not run " + name);
  });
  m.def("vendor", [] { return std::string(vendor()); });
  m.def("thread_runtime", [] { return std::string(thread_runtime()); });
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("logps_fwd", &forward, release());
  m.def("logps_bwd", &backward, release());
  m.def("ask_huge_pages", [](Address data, int64_t bytes) { ask_huge_pages(at<void>(data), bytes); });
  m.def(
      "gather_rows",
      [](Address out, Address rows, Address index, int64_t n, int64_t padded, int64_t bytes, int threads) {
        gather_rows(at<void>(out), at<const void>(rows), at<const int64_t>(index), n, padded, bytes, threads);
      },
      release());
  m.def("add_rows", &add_rows_of, release());
  m.def(
      "zero_unseen",
      [](Address out, Address seen, int64_t n, int64_t bytes, int threads) {
        zero_unseen(at<void>(out), at<const uint8_t>(seen), n, bytes, threads);
      },
      release());
  m.def(
      "round_rows",
      [](Address out, Address seen, Address rows, int64_t n, int64_t d, int threads) {
        round_rows(at<uint16_t>(out), at<const uint8_t>(seen), at<const float>(rows), n, d, threads);
      },
      release());
  m.def("logps_select", &select_kept, release());
  m.attr("dpp_largest") = kDppLargest;
  m.def("dpp_fwd", &dpp_fwd, release());
  m.def("dpp_bwd", &dpp_bwd, release());
  m.def("dpp_select", &dpp_select, release());
  bind_losses(m);
#ifdef QEMPO_HAS_CUDA
  qempo::cuda::bind(m);
#endif
}
