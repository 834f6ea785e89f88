// What the parts of the Python module share. Addresses come as integers: Python checks, allocates and keeps alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace qempo {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Of functions that run long enough to let other Python threads work.
using release = py::call_guard<py::gil_scoped_release>;

// Each adds the functions of its op to the module, from the file of its name.
namespace cpu {
void bind_dpp(py::module_& m);
void bind_logps(py::module_& m);
void bind_losses(py::module_& m);
void bind_memory(py::module_& m);
}  // namespace cpu
namespace cuda { void bind_dpp(py::module_& m); }  // namespace cuda

}  // namespace qempo
