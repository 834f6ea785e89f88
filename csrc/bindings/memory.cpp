// Rows and pages, for ops in Python that read and add rows by index.
#include "qempo/memory.h"

#include "bindings.h"
#include "qempo/cpu.h"

namespace qempo::cpu {
namespace {

void huge_pages(Address data, int64_t bytes) { ask_huge_pages(at<void>(data), bytes); }

void gather(Address out, Address rows, Address index, int64_t n, int64_t padded, int64_t bytes, int threads) {
  gather_rows(at<void>(out), at<const void>(rows), at<const int64_t>(index), n, padded, bytes, threads);
}

void add(int dtype, Address out, Address seen, Address index, Address rows, int64_t n, int64_t d, int threads) {
  const auto* from = at<const int64_t>(index);
  auto* to = at<uint8_t>(seen);
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return add_rows(at<float>(out), to, from, at<const float>(rows), n, d, threads);
    case Dtype::bf16: return add_rows(at<float>(out), to, from, at<const uint16_t>(rows), n, d, threads);
    case Dtype::f64: return add_rows(at<double>(out), to, from, at<const double>(rows), n, d, threads);
  }
}

void zero(Address out, Address seen, int64_t n, int64_t bytes, int threads) {
  zero_unseen(at<void>(out), at<const uint8_t>(seen), n, bytes, threads);
}

void round(Address out, Address seen, Address rows, int64_t n, int64_t d, int threads) {
  round_rows(at<uint16_t>(out), at<const uint8_t>(seen), at<const float>(rows), n, d, threads);
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def("ask_huge_pages", &huge_pages);
  m.def("gather_rows", &gather, release());
  m.def("add_rows", &add, release());
  m.def("zero_unseen", &zero, release());
  m.def("round_rows", &round, release());
}

}  // namespace qempo::cpu
