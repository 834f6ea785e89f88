// The log-probs' part of the Python module.
#include "qempo/logps.h"

#include <utility>

#include "bindings.h"

namespace qempo::cpu {
namespace {

template <class A>
Head<A> head_of(Maybe bias, Maybe inv_temperature, double scale, double softcap) {
  return {at<const A>(bias), at<const A>(inv_temperature), static_cast<A>(scale), static_cast<A>(softcap)};
}

void logps_fwd(int dtype, Address z, int64_t ld, int64_t n, int64_t c, int64_t v0, Maybe bias, Maybe inv_temperature,
               double scale, double softcap, Address targets, Address max, Address sum, Maybe sum_z, Maybe sum_sq,
               Address target, Maybe floor, Maybe columns, int64_t vocabulary, int threads) {
  const Tile tile{at<void>(z), ld, n, c, v0};
  auto run = [&](auto as, auto kernel) {
    using A = decltype(as);
    const RowStats<A> rows{at<A>(max), at<A>(sum), at<A>(sum_z), at<A>(sum_sq), at<A>(target), at<const A>(floor)};
    kernel(tile, head_of<A>(bias, inv_temperature, scale, softcap), at<const int64_t>(targets), rows, at<A>(columns),
           vocabulary, threads);
  };
  logps_kernels().forward.with(dtype, run);
}

void logps_bwd(int dtype, Address z, int64_t ld, int64_t n, int64_t c, Maybe bias, Maybe inv_temperature, double scale,
               double softcap, Address lse, Address grad, Maybe grad_h, Maybe entropy, Maybe inverse, Address target,
               Maybe row_sum, int threads) {
  const Tile tile{at<void>(z), ld, n, c, 0};
  auto run = [&](auto as, auto kernel) {
    using A = decltype(as);
    const RowGrads<A> rows{at<const A>(lse),     at<const A>(grad),         at<const A>(grad_h), at<const A>(entropy),
                           at<const A>(inverse), at<const int64_t>(target), at<A>(row_sum)};
    kernel(tile, head_of<A>(bias, inv_temperature, scale, softcap), rows, threads);
  };
  logps_kernels().backward.with(dtype, run);
}

// logps_fwd and logps_bwd of n ragged rows, each with at most c of the entries of z: float32, or float64.
void ragged_fwd(bool f64, Address z, Address offsets, int64_t n, int64_t c, Maybe inv_temperature, double scale,
                double softcap, Address targets, Address max, Address sum, Maybe sum_z, Maybe sum_sq, Address target,
                int threads) {
  const Tile tile{at<void>(z), 0, n, c, 0, at<const int64_t>(offsets)};
  auto run = [&](auto as, auto kernel) {
    using A = decltype(as);
    const RowStats<A> rows{at<A>(max), at<A>(sum), at<A>(sum_z), at<A>(sum_sq), at<A>(target), nullptr};
    kernel(tile, head_of<A>({}, inv_temperature, scale, softcap), at<const int64_t>(targets), rows,
           static_cast<A*>(nullptr), 0, threads);
  };
  logps_kernels().forward.with(static_cast<int>(f64 ? Dtype::f64 : Dtype::f32), run);
}

void ragged_bwd(bool f64, Address z, Address offsets, int64_t n, int64_t c, Maybe inv_temperature, double scale,
                double softcap, Address lse, Address grad, Maybe grad_h, Maybe entropy, Address target, int threads) {
  const Tile tile{at<void>(z), 0, n, c, 0, at<const int64_t>(offsets)};
  auto run = [&](auto as, auto kernel) {
    using A = decltype(as);
    const RowGrads<A> rows{at<const A>(lse),
                           at<const A>(grad),
                           at<const A>(grad_h),
                           at<const A>(entropy),
                           nullptr,
                           at<const int64_t>(target),
                           nullptr};
    kernel(tile, head_of<A>({}, inv_temperature, scale, softcap), rows, threads);
  };
  logps_kernels().backward.with(static_cast<int>(f64 ? Dtype::f64 : Dtype::f32), run);
}

KeptTokens kept(Address ids, Address offsets, int64_t n, int64_t d, int64_t v) {
  return {at<const int64_t>(ids), at<const int64_t>(offsets), n, d, v};
}

void kept_dots(int dtype, Address ids, Address offsets, int64_t n, int64_t d, int64_t v, Address hidden, Address weight,
               Address z, int threads) {
  support_kernels().dots.with(dtype, [&](auto as, auto kernel) {
    kernel(kept(ids, offsets, n, d, v), at<const void>(hidden), at<const void>(weight), at<decltype(as)>(z), threads);
  });
}

void kept_to_hidden(int dtype, Address ids, Address offsets, int64_t n, int64_t d, int64_t v, Address dz,
                    Address weight, Address out, int threads) {
  support_kernels().to_hidden.with(dtype, [&](auto as, auto kernel) {
    using A = decltype(as);
    kernel(kept(ids, offsets, n, d, v), at<const A>(dz), at<const void>(weight), at<A>(out), threads);
  });
}

void kept_to_weight(int dtype, Address ids, Address offsets, int64_t n, int64_t d, int64_t v, Address dz,
                    Address hidden, Address total, Address seen, int threads) {
  support_kernels().to_weight.with(dtype, [&](auto as, auto kernel) {
    using A = decltype(as);
    kernel(kept(ids, offsets, n, d, v), at<const A>(dz), at<const void>(hidden), at<A>(total), at<uint8_t>(seen),
           threads);
  });
}

std::pair<int64_t, double> logps_select(bool f64, Address statistic, int64_t copies, int64_t vocabulary, double tau,
                                        double entropy, Address forced, uint64_t seed, int64_t chunk,
                                        int64_t first_column, Address kept, Address inverse, int threads) {
  auto run = [&](auto as) {
    using A = decltype(as);
    return select_columns(at<const A>(statistic), copies, vocabulary, tau, entropy, at<const uint8_t>(forced), seed,
                          chunk, first_column, at<int64_t>(kept), at<A>(inverse), threads);
  };
  return f64 ? run(0.0) : run(0.f);
}

// Forward, or with the gradient of the sums, backward. False: the offsets do not cover n.
bool segment_sum(bool f64, bool backward, Address from, int64_t n, Address offsets, bool wide, int64_t count,
                 Address out, int threads) {
  auto run = [&](auto as) {
    using A = decltype(as);
    return (backward ? spread_segments<A> : sum_segments<A>)(segments(offsets, wide, count, 0), at<const A>(from), n,
                                                             at<A>(out), threads);
  };
  return f64 ? run(0.0) : run(0.f);
}

}  // namespace

void bind_logps(py::module_& m) {
  m.def("logps_fwd", &logps_fwd, release());
  m.def("logps_bwd", &logps_bwd, release());
  m.def("ragged_fwd", &ragged_fwd, release());
  m.def("ragged_bwd", &ragged_bwd, release());
  m.def("kept_dots", &kept_dots, release());
  m.def("kept_to_hidden", &kept_to_hidden, release());
  m.def("kept_to_weight", &kept_to_weight, release());
  m.def("logps_select", &logps_select, release());
  m.def("segment_sum", &segment_sum, release());
}

}  // namespace qempo::cpu
