// The table of CPU kernels. Every *_cpu.cpp is compiled once for each instruction set, in a
// namespace of that name; the module picks one set when it loads. Returned: 0, or 1 + the row whose
// sigma or step size is not a positive finite number.
#pragma once

#include "low_rank.h"
#include "ozaki.h"
#include "philox.h"
#include "second_order_loss.h"

#define HOS_DECLARE_KERNELS(isa)                                                      \
  namespace hos {                                                                     \
  inline namespace isa {                                                              \
  void noise_cpu(const NoiseKey&, int uniform, int dtype, int64_t n, void* out, int); \
  int64_t step_cpu(const StepArgs&, int dtype, int threads);                          \
  void step_backward_cpu(const StepArgs&, int dtype, int threads);                    \
  int64_t loss_cpu(const LossArgs&, int dtype, int threads);                          \
  void loss_backward_cpu(const LossArgs&, int dtype, int threads);                    \
  void assemble_cpu(const LowRankArgs&, int dtype, int threads);                      \
  void matvec_cpu(const LowRankArgs&, int dtype, int threads);                        \
  }                                                                                   \
  }
