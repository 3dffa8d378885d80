// What the kernels use of CUDA, on the host: every thread of a block is a fiber that runs until a
// barrier, a shuffle or its end. One block at a time, in the order that EMULATOR_ORDER asks for.
// Shared memory begins as NaN, has its exact size (AddressSanitizer sees what lies beyond), and a
// barrier that some threads of a block or warp miss aborts. Blocks and streams do not overlap, and
// memory is as ordered as the host's: compute-sanitizer on a GPU still has its use.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y = 1, z = 1;
  constexpr dim3(unsigned size = 1) : x(size) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return 0; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, 0; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return 0;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

void emulator_run(const cudaLaunchConfig_t& config, const std::function<void()>& body);
void emulator_warp_barrier();
extern unsigned char* emulator_shared;
extern unsigned char emulator_lanes[1024][16];

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  const auto call = [&](Parameters... values) {
    emulator_run(*config, [&] { kernel(values...); });
  };
  call(args...);
  return cudaSuccess;
}

void __syncthreads();
inline void __syncwarp() { emulator_warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned me = threadIdx.x;
  memcpy(emulator_lanes[me], &value, sizeof(T));
  emulator_warp_barrier();
  T other;
  memcpy(&other, emulator_lanes[me ^ unsigned(mask)], sizeof(T));
  emulator_warp_barrier();
  return other;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
