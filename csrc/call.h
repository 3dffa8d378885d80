// What bindings.cpp and call.cpp share: the kernels in use, and how one is run.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "kernels.h"

#if defined(HOS_CUDA)
#include "kernels_cuda.h"
#endif

HOS_DECLARE_KERNELS(baseline)

namespace hos {

// The CPU kernels of one instruction set.
struct Kernels {
  const char* level;
  decltype(&baseline::noise_cpu) noise;
  decltype(&baseline::step_cpu) step;
  decltype(&baseline::step_backward_cpu) step_backward;
  decltype(&baseline::loss_cpu) loss;
  decltype(&baseline::loss_backward_cpu) loss_backward;
  decltype(&baseline::assemble_cpu) assemble;
  decltype(&baseline::matvec_cpu) matvec;
};

const Kernels& kernels();

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// `device` is -1 for the CPU, where `queue` is the number of threads; else `queue` is the stream.
template <class Cpu, class Cuda>
int64_t run(int device, uint64_t queue, const Cpu& cpu, const Cuda& cuda) {
  pybind11::gil_scoped_release unlocked;
  if (device < 0) return cpu(int(queue));
#if defined(HOS_CUDA)
  cuda(Launch{device, pointer<void>(queue)});
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

// Adds the functions of call.cpp to the module.
void add_calls(pybind11::module_& m);

}  // namespace hos
