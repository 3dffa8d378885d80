// The index of the native side: addresses, sizes and strides come in as integers, checked by
// hos_ext/ops.py. `device` is -1 for the CPU, where `queue` is the number of threads; on a CUDA
// device it is the stream. Nothing here knows torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "kernels.h"

#if defined(HOS_CUDA)
#include "kernels_cuda.h"
#endif

HOS_DECLARE_KERNELS(baseline)
#if defined(HOS_X86)
HOS_DECLARE_KERNELS(x86_v3)
HOS_DECLARE_KERNELS(x86_v4)
#endif

namespace py = pybind11;
using hos::View;

namespace {

struct Kernels {
  const char* level;
  decltype(&hos::baseline::noise_cpu) noise;
  decltype(&hos::baseline::step_cpu) step;
  decltype(&hos::baseline::step_backward_cpu) step_backward;
  decltype(&hos::baseline::loss_cpu) loss;
  decltype(&hos::baseline::loss_backward_cpu) loss_backward;
  decltype(&hos::baseline::assemble_cpu) assemble;
  decltype(&hos::baseline::matvec_cpu) matvec;
};

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

const Kernels& kernels() {
  static const Kernels chosen = choose_kernels();
  return chosen;
}

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, point, batch, row, column) as ops.py passes a tensor.
using Tensor = std::array<int64_t, 5>;

View view(const Tensor& t) {
  return View{pointer<const void>(uint64_t(t[0])), t[1], t[2], t[3], t[4]};
}

template <class Cpu, class Cuda>
int64_t run(int device, uint64_t queue, const Cpu& cpu, const Cuda& cuda) {
  py::gil_scoped_release unlocked;
  if (device < 0) return cpu(int(queue));
#if defined(HOS_CUDA)
  cuda(hos::Launch{device, pointer<void>(queue)});
  return 0;
#else
  (void)cuda;
  throw std::runtime_error("hos_ext: built without CUDA");
#endif
}

#if defined(HOS_CUDA)
#define HOS_ON_CUDA(call) [&](hos::Launch launch) { call; }
#else
#define HOS_ON_CUDA(call) 0
#endif

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

int64_t step(int device, uint64_t queue, int dtype, int64_t rows, int64_t size, double step_size,
             uint64_t step_sizes, int curvature, uint64_t seed, uint64_t tag, uint64_t start,
             uint64_t seed_pointer, uint64_t offset_pointer, uint64_t x, int64_t x_row,
             uint64_t score, int64_t score_row, uint64_t diag, int64_t diag_row, uint64_t noise,
             int64_t noise_row, uint64_t out, int64_t out_row) {
  hos::StepArgs a{};
  a.rows = rows;
  a.size = size;
  a.step_size = step_size;
  a.step_sizes = pointer<const double>(step_sizes);
  a.curvature = curvature;
  a.seed = seed;
  a.tag = tag;
  a.start = start;
  a.seed_pointer = pointer<const uint64_t>(seed_pointer);
  a.offset_pointer = pointer<const uint64_t>(offset_pointer);
  a.x = pointer<const void>(x);
  a.x_row = x_row;
  a.score = pointer<const void>(score);
  a.score_row = score_row;
  a.diag = pointer<const void>(diag);
  a.diag_row = diag_row;
  a.noise = pointer<const void>(noise);
  a.noise_row = noise_row;
  a.out = pointer<void>(out);
  a.out_row = out_row;
  return run(
      device, queue, [&](int threads) { return kernels().step(a, dtype, threads); },
      HOS_ON_CUDA(hos::step_cuda(a, dtype, launch)));
}

