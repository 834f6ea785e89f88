// Addresses of torch's tensors, each looked at as it is taken: qempo_fast/_door.py in a tenth of its time.
//
// torch publishes a table of C functions by DLPack's exchange interface (torch.Tensor.__dlpack_c_exchange_api__), so
// that this module needs neither torch's headers nor its library. Where a torch has none, Python does the same.
#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "bindings.h"

namespace qempo {
namespace {

// DLPack 1.3, as its specification has it.
struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLExchange {
  uint32_t major, minor;
  DLExchange* before;
  void *allocate, *managed_from, *managed_to;
  int (*tensor_from)(void* object, DLTensor* out);
  void* stream;
};
constexpr int kCpu = 1, kCuda = 2, kRocm = 10;

struct Door {
  const DLExchange* torch = nullptr;
  std::vector<std::pair<PyObject*, DLDataType>> dtypes;
  PyObject* type = nullptr;   // torch.Tensor
  PyObject* wrong = nullptr;  // called with (tensor, dtype, count, device), and raises
};
Door door;

bool dense(const DLTensor& x, int64_t count) {
  int64_t step = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    if (x.shape[i] != 1 && x.strides && x.strides[i] != step && count) return false;
    step *= x.shape[i];
  }
  return step == count;
}

bool there(const DLDevice& device, long wanted) {
  return wanted < 0 ? device.type == kCpu : (device.type == kCuda || device.type == kRocm) && device.id == wanted;
}

bool suits(const DLTensor& x, PyObject* dtype, int64_t count, long device) {
  for (const auto& [object, kind] : door.dtypes)
    if (object == dtype)
      return std::memcmp(&kind, &x.dtype, sizeof(kind)) == 0 && there(x.device, device) && dense(x, count) &&
             (x.data || !count);
  return false;
}

// (tensor, dtype, count, device = -1)
PyObject* address(PyObject*, PyObject* const* args, Py_ssize_t given) {
  if (given < 3 || given > 4 || !door.torch) {
    PyErr_SetString(PyExc_TypeError, "address: wanted (tensor, dtype, count, device), after use_tensors");
    return nullptr;
  }
  const int64_t count = PyLong_AsLongLong(args[2]);
  const long device = given == 4 ? PyLong_AsLong(args[3]) : -1;
  if (PyErr_Occurred()) return nullptr;
  DLTensor x{};
  const bool read = door.torch->tensor_from(args[0], &x) == 0;
  if (read && suits(x, args[1], count, device))
    return PyLong_FromVoidPtr(static_cast<char*>(x.data) + (x.data ? x.byte_offset : 0));
  PyErr_Clear();
  py::object said = py::reinterpret_steal<py::object>(
      PyObject_CallFunction(door.wrong, "OOLl", args[0], args[1], static_cast<long long>(count), device));
  if (said) PyErr_SetString(PyExc_RuntimeError, "address: a tensor that native code cannot read");
  return nullptr;
}

PyObject* maybe(PyObject* self, PyObject* const* args, Py_ssize_t given) {
  if (given && args[0] == Py_None) Py_RETURN_NONE;
  return address(self, args, given);
}

bool among(const DLDataType& dtype, PyObject* objects) {
  for (const auto& [object, kind] : door.dtypes)
    if (std::memcmp(&kind, &dtype, sizeof(kind)) == 0)
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(objects); ++i)
        if (PyTuple_GET_ITEM(objects, i) == object) return true;
  return false;
}

// shape: None, or a size of each dimension, -1 for any.
bool shaped(const DLTensor& x, PyObject* shape) {
  if (shape == Py_None) return true;
  if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) != x.ndim) return false;
  for (int i = 0; i < x.ndim; ++i) {
    const int64_t wanted = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
    if (wanted != x.shape[i] && (wanted != -1 || PyErr_Occurred())) return false;
  }
  return true;
}

// Whether x is a torch.Tensor, and no subclass, whose memory torch shows.
bool plain(PyObject* x, DLTensor& out) {
  if (!door.torch || reinterpret_cast<PyObject*>(Py_TYPE(x)) != door.type) return false;
  const bool read = door.torch->tensor_from(x, &out) == 0;
  PyErr_Clear();
  return read;
}

