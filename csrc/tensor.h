// What the kernels need to know of a Python tensor. Nothing links torch: `connect` (call.cpp)
// brings what is asked of it, and DLPack's C exchange interface (torch 2.10 and later) tells of a
// tensor what its Python attributes tell elsewhere.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>

#include "common.h"

namespace hos {

namespace {

namespace py = pybind11;

// The binary interface of DLPack 1: what is needed of it, in its order.
struct DlTensor {
  void* data;
  int32_t device_type, device;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
static_assert(sizeof(DlTensor) == 48 && offsetof(DlTensor, byte_offset) == 40, "DLPack's layout");

struct DlExchange {
  uint32_t major, minor;
  const DlExchange* previous;
  void (*others[3])();
  int (*read)(void* object, DlTensor* out);
};

constexpr int kDlCpu = 1, kDlFloat = 2, kDlBFloat = 4;
constexpr int kMaxDims = 8;
constexpr int64_t kWidths[] = {4, 8, 2, 2};  // bytes, in the order of DType

// What `connect` was given; kept as long as the process lives.
struct Torch {
  PyObject *tensor, *dtypes, *watchers;
  PyObject *grad_enabled, *empty_like, *increment_version, *fresh_seed, *threads;
  const DlExchange* exchange;
} torch;

struct Names {
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
}* names;

// Takes over a new reference, or the Python error that came instead.
py::object taken(PyObject* owned) {
  if (owned == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(owned);
}

bool is_true(PyObject* owned) {
  const py::object answer = taken(owned);
  const int truth = PyObject_IsTrue(answer.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

struct Seen {
  char* data;
  bool cpu;
  int dtype, dims;  // -1: no dtype of the kernels
  int64_t shape[kMaxDims], strides[kMaxDims];

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= shape[i];
    return n;
  }

  bool contiguous() const {
    int64_t n = 1;
    for (int i = dims - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != n) return false;
      n *= shape[i];
    }
    return true;
  }

  bool like(const Seen& other) const {
    bool same = dtype == other.dtype && dims == other.dims;
    for (int i = 0; same && i < dims; ++i) same = shape[i] == other.shape[i];
    return same;
  }
};

void check_dims(int64_t dims) {
  if (dims > kMaxDims) throw std::runtime_error("hos_ext: a tensor of more than 8 axes");
}

Seen read_exchange(PyObject* t) {
  DlTensor d{};
  if (torch.exchange->read(t, &d) != 0) throw py::error_already_set();
  check_dims(d.dims);
  const int kind = d.lanes == 1 ? d.code * 256 + d.bits : 0;
  Seen seen{};
  seen.data = static_cast<char*>(d.data) + d.byte_offset;
  seen.cpu = d.device_type == kDlCpu;
  seen.dtype = kind == kDlFloat * 256 + 32    ? kFloat32
               : kind == kDlFloat * 256 + 64  ? kFloat64
               : kind == kDlFloat * 256 + 16  ? kFloat16
               : kind == kDlBFloat * 256 + 16 ? kBFloat16
                                              : -1;
  seen.dims = d.dims;
  for (int i = 0; i < d.dims; ++i) {
    seen.shape[i] = d.shape[i];
    seen.strides[i] = d.strides[i];
  }
  return seen;
}

int read_sizes(PyObject* owned, int64_t* out) {
  const py::tuple sizes = taken(owned);
  check_dims(int64_t(sizes.size()));
  for (const py::handle size : sizes) *out++ = size.cast<int64_t>();
  return int(sizes.size());
}

Seen read_attributes(PyObject* t) {
  Seen seen{};
  seen.cpu = is_true(PyObject_GetAttr(t, names->is_cpu));
  const py::object dtype = taken(PyObject_GetAttr(t, names->dtype));
  seen.dtype = -1;
  for (int i = 0; i < int(PyTuple_GET_SIZE(torch.dtypes)); ++i) {
    if (dtype.ptr() == PyTuple_GET_ITEM(torch.dtypes, i)) seen.dtype = i;
  }
  seen.dims = read_sizes(PyObject_GetAttr(t, names->shape), seen.shape);
  read_sizes(PyObject_CallMethodNoArgs(t, names->stride), seen.strides);
  const py::object address = taken(PyObject_CallMethodNoArgs(t, names->data_ptr));
  seen.data = static_cast<char*>(PyLong_AsVoidPtr(address.ptr()));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return seen;
}

// Throws for a tensor without memory, such as torch's zeros that are nowhere.
Seen read(PyObject* t) {
  const Seen seen = torch.exchange != nullptr ? read_exchange(t) : read_attributes(t);
  if (seen.data == nullptr && seen.count() > 0) {
    throw std::runtime_error("hos_ext: tensors must have memory, got one without");
  }
  return seen;
}

}  // namespace

}  // namespace hos
