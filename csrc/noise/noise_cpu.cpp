// Noise on the CPU: each thread fills a range of its own, block by block.

#include "base/element.h"
#include "base/parallel.h"
#include "noise/blocks.h"
#include "noise/noise.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

template <class T>
void fill(const NoiseKey& key, bool uniform, int64_t n, T* out, int threads) {
  using A = typename Acc<T>::type;
  advise_huge_pages(out, n * int64_t(sizeof(T)));
  parallel_for(n, kBlock, kNoiseGrain, threads, [&](int64_t begin, int64_t end) {
    alignas(64) A z[kBlock];
    for (int64_t i = begin; i < end;) {
      const uint64_t element = key.start + uint64_t(i);
      const int lane = int(element % kBlock);
      const int count = int(std::min<int64_t>(kBlock - lane, end - i));
      if (uniform) {
        uniform_block(element / kBlock, key, z);
      } else {
        normal_block(element / kBlock, key, z);
      }
      for (int j = 0; j < count; ++j) narrow(z[lane + j], out + i + j);
      i += count;
    }
  });
}

}  // namespace

void noise(const NoiseArgs& a, int dtype, Queue queue) {
  const auto fill_as = [&](auto* out) { fill(a.key, a.uniform, a.count, out, queue.threads()); };
  if (dtype == kFloat32) fill_as(static_cast<float*>(a.out));
  if (dtype == kFloat64) fill_as(static_cast<double*>(a.out));
  if (dtype == kFloat16) fill_as(static_cast<half_t*>(a.out));
  if (dtype == kBFloat16) fill_as(static_cast<bfloat_t*>(a.out));
}

}  // namespace HOS_ISA
}  // namespace hos
