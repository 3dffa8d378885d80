// Where a kernel runs: on the CPU with so many threads, or on a stream of a CUDA device.
#pragma once

#include "base/common.h"

namespace hos {

struct Queue {
  int device;       // -1: the CPU
  uint64_t handle;  // the number of threads on the CPU, else the cudaStream_t

  HOS_HD bool on_cpu() const { return device < 0; }
  HOS_HD int threads() const { return int(handle); }
  HOS_HD void* stream() const { return reinterpret_cast<void*>(handle); }
};

// 0 where the CUDA driver is as new as the runtime linked here; otherwise its version, or -1.
int cuda_driver_too_old();

}  // namespace hos
