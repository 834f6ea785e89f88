// The Python module: which instruction set and which threads run, and the functions of the files beside this one.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "qempo/cpu.h"

using namespace qempo::cpu;

namespace {

constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512};

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa level : kIsas)
    if (runs_here(level)) names.emplace_back(isa_name(level));
  return names;
}

void use_isa_named(const std::string& name) {
  for (Isa level : kIsas) {
    if (name != isa_name(level)) continue;
    if (!use_isa(level)) throw std::runtime_error("isa: this processor does not run " + name);
    return;
  }
  throw std::invalid_argument("isa: wanted baseline, avx2 or avx512, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of qempo_fast; torch-free.";
  m.def("isa", [] { return std::string(isa_name(isa())); });
  m.def("isas", &isas);
  m.def("use_isa", &use_isa_named);
  m.def("vendor", [] { return std::string(vendor()); });
  m.def("thread_runtime", [] { return std::string(thread_runtime()); });
  qempo::bind_door(m);
  bind_logps(m);
  bind_dpp(m);
  bind_losses(m);
  bind_memory(m);
#ifdef QEMPO_HAS_CUDA
  qempo::cuda::bind_dpp(m);
#endif
}
