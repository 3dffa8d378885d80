// The generator on CUDA: a thread owns one Philox counter, four elements that follow one another.
// Normals stay in registers, and where rows and pointers are aligned each array is read or written
// as one vector.
#pragma once

#include "base/element.h"
#include "base/launch.cuh"
#include "noise/philox.h"

namespace hos {
inline namespace HOS_ISA {

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

// The elements of one counter: lanes [first, last) exist, from `row` and `column` on.
struct Quad {
  bool whole;  // all four exist, in one row, and every array is aligned to them
  int first, last;
  int64_t row, column, size;

  // Where lane k lies; a lane that does not exist repeats the place of one that does, so that
  // reading it is safe.
  __device__ __forceinline__ void place(int k, int64_t* to_row, int64_t* to_column) const {
    const int lane = k < first ? first : k < last ? k : last - 1;
    int64_t i = row, j = column + (lane - first);
    for (; j >= size; j -= size) ++i;
    *to_row = i;
    *to_column = j;
  }
};

__device__ __forceinline__ Quad quad_at(int64_t flat, int64_t total, int64_t size, bool whole) {
  Quad q;
  q.first = flat < 0 ? int(-flat) : 0;
  q.last = total - flat < 4 ? int(total - flat) : 4;
  q.whole = whole && q.first == 0 && q.last == 4;
  q.size = size;
  const int64_t from = flat + q.first;
  if (size == total) {  // one row: no division
    q.row = 0;
    q.column = from;
  } else if (total <= int64_t(0xFFFFFFFF)) {
    q.row = uint32_t(from) / uint32_t(size);
    q.column = uint32_t(from) - uint32_t(q.row) * uint32_t(size);
  } else {
    q.row = from / size;
    q.column = from - q.row * size;
  }
  return q;
}

// visit(quad, counter) for the `total` elements from `start` on, in rows of `size`.
template <class Visit>
__device__ void for_quads(uint64_t start, int64_t total, int64_t size, bool whole,
                          const Visit& visit) {
  const int64_t lead = int64_t(start % 4);  // lanes of the first counter that lie before the array
  const int64_t quads = ceil_div(total + lead, 4);
  for (int64_t j = thread_index(); j < quads; j += grid_threads()) {
    const int64_t flat = 4 * j - lead;
    visit(quad_at(flat, total, size, whole), (start + uint64_t(flat)) / 4);
  }
}

template <class T, class A>
__device__ void load(const void* base, int64_t stride, const Quad& q, A* to) {
  const T* from = static_cast<const T*>(base);
  Four<T> four;
  if (q.whole) {
    four = *reinterpret_cast<const Four<T>*>(from + q.row * stride + q.column);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      int64_t row, column;
      q.place(k, &row, &column);
      four.v[k] = from[row * stride + column];
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) to[k] = widen(four.v[k]);
}

template <class T, class A>
__device__ void store(const A* from, const Quad& q, void* base, int64_t stride) {
  T* to = static_cast<T*>(base);
  Four<T> four;
#pragma unroll
  for (int k = 0; k < 4; ++k) narrow(from[k], &four.v[k]);
  if (q.whole) {
    *reinterpret_cast<Four<T>*>(to + q.row * stride + q.column) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    int64_t row, column;
    q.place(k, &row, &column);
    if (k >= q.first && k < q.last) to[row * stride + column] = four.v[k];
  }
}

// The key with seed and offset from device memory where they are given there.
__device__ inline NoiseKey read_key(NoiseKey key, const uint64_t* seed, const uint64_t* offset) {
  constexpr uint64_t kOffset = (uint64_t(1) << 56) - 1;  // the stream lies above
  if (seed != nullptr) key.seed = *seed;
  if (offset != nullptr) key.tag = (key.tag & ~kOffset) | ((key.tag + *offset) & kOffset);
  return key;
}

template <class A>
__device__ void draw(const NoiseKey& key, uint64_t counter, bool uniform, A* z) {
  const Words words = philox(counter, key.tag, key.seed);
  if (uniform) {
#pragma unroll
    for (int k = 0; k < 4; ++k) z[k] = to_unit(words.w[k], A());
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const Pair<A> two = box_muller(words.w[k], words.w[k + 1], A());
    z[k] = two.a;
    z[k + 1] = two.b;
  }
}

inline bool aligned(const void* base, int dtype) {
  return reinterpret_cast<uintptr_t>(base) % uintptr_t(4 * kDTypeBytes[dtype]) == 0;
}

// Blocks for `n` elements, which may start inside a counter.
inline int64_t quad_blocks(int64_t n) { return n > 0 ? ceil_div(ceil_div(n + 3, 4), kThreads) : 0; }

}  // namespace HOS_ISA
}  // namespace hos
