// The index of the native side: every function that Python calls. _C.pyi describes their arguments
// for type checkers. Nothing here knows torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "python/calls.h"
#include "python/kernels.h"
#include "python/tensor.h"

namespace {

namespace py = pybind11;

PyMethodDef methods[] = {
    hos::method<hos::noise_call>("noise"),
    hos::method<hos::step_call>("step"),
    hos::method<hos::step_backward_call>("step_backward"),
    hos::method<hos::direct_step_call>("direct_step"),
    hos::method<hos::loss_call>("loss"),
    hos::method<hos::loss_backward_call>("loss_backward"),
    hos::method<hos::loss_scratch_call>("loss_scratch"),
    hos::method<hos::direct_loss_call>("direct_loss"),
    hos::method<hos::assemble_call>("assemble"),
    hos::method<hos::matvec_call>("matvec"),
    hos::method<hos::matvec_scratch_call>("matvec_scratch"),
    {nullptr, nullptr, 0, nullptr},
};

py::dict build_info() {
  py::dict info;
  info["version"] = HOS_VERSION;
  info["compiler"] = HOS_COMPILER;
  info["cpu_level"] = hos::cpu_kernels().level;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(HOS_CUDA)
  info["cuda_built"] = true;
  info["cuda_archs"] = HOS_CUDA_ARCHS;
  info["cuda_reason"] = "";
#else
  info["cuda_built"] = false;
  info["cuda_archs"] = "";
  info["cuda_reason"] = HOS_CUDA_REASON;
#endif
  return info;
}

// 0: CUDA can run here; otherwise what the driver reports (-1: none, or built without CUDA).
int cuda_driver_too_old() {
#if defined(HOS_CUDA)
  return hos::cuda_driver_too_old();
#else
  return -1;
#endif
}

// A loss in the order of LossKind: name, points, whether it takes diag and factor, and what it
// saves of a sample for backward, as numbers of columns^2 and of columns (columns = r + 1).
using LossRecord = std::tuple<const char*, int64_t, bool, bool, int64_t, int64_t>;

py::tuple losses() {
  py::list records;
  for (int kind = 0; kind < hos::kLossKinds; ++kind) {
    // saved_size is a columns^2 + b columns.
    const int64_t one = hos::saved_size(kind, 0), two = hos::saved_size(kind, 1);
    const int64_t a = two / 2 - one, b = one - a;
    records.append(LossRecord(hos::kLossNames[kind], hos::points_of(kind), hos::has_diag(kind),
                              hos::has_factor(kind), a, b));
  }
  return py::tuple(records);
}

template <size_t N>
py::tuple names(const char* const (&list)[N]) {
  py::tuple out(N);
  for (size_t i = 0; i < N; ++i) out[i] = py::str(list[i]);
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  try {
    hos::cpu_kernels();
  } catch (const std::invalid_argument& error) {
    throw py::import_error(error.what());
  }
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("connect", &hos::connect, py::kw_only(), py::arg("exchange"), py::arg("tensor"),
        py::arg("dtypes"), py::arg("watchers"), py::arg("grad_enabled"), py::arg("empty_like"),
        py::arg("increment_version"), py::arg("fresh_seed"), py::arg("threads"));
  m.def("losses", &losses);
  m.def("curvatures", [] { return names(hos::kCurvatureNames); });
  m.def("dtypes", [] { return names(hos::kDTypeNames); });
  m.def("build_info", &build_info);
  m.def("cuda_driver_too_old", &cuda_driver_too_old);
}
