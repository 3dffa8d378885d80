// The table of kernels: the same operations for each instruction set of the CPU and for CUDA, and
// which of the tables serves a call.
#pragma once

#include "hessian/hessian.h"
#include "losses/loss.h"
#include "noise/noise.h"
#include "steps/step.h"

namespace hos {

struct Kernels {
  const char* level;  // the instruction set
  decltype(&hos::noise) noise;
  decltype(&hos::step) step;
  decltype(&hos::step_backward) step_backward;
  decltype(&hos::loss) loss;
  decltype(&hos::loss_backward) loss_backward;
  decltype(&hos::loss_scratch) loss_scratch;
  decltype(&hos::assemble) assemble;
  decltype(&hos::matvec) matvec;
  decltype(&hos::matvec_scratch) matvec_scratch;
};

// The CPU kernels in use: the widest instruction set that the processor has, or HOS_CPU_LEVEL.
const Kernels& cpu_kernels();

// Those that serve a queue; throws for CUDA where the module was built without.
const Kernels& kernels(const Queue&);

}  // namespace hos