// (x, dtypes, ndim or None, shape or None): whether x is a plain tensor with memory of its own, of one of dtypes, and
// shaped so. False may also mean that nobody can say from here.
PyObject* fits(PyObject*, PyObject* const* args, Py_ssize_t given) {
  if (given != 4 || !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "fits: wanted (x, dtypes, ndim, shape)");
    return nullptr;
  }
  DLTensor x{};
  const bool good = plain(args[0], x) && among(x.dtype, args[1]) &&
                    (args[2] == Py_None || PyLong_AsLong(args[2]) == x.ndim) && shaped(x, args[3]);
  PyErr_Clear();
  // null is the address of what is empty, and of freed memory.
  return PyBool_FromLong(good && (x.data || std::count(x.shape, x.shape + x.ndim, 0)));
}

bool same(const DLTensor& a, const DLTensor& b, bool shapes) {
  return std::memcmp(&a.dtype, &b.dtype, sizeof(a.dtype)) == 0 && a.device.type == b.device.type &&
         a.device.id == b.device.id &&
         (!shapes || (a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape)));
}

// (tensors, dtypes, vectors): whether all are plain tensors of one device and one of dtypes; None may stand behind the
// first. vectors: and of one dimension and one length.
PyObject* alike(PyObject*, PyObject* const* args, Py_ssize_t given) {
  if (given != 3 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "alike: wanted (tensors, dtypes, vectors)");
    return nullptr;
  }
  const bool vectors = args[2] == Py_True;
  DLTensor first{}, x{};
  bool good = PyTuple_GET_SIZE(args[0]) && plain(PyTuple_GET_ITEM(args[0], 0), first) && among(first.dtype, args[1]) &&
              (!vectors || first.ndim == 1);
  for (Py_ssize_t i = 1; good && i < PyTuple_GET_SIZE(args[0]); ++i) {
    PyObject* item = PyTuple_GET_ITEM(args[0], i);
    good = item == Py_None || (plain(item, x) && same(first, x, vectors));
  }
  return PyBool_FromLong(good);
}

// torch negates such a view as it is read, and native code would not.
bool negated(PyObject* x) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* said = PyObject_CallMethodNoArgs(x, name);
  Py_XDECREF(said);
  return said != Py_False;
}

// (tensors): whether each is None, or a plain tensor that native code reads as it lies.
PyObject* all_dense(PyObject*, PyObject* tensors) {
  PyObject* items = PySequence_Fast(tensors, "all_dense: wanted tensors");
  if (!items) return nullptr;
  bool good = true;
  DLTensor x{};
  for (Py_ssize_t i = 0; good && i < PySequence_Fast_GET_SIZE(items); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(items, i);
    good = item == Py_None || (plain(item, x) && !negated(item));
    if (good && item != Py_None)
      good = dense(x, std::accumulate(x.shape, x.shape + x.ndim, int64_t{1}, std::multiplies<>()));
  }
  Py_DECREF(items);
  PyErr_Clear();
  return PyBool_FromLong(good);
}

template <class F>
constexpr PyCFunction fast(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"address", fast(&address), METH_FASTCALL, "Address of a dense tensor; raises for any other."},
    {"maybe", fast(&maybe), METH_FASTCALL, "The same, and None of None."},
    {"fits", fast(&fits), METH_FASTCALL, "Whether a tensor has the dtype and shape that are asked for."},
    {"all_dense", &all_dense, METH_O, "Whether native code can read tensors as they lie."},
    {"alike", fast(&alike), METH_FASTCALL, "Whether tensors have one dtype and device."},
    {nullptr, nullptr, 0, nullptr},
};

// Whether address() and maybe() can be used: capsule is torch.Tensor.__dlpack_c_exchange_api__, type torch.Tensor,
// dtypes are (torch's object, DLPack's code, bits).
bool use_tensors(const py::capsule& capsule, const py::object& type,
                 const std::vector<std::tuple<py::object, int, int>>& dtypes, const py::object& wrong) {
  const auto* torch = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!torch) throw py::error_already_set();
  if (torch->major != 1 || !torch->tensor_from) return false;
  // For the life of the process, as torch's own objects are.
  for (const auto& [object, code, bits] : dtypes)
    door.dtypes.emplace_back(py::object(object).release().ptr(),
                             DLDataType{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1});
  door.type = py::object(type).release().ptr();
  door.wrong = py::object(wrong).release().ptr();
  door.torch = torch;
  return true;
}

}  // namespace

void bind_door(py::module_& m) {
  m.def("use_tensors", &use_tensors);
  for (PyMethodDef* method = methods; method->ml_name; ++method)
    m.attr(method->ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(method, nullptr));
}

}  // namespace qempo
