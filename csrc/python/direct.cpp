// What a direct call asks of its arguments.

#include "python/direct.h"

#include "base/common.h"

namespace hos {

bool is_plain(PyObject* t) {
  return t == Py_None || Py_TYPE(t) == reinterpret_cast<PyTypeObject*>(torch.tensor);
}

bool requires_grad(PyObject* t) { return is_true(PyObject_GetAttr(t, names.requires_grad)); }

Verdict observed(PyObject* const* tensors, int count) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch.watchers); ++i) {
    if (is_true(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch.watchers, i)))) return kRefused;
  }
  if (!is_true(PyObject_CallNoArgs(torch.grad_enabled))) return kDirect;
  for (int i = 0; i < count; ++i) {
    if (tensors[i] != Py_None && requires_grad(tensors[i])) return kTracked;
  }
  return kDirect;
}

bool read_memory(PyObject* t, Seen* out) {
  *out = read(t);
  return out->cpu && out->dtype >= 0 && !is_true(PyObject_CallMethodNoArgs(t, names.is_neg));
}

bool read_counter(PyObject* value, int bits, uint64_t* out) {
  if (!PyLong_CheckExact(value)) return false;
  *out = PyLong_AsUnsignedLongLong(value);
  if (*out == uint64_t(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return bits == 64 || *out >> bits == 0;
}

bool read_level(PyObject* value, int64_t rows, Level* out) {
  if (PyFloat_CheckExact(value)) {
    out->take(value, rows);
    return is_positive(out->number());
  }
  Seen seen;
  if (value == Py_None || !is_plain(value) || !read_memory(value, &seen) || seen.dtype > kFloat64 ||
      seen.dims > 1 || (seen.dims == 1 && seen.shape[0] != rows) || requires_grad(value)) {
    return false;
  }
  out->take(seen, rows);
  for (int64_t row = 0; row < rows; ++row) {
    if (!is_positive(out->each()[row])) return false;
  }
  return true;
}

}  // namespace hos
