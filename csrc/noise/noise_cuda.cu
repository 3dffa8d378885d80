// Noise on CUDA.

#include "noise/noise.h"
#include "noise/quads.cuh"

namespace hos {
inline namespace HOS_ISA {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(NoiseKey given, const uint64_t* seed, const uint64_t* offset, bool uniform,
                 int64_t n, void* out, bool whole) {
  const NoiseKey key = read_key(given, seed, offset);
  for_quads(key.start, n, n, whole, [&](const Quad& q, uint64_t counter) {
    typename Acc<T>::type z[4];
    draw(key, counter, uniform, z);
    store<T>(z, q, out, n);
  });
}

// One for each DType, in its order.
constexpr decltype(&noise_kernel<float>) kNoise[] = {noise_kernel<float>, noise_kernel<double>,
                                                     noise_kernel<half_t>, noise_kernel<bfloat_t>};

}  // namespace

void noise(const NoiseArgs& a, int dtype, Queue queue) {
  const bool whole = a.key.start % 4 == 0 && aligned(a.out, dtype);
  launch("noise", kNoise[dtype], quad_blocks(a.count), queue, a.key, a.seed_pointer,
         a.offset_pointer, a.uniform, a.count, a.out, whole);
}

}  // namespace HOS_ISA
}  // namespace hos
