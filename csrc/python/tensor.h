// What the kernels need to know of a Python tensor. Nothing links torch: `connect` brings what is
// asked of it, and DLPack's C exchange interface (torch 2.10 and later) tells of a tensor what its
// Python attributes tell elsewhere.
#pragma once

#include <pybind11/pybind11.h>

#include "base/view.h"

namespace hos {

namespace py = pybind11;

constexpr int kMaxDims = 8;

struct DlExchange;

// What `connect` was given. Kept as long as the process lives.
struct Torch {
  PyObject *tensor, *dtypes, *watchers;
  PyObject *grad_enabled, *empty_like, *increment_version, *fresh_seed, *threads;
  const DlExchange* exchange;
};
extern const Torch& torch;

// The names of attributes and methods of a tensor.
struct Names {
  PyObject *is_neg, *requires_grad, *is_cpu, *dtype, *shape, *stride, *data_ptr, *new_empty;
};
extern const Names& names;

// `exchange`: DLPack's capsule, or None. The others: torch.Tensor; the dtypes in the order of
// DType; functions that answer whether something watches the calls; and torch's functions.
void connect(const py::object& exchange, const py::object& tensor, const py::tuple& dtypes,
             const py::tuple& watchers, const py::object& grad_enabled,
             const py::object& empty_like, const py::object& increment_version,
             const py::object& fresh_seed, const py::object& threads);

// Takes over a new reference, or the Python error that came instead.
py::object taken(PyObject* owned);
bool is_true(PyObject* owned);

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

  // Whether the axes from `first` on are dense: one run of memory for each place in the others.
  bool dense(int first = 0) const {
    int64_t n = 1;
    for (int i = dims - 1; i >= first; --i) {
      if (shape[i] != 1 && strides[i] != n) return false;
      n *= shape[i];
    }
    return true;
  }

  // Whether the axes after `lead` leading ones, and the dtype, are those of another tensor.
  bool like(const Seen& other, int lead = 0) const {
    bool same = dtype == other.dtype && dims == other.dims + lead;
    for (int i = 0; same && i < other.dims; ++i) same = shape[lead + i] == other.shape[i];
    return same;
  }
};

// Throws for a tensor without memory, such as torch's zeros that are nowhere.
Seen read(PyObject* t);

// `([points], B, *dims)`, whose rows are dense, and `([points], B, D, columns)`; `stacked` if the
// points are there. No data for a tensor that was None.
View rows_of(const Seen& t, bool stacked);
View columns_of(const Seen& t, bool stacked);

}  // namespace hos