void step_backward(int device, uint64_t queue, int dtype, int64_t rows, int64_t size,
                   double step_size, uint64_t step_sizes, int curvature, uint64_t seed,
                   uint64_t tag, uint64_t start, uint64_t seed_pointer, uint64_t offset_pointer,
                   uint64_t grad, int64_t grad_row, uint64_t score, int64_t score_row,
                   uint64_t diag, int64_t diag_row, uint64_t noise, int64_t noise_row,
                   uint64_t grad_score, uint64_t grad_diag, uint64_t grad_noise) {
  hos::StepArgs a{};
  a.rows = rows;
  a.size = size;
  a.step_size = step_size;
  a.step_sizes = pointer<const double>(step_sizes);
  a.curvature = curvature;
  a.seed = seed;
  a.tag = tag;
  a.start = start;
  a.seed_pointer = pointer<const uint64_t>(seed_pointer);
  a.offset_pointer = pointer<const uint64_t>(offset_pointer);
  a.grad = pointer<const void>(grad);
  a.grad_row = grad_row;
  a.score = pointer<const void>(score);
  a.score_row = score_row;
  a.diag = pointer<const void>(diag);
  a.diag_row = diag_row;
  a.noise = pointer<const void>(noise);
  a.noise_row = noise_row;
  a.grad_score = pointer<void>(grad_score);
  a.grad_diag = pointer<void>(grad_diag);
  a.grad_noise = pointer<void>(grad_noise);
  run(
      device, queue,
      [&](int threads) {
        kernels().step_backward(a, dtype, threads);
        return int64_t(0);
      },
      HOS_ON_CUDA(hos::step_backward_cuda(a, dtype, launch)));
}

hos::LossArgs loss_args(int kind, int64_t batch, int64_t size, int64_t rank, int64_t score_points,
                        const Tensor& score, const Tensor& diag, const Tensor& factor,
                        const Tensor& noise, double sigma, uint64_t sigmas, uint64_t sign,
                        uint64_t saved) {
  hos::LossArgs a{};
  a.kind = kind;
  a.batch = batch;
  a.size = size;
  a.rank = rank;
  a.score_points = score_points;
  a.score = view(score);
  a.diag = view(diag);
  a.factor = view(factor);
  a.noise = view(noise);
  a.sigma = sigma;
  a.sigmas = pointer<const double>(sigmas);
  a.sign = pointer<const void>(sign);
  a.saved = pointer<void>(saved);
  return a;
}

int64_t loss(int device, uint64_t queue, int dtype, int kind, int64_t batch, int64_t size,
             int64_t rank, int64_t score_points, const Tensor& score, const Tensor& diag,
             const Tensor& factor, const Tensor& noise, double sigma, uint64_t sigmas,
             uint64_t sign, uint64_t saved, uint64_t value) {
  hos::LossArgs a = loss_args(kind, batch, size, rank, score_points, score, diag, factor, noise,
                              sigma, sigmas, sign, saved);
  a.loss = pointer<void>(value);
  return run(
      device, queue, [&](int threads) { return kernels().loss(a, dtype, threads); },
      HOS_ON_CUDA(hos::loss_cuda(a, dtype, launch)));
}

void loss_backward(int device, uint64_t queue, int dtype, int kind, int64_t batch, int64_t size,
                   int64_t rank, int64_t score_points, const Tensor& score, const Tensor& diag,
                   const Tensor& factor, const Tensor& noise, double sigma, uint64_t sigmas,
                   uint64_t sign, uint64_t saved, uint64_t grad, int64_t grad_stride,
                   uint64_t grad_score, uint64_t grad_diag, const Tensor& grad_factor) {
  hos::LossArgs a = loss_args(kind, batch, size, rank, score_points, score, diag, factor, noise,
                              sigma, sigmas, sign, saved);
  a.grad = pointer<const void>(grad);
  a.grad_stride = grad_stride;
  a.grad_score = pointer<void>(grad_score);
  a.grad_diag = pointer<void>(grad_diag);
  a.grad_factor = view(grad_factor);
  run(
      device, queue,
      [&](int threads) {
        kernels().loss_backward(a, dtype, threads);
        return int64_t(0);
      },
      HOS_ON_CUDA(hos::loss_backward_cuda(a, dtype, launch)));
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
            uint64_t sign, uint64_t out) {
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

PYBIND11_MODULE(_C, m) {
  kernels();
  m.def("noise", &noise);
  m.def("step", &step);
  m.def("step_backward", &step_backward);
  m.def("loss", &loss);
  m.def("loss_backward", &loss_backward);
  m.def("saved_size", &hos::saved_size);
  m.def("assemble", &assemble);
  m.def("matvec", &matvec);
  m.def("build_info", &build_info);
  m.def("cuda_driver_too_old", &cuda_driver_too_old);
}
