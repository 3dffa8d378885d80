// Whether the CUDA driver can run the CUDA runtime that is linked into this module.

#include <cuda_runtime.h>

#include "base/queue.h"

namespace hos {

// Major versions decide: a driver runs the runtime of every minor version of its major one. (The
// PTX of a newer minor version it refuses: there a binary for the very GPU is needed.)
int cuda_driver_too_old() {
  static const int answer = [] {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return -1;
    return driver / 1000 >= CUDART_VERSION / 1000 ? 0 : driver;
  }();
  return answer;
}

}  // namespace hos
