// The table of CUDA kernels: the CPU table's operations on a device and a stream. A failure throws
// std::runtime_error with the CUDA message.
#pragma once

#include "low_rank.h"
#include "ozaki.h"
#include "philox.h"
#include "second_order_loss.h"

namespace hos {

struct Launch {
  int device;
  void* stream;  // cudaStream_t
};

// 0 where the driver is as new as the runtime linked here; otherwise the driver's version (or -1).
int cuda_driver_too_old();

void noise_cuda(const NoiseKey&, const uint64_t* seed, const uint64_t* offset, int uniform,
                int dtype, int64_t n, void* out, Launch);
void step_cuda(const StepArgs&, int dtype, Launch);
void step_backward_cuda(const StepArgs&, int dtype, Launch);
void loss_cuda(const LossArgs&, int dtype, Launch);
void loss_backward_cuda(const LossArgs&, int dtype, Launch);
void assemble_cuda(const LowRankArgs&, int dtype, Launch);
void matvec_cuda(const LowRankArgs&, int dtype, Launch);

}  // namespace hos
