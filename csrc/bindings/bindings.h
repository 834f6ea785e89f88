// What the parts of the Python module share. Addresses come as integers: Python checks, allocates and keeps alive.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "qempo/segments.h"

namespace qempo {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Of an argument that Python may leave out: None, never 0, which is the address of a tensor without entries.
using Maybe = std::optional<Address>;

// null where it is left out, and there alone.
template <class T>
T* at(Maybe address) {
  static std::max_align_t nothing;
  if (!address) return nullptr;
  return *address ? at<T>(*address) : reinterpret_cast<T*>(&nothing);
}

// No offsets: segments of one size.
inline cpu::Segments segments(Maybe offsets, bool wide, int64_t count, int64_t size) {
  return {at<const void>(offsets), wide, count, size};
}

// Of functions that run long enough to let other Python threads work.
using release = py::call_guard<py::gil_scoped_release>;

// Each adds the functions of its op to the module, from the file of its name.
void bind_door(py::module_& m);
namespace cpu {
void bind_dpp(py::module_& m);
void bind_logps(py::module_& m);
void bind_losses(py::module_& m);
void bind_memory(py::module_& m);
}  // namespace cpu
namespace cuda { void bind_dpp(py::module_& m); }  // namespace cuda

}  // namespace qempo
