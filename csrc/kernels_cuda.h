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
// Elements of scratch that a loss needs: sums of the chunks of samples that several blocks share.
int64_t loss_scratch(int kind, int64_t batch, int64_t size, int64_t rank);
void loss_cuda(const LossArgs&, int dtype, Launch);
void loss_backward_cuda(const LossArgs&, int dtype, Launch);
void assemble_cuda(const LowRankArgs&, int dtype, Launch);
// Elements of scratch that a product needs: U^T v of chunks of rows.
int64_t matvec_scratch(int64_t batch, int64_t size, int64_t rank, int64_t columns);
void matvec_cuda(const LowRankArgs&, int dtype, Launch);

}  // namespace hos
