// Normals or uniforms into dense memory: the arguments, and the kernel that writes them.
#pragma once

#include "base/queue.h"
#include "noise/philox.h"

namespace hos {

struct NoiseArgs {
  NoiseKey key;
  const uint64_t *seed_pointer, *offset_pointer;  // device values that replace seed, add to tag
  bool uniform;
  int64_t count;
  void* out;
};

inline namespace HOS_ISA {

void noise(const NoiseArgs&, int dtype, Queue);

}  // namespace HOS_ISA
}  // namespace hos
