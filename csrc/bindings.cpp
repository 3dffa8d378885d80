// The index of the native side: addresses, sizes and strides come in as integers, checked by
// hos_ext/ops.py; steps and losses read tensors themselves (call.cpp). Nothing here knows torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "call.h"

#if defined(HOS_X86)
HOS_DECLARE_KERNELS(x86_v3)
HOS_DECLARE_KERNELS(x86_v4)
#endif

namespace py = pybind11;
using hos::Kernels;
using hos::kernels;
using hos::pointer;
using hos::run;
using hos::View;

namespace {

#define HOS_TABLE(isa)           \
  {#isa,                         \
   &hos::isa::noise_cpu,         \
   &hos::isa::step_cpu,          \
   &hos::isa::step_backward_cpu, \
   &hos::isa::loss_cpu,          \
   &hos::isa::loss_backward_cpu, \
   &hos::isa::assemble_cpu,      \
   &hos::isa::matvec_cpu}

// The widest instruction set that the processor has, or the one that HOS_CPU_LEVEL names.
Kernels choose_kernels() {
  const char* wish = std::getenv("HOS_CPU_LEVEL");
  const std::string name = wish == nullptr ? "" : wish;
  if (!name.empty() && name != "baseline" && name != "x86_v3" && name != "x86_v4") {
    throw py::import_error("HOS_CPU_LEVEL must be baseline, x86_v3 or x86_v4, got " + name);
  }
#if defined(HOS_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if ((name == "x86_v4" && !v4) || (name == "x86_v3" && !v3)) {
    throw py::import_error("HOS_CPU_LEVEL=" + name + " is not supported by this processor");
  }
  if (v4 && (name.empty() || name == "x86_v4")) return HOS_TABLE(x86_v4);
  if (v3 && name != "baseline") return HOS_TABLE(x86_v3);
#else
  if (!name.empty() && name != "baseline") {
    throw py::import_error("HOS_CPU_LEVEL must be baseline on this processor, got " + name);
  }
#endif
  return HOS_TABLE(baseline);
}

// (address, point, batch, row, column) as ops.py passes a tensor.
using Tensor = std::array<int64_t, 5>;

View view(const Tensor& t) {
  return View{pointer<const void>(uint64_t(t[0])), t[1], t[2], t[3], t[4]};
}

void noise(int device, uint64_t queue, int dtype, bool uniform, int64_t n, uint64_t seed,
           uint64_t tag, uint64_t start, uint64_t seed_pointer, uint64_t offset_pointer,
           uint64_t out) {
  const hos::NoiseKey key{seed, tag, start};
  (void)seed_pointer;
  (void)offset_pointer;
  run(
      device, queue,
      [&](int threads) {
        kernels().noise(key, uniform, dtype, n, pointer<void>(out), threads);
        return int64_t(0);
      },
      HOS_ON_CUDA(hos::noise_cuda(key, pointer<const uint64_t>(seed_pointer),
                                  pointer<const uint64_t>(offset_pointer), uniform, dtype, n,
                                  pointer<void>(out), launch)));
}

void assemble(int device, uint64_t queue, int dtype, int64_t batch, int64_t size, int64_t rank,
              const Tensor& diag, const Tensor& factor, uint64_t sign, uint64_t out,
              int64_t out_batch, int64_t out_row) {
  hos::LowRankArgs a{};
  a.batch = batch;
  a.size = size;
  a.rank = rank;
  a.diag = view(diag);
  a.factor = view(factor);
  a.sign = pointer<const void>(sign);
  a.out = pointer<void>(out);
  a.out_batch = out_batch;
  a.out_row = out_row;
  run(
      device, queue,
      [&](int threads) {
        kernels().assemble(a, dtype, threads);
        return int64_t(0);
      },
      HOS_ON_CUDA(hos::assemble_cuda(a, dtype, launch)));
}

void matvec(int device, uint64_t queue, int dtype, int64_t batch, int64_t size, int64_t rank,
            int64_t columns, const Tensor& diag, const Tensor& factor, const Tensor& v,
            uint64_t sign, uint64_t out, uint64_t scratch) {
  hos::LowRankArgs a{};
  a.batch = batch;
  a.size = size;
  a.rank = rank;
  a.columns = columns;
  a.diag = view(diag);
  a.factor = view(factor);
  a.v = view(v);
  a.sign = pointer<const void>(sign);
  a.out = pointer<void>(out);
  a.scratch = pointer<void>(scratch);
  run(
      device, queue,
      [&](int threads) {
        kernels().matvec(a, dtype, threads);
        return int64_t(0);
      },
      HOS_ON_CUDA(hos::matvec_cuda(a, dtype, launch)));
}

py::dict build_info() {
  py::dict info;
  info["version"] = HOS_VERSION;
  info["compiler"] = HOS_COMPILER;
  info["cpu_level"] = kernels().level;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(HOS_CUDA)
  info["cuda_built"] = true;
  info["cuda_archs"] = HOS_CUDA_ARCHS;
#else
  info["cuda_built"] = false;
  info["cuda_archs"] = "";
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

}  // namespace

const Kernels& hos::kernels() {
  static const Kernels chosen = choose_kernels();
  return chosen;
}

PYBIND11_MODULE(_C, m) {
  kernels();
  m.def("noise", &noise);
  m.def("saved_size", &hos::saved_size);
#if defined(HOS_CUDA)
  m.def("loss_scratch", &hos::loss_scratch);
  m.def("matvec_scratch", &hos::matvec_scratch);
#endif
  m.def("assemble", &assemble);
  m.def("matvec", &matvec);
  m.def("build_info", &build_info);
  m.def("cuda_driver_too_old", &cuda_driver_too_old);
  hos::add_calls(m);  // steps and losses, which take tensors
}
