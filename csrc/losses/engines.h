// The engines of the losses, each for the CPU and for CUDA, and which of them takes what
// (loss.cpp).
#pragma once

#include "losses/loss.h"

namespace hos {
inline namespace HOS_ISA {

// The losses without a factor.
void entrywise_loss(const LossArgs&, int dtype, Queue);
void entrywise_backward(const LossArgs&, int dtype, Queue);
int64_t entrywise_scratch(int64_t batch, int64_t size);

// The losses of low rank, of any size.
void low_rank_loss(const LossArgs&, int dtype, Queue);
void low_rank_backward(const LossArgs&, int dtype, Queue);
int64_t low_rank_scratch(int kind, int64_t batch, int64_t size, int64_t rank);

// The same for samples of few entries, which lie side by side in a vector or a warp.
bool is_small(int64_t size, int64_t rank);
void small_loss(const LossArgs&, int dtype, Queue);
void small_backward(const LossArgs&, int dtype, Queue);

}  // namespace HOS_ISA
}  // namespace hos
