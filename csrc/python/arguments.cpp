// How the arguments of a call are found and read.

#include "python/arguments.h"

#include <stdexcept>
#include <string>

namespace hos {

void Level::take(PyObject* value, int64_t rows) {
  if (PyFloat_Check(value)) {
    number_ = PyFloat_AS_DOUBLE(value);
    return;
  }
  take(read(value), rows);
}

void Level::take(const Seen& seen, int64_t rows) {
  const int64_t stride = seen.dims == 1 ? seen.strides[0] : 0;
  if (seen.dims > 1 || (seen.dims == 1 && seen.shape[0] != rows) ||
      (seen.dtype != kFloat64 && !(seen.cpu && seen.dtype == kFloat32))) {
    throw std::runtime_error("hos_ext: values of a shape or dtype that no kernel reads");
  }
  each_ = reinterpret_cast<const double*>(seen.data);
  if (!seen.cpu || (seen.dtype == kFloat64 && stride == 1)) return;
  held_.reserve(size_t(rows));
  for (int64_t row = 0; row < rows; ++row) {
    const char* at = seen.data + row * stride * kDTypeBytes[seen.dtype];
    held_.push_back(seen.dtype == kFloat64 ? *reinterpret_cast<const double*>(at)
                                           : double(*reinterpret_cast<const float*>(at)));
  }
  each_ = held_.data();
}

Arguments::Arguments(PyObject* const* values, Py_ssize_t positional, PyObject* names)
    : values_(values), names_(names), count_(names == nullptr ? 0 : PyTuple_GET_SIZE(names)) {
  if (positional != 0) throw py::type_error("arguments must be given by name");
}

PyObject* Arguments::find(const char* name, size_t length) {
  for (Py_ssize_t at = 0; at < count_; ++at) {
    if (!is_named(at, name, length)) continue;
    next_ = at + 1;
    return values_[at];
  }
  throw py::type_error(std::string("missing argument ") + name);
}

void Arguments::done() const {
  if (asked_ == count_) return;
  throw py::type_error("expected " + std::to_string(asked_) + " arguments, got " +
                       std::to_string(count_));
}

int64_t Arguments::to_size(PyObject* value) {
  const int64_t size = PyLong_AsLongLong(value);
  if (size == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return size;
}

uint64_t Arguments::to_bits(PyObject* value) {
  const uint64_t bits = PyLong_AsUnsignedLongLongMask(value);
  if (bits == uint64_t(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return bits;
}

Counter Arguments::to_counter(PyObject* value) {
  if (PyLong_Check(value)) return {to_bits(value), nullptr};
  const Seen seen = read(value);
  const auto* there = reinterpret_cast<const uint64_t*>(seen.data);
  return seen.cpu ? Counter{*there, nullptr} : Counter{0, there};
}

Queue Arguments::queue() {
  PyObject* pair = object("queue");
  if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
    throw py::type_error("queue must be (device, threads or stream)");
  }
  return {int(to_size(PyTuple_GET_ITEM(pair, 0))), to_bits(PyTuple_GET_ITEM(pair, 1))};
}

uint64_t Arguments::tag(int stream, Counter* offset) {
  *offset = counter("offset");
  if (offset->number >> 56 != 0) {  // a tensor that could not be read before, in a graph
    throw py::value_error("offset must be in [0, 2**56), got " +
                          std::to_string(int64_t(offset->number)));
  }
  return offset->number | uint64_t(stream) << 56;
}

}  // namespace hos
