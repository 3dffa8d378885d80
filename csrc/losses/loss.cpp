// Which engine serves which loss. Compiled for every instruction set and for CUDA.

#include "losses/engines.h"

namespace hos {
inline namespace HOS_ISA {

int64_t loss_scratch(int kind, int64_t batch, int64_t size, int64_t rank) {
  if (!has_factor(kind)) return entrywise_scratch(batch, size);
  return is_small(size, rank) ? 0 : low_rank_scratch(kind, batch, size, rank);
}

int64_t loss(const LossArgs& a, int dtype, Queue queue) {
  if (queue.on_cpu() && a.sigmas != nullptr) {
    for (int64_t sample = 0; sample < a.batch; ++sample) {
      if (!is_positive(a.sigmas[sample])) return sample + 1;
    }
  }
  if (!has_factor(a.kind)) {
    entrywise_loss(a, dtype, queue);
  } else if (is_small(a.size, a.rank)) {
    small_loss(a, dtype, queue);
  } else {
    low_rank_loss(a, dtype, queue);
  }
  return 0;
}

void loss_backward(const LossArgs& a, int dtype, Queue queue) {
  if (!has_factor(a.kind)) {
    entrywise_backward(a, dtype, queue);
  } else if (is_small(a.size, a.rank)) {
    small_backward(a, dtype, queue);
  } else {
    low_rank_backward(a, dtype, queue);
  }
}

}  // namespace HOS_ISA
}  // namespace hos
