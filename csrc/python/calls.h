// The functions that Python calls, one file for each family of operators, and how one is entered.
#pragma once

#include <exception>

#include "python/arguments.h"

namespace hos {

PyObject* noise_call(Arguments&);
PyObject* step_call(Arguments&);
PyObject* step_backward_call(Arguments&);
PyObject* direct_step_call(Arguments&);
PyObject* loss_call(Arguments&);
PyObject* loss_backward_call(Arguments&);
PyObject* loss_scratch_call(Arguments&);
PyObject* direct_loss_call(Arguments&);
PyObject* assemble_call(Arguments&);
PyObject* matvec_call(Arguments&);
PyObject* matvec_scratch_call(Arguments&);

inline PyObject* none() { return py::none().release().ptr(); }

// Python's entry: what a call throws becomes a Python error.
template <PyObject* (*call)(Arguments&)>
PyObject* enter(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  try {
    Arguments in(values, positional, names);
    return call(in);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <PyObject* (*call)(Arguments&)>
PyMethodDef method(const char* name) {
  const auto entry = reinterpret_cast<void (*)()>(&enter<call>);
  return {name, reinterpret_cast<PyCFunction>(entry), METH_FASTCALL | METH_KEYWORDS, nullptr};
}

}  // namespace hos
