// CUDA launch helpers. Every launch goes to the given device and stream, leaves the current device
// as it was, and reports its failure by name. Nothing here allocates or synchronises: a stream
// capture may hold every kernel. Sums run in a fixed order (lanes, then warps, never atomics), so
// that results repeat bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels_cuda.h"

namespace hos {
inline namespace HOS_ISA {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;  // of every block
constexpr int64_t kMaxBlocks = 1 << 20;   // kernels loop over what a grid leaves
constexpr int kTile = kWarp;              // rows and columns of a tile in shared memory

HOS_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// kernel(args...) on `blocks` blocks; none where there is nothing to do.
template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, Launch where,
            const Args&... args) {
  if (blocks <= 0) return;
  const DeviceGuard guard(where.device, name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(std::min(blocks, kMaxBlocks)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(where.stream);
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
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
  __shared__ double parts[kWarps];
  value = warp_sum(value);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) total += parts[warp];
  return total;
}

template <class T>
using Tile = T[kTile][kTile + 1];  // padded: a column meets every bank once

// visit(i, k) for the entries of a tile, shared out over the block; neighbouring threads take
// neighbouring rows i where `down`, else columns k.
template <class Visit>
__device__ void for_tile(bool down, const Visit& visit) {
  for (int entry = threadIdx.x; entry < kTile * kTile; entry += kThreads) {
    const int fast = entry % kTile, slow = entry / kTile;
    down ? visit(fast, slow) : visit(slow, fast);
  }
}

template <class T>
__device__ const T& at(const View& view, int64_t point, int64_t sample, int64_t row,
                       int64_t column = 0) {
  return static_cast<const T*>(
      view.data)[point * view.point + sample * view.batch + row * view.row + column * view.column];
}

// w_k: the sign of a column of the factor, 1 where none is given and for the score.
template <class T>
__device__ T weight_of(const void* sign, int64_t rank, int64_t k) {
  return sign != nullptr && k < rank ? static_cast<const T*>(sign)[k] : T(1);
}

}  // namespace HOS_ISA
}  // namespace hos
