// The generator on the CPU: blocks of normals or uniforms, many Philox counters side by side in
// vector registers. Philox and Box-Muller are more than half of the time of a step. Include it only
// where contraction is off (common.h says why): noise_cpu.cpp and step_cpu.cpp.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "noise/philox.h"

namespace hos {
inline namespace HOS_ISA {

constexpr int kCounters = 16;                  // counters made together
constexpr int kBlock = 4 * kCounters;          // elements of such a block
constexpr int64_t kNoiseGrain = 128 * kBlock;  // elements below which no second thread wakes

struct BlockWords {
  alignas(64) uint32_t w[4][kCounters];
};

// A vector of counters, and the widening product that compilers do not find by themselves.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
typedef uint32_t Narrow __attribute__((vector_size(32)));
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
typedef uint32_t Narrow __attribute__((vector_size(16)));
#else
typedef uint64_t Lanes __attribute__((vector_size(16)));
typedef uint32_t Narrow __attribute__((vector_size(8)));
#endif
struct WideLanesProduct {
  Lanes operator()(Lanes c, uint32_t m) const {
#if defined(__AVX512F__)
    return Lanes(_mm512_mul_epu32(__m512i(c), _mm512_set1_epi64(int64_t(m))));
#elif defined(__AVX2__)
    return Lanes(_mm256_mul_epu32(__m256i(c), _mm256_set1_epi64x(int64_t(m))));
#elif defined(__SSE2__)
    return Lanes(_mm_mul_epu32(__m128i(c), _mm_set1_epi64x(int64_t(m))));
#else
    return (c & 0xFFFFFFFFu) * uint64_t(m);
#endif
  }
};
constexpr int kLanes = int(sizeof(Lanes) / sizeof(uint64_t));

inline void philox_block(uint64_t block, const NoiseKey& key, BlockWords* words) {
  Lanes step;
  for (int k = 0; k < kLanes; ++k) step[k] = uint64_t(k);
  for (int j = 0; j < kCounters; j += kLanes) {
    const Lanes counter = step + (block * kCounters + uint64_t(j));
    const Lanes zero = step ^ step;
    Lanes c[4] = {counter, counter >> 32, zero + key.tag, zero + (key.tag >> 32)};
    philox_rounds(c, key.seed, WideLanesProduct());
    for (int k = 0; k < 4; ++k) {
      const Narrow word = __builtin_convertvector(c[k], Narrow);
      memcpy(&words->w[k][j], &word, sizeof word);
    }
  }
}

template <class A>
inline void normal_block(uint64_t block, const NoiseKey& key, A* z) {
  BlockWords words;
  philox_block(block, key, &words);
  alignas(64) A lane[4][kCounters];
  for (int j = 0; j < kCounters; ++j) {
    const Pair<A> one = box_muller(words.w[0][j], words.w[1][j], A());
    lane[0][j] = one.a;
    lane[1][j] = one.b;
  }
  for (int j = 0; j < kCounters; ++j) {
    const Pair<A> two = box_muller(words.w[2][j], words.w[3][j], A());
    lane[2][j] = two.a;
    lane[3][j] = two.b;
  }
  for (int j = 0; j < kCounters; ++j) {
    for (int k = 0; k < 4; ++k) z[4 * j + k] = lane[k][j];
  }
}

template <class A>
inline void uniform_block(uint64_t block, const NoiseKey& key, A* u) {
  BlockWords words;
  philox_block(block, key, &words);
  for (int j = 0; j < kCounters; ++j) {
    for (int k = 0; k < 4; ++k) u[4 * j + k] = to_unit(words.w[k][j], A());
  }
}

// The normals of consecutive elements, block by block, at any starting point.
template <class A>
class NoiseWalk {
 public:
  explicit NoiseWalk(const NoiseKey& key) : key_(key) {}
  // Normals from `element` on; *count is cut to what its block still holds.
  const A* at(uint64_t element, int64_t* count) {
    const uint64_t block = element / kBlock;
    const int lane = int(element % kBlock);
    if (!valid_ || block != block_) {
      normal_block(block, key_, z_);
      block_ = block;
      valid_ = true;
    }
    *count = std::min<int64_t>(*count, kBlock - lane);
    return z_ + lane;
  }

 private:
  NoiseKey key_;
  uint64_t block_ = 0;
  bool valid_ = false;
  alignas(64) A z_[kBlock];
};

}  // namespace HOS_ISA
}  // namespace hos
