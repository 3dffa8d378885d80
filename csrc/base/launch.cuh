// CUDA launch helpers. Every launch goes to the given device and stream, leaves the current device
// as it was, and reports its failure by name. Nothing here allocates or synchronises: a stream
// capture may hold every kernel. Sums run in a fixed order (lanes, then warps, never atomics), so
// that results repeat bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "base/common.h"
#include "base/queue.h"

namespace hos {
inline namespace HOS_ISA {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;  // of a block, where nothing else is said
// Whether the compiler pairs float32 products, as it does for later GPUs: that takes more
// registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kPaired = 1;
#else
constexpr int kPaired = 0;
#endif
constexpr int64_t kMaxBlocks = 1 << 20;  // kernels loop over what a grid leaves

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leaves no error behind for a later call
  throw std::runtime_error(std::string("hos_ext: CUDA error in ") + what + ": " +
                           cudaGetErrorString(status));
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    check(cudaGetDevice(&previous_), what);
    if (device == previous_) return;
    check(cudaSetDevice(device), what);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

struct Grid {
  Grid(int64_t blocks, int threads = kThreads, int64_t shared = 0)
      : blocks(blocks), threads(threads), shared(shared) {}
  int64_t blocks;
  int threads;     // of a block, whole warps
  int64_t shared;  // bytes of a block that `shared_memory` gives
};

// kernel(args...) on a grid; none where there is nothing to do.
template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, Queue queue,
            const Args&... args) {
  constexpr int64_t kGranted = 48 << 10;  // bytes a block has without asking
  constexpr int kMost = 98 << 10;  // what every plan fits: one limit, whoever launches at once
  if (grid.blocks <= 0) return;
  const DeviceGuard guard(queue.device, name);
  if (grid.shared > kGranted) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost), name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(std::min(grid.blocks, kMaxBlocks)));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared);
  config.stream = static_cast<cudaStream_t>(queue.stream());
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

// The dynamic shared memory of a block.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

__device__ inline int64_t grid_threads() { return int64_t(gridDim.x) * kThreads; }

// The sum over a warp, in every lane.
template <class T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  }
  return value;
}

// The sum over a block, in every thread.
__device__ inline double block_sum(double value) {
  __shared__ double parts[kWarp];
  value = warp_sum(value);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += parts[warp];
  return total;
}

}  // namespace HOS_ISA
}  // namespace hos
