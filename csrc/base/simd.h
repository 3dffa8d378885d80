// Vectors of the compiler on the CPU: loads and stores, transpositions and sums in registers.
#pragma once

#include <utility>

#include "base/common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hos {
inline namespace HOS_ISA {

// GCC/Clang vector types: the width follows the instruction set that the file is compiled for.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd {
  static constexpr int width = kVectorBytes / int(sizeof(T));
  typedef T vector __attribute__((vector_size(kVectorBytes)));
  typedef T loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};

template <class T>
using Vector = typename Simd<T>::vector;

template <class T>
inline Vector<T> load(const T* p) {
  return Vector<T>(*reinterpret_cast<const typename Simd<T>::loose*>(p));
}

template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Simd<T>::loose*>(p) = typename Simd<T>::loose(v);
}

template <class T>
inline int64_t vectors(int64_t columns) {
  return (columns + Simd<T>::width - 1) / Simd<T>::width;
}

template <class T>
constexpr int64_t kLine = 64 / int64_t(sizeof(T));  // of a cache

template <class T>
inline int64_t whole_vectors(int64_t n) {
  return vectors<T>(n) * Simd<T>::width;
}

// Lane i of the result is lane Index::at(i) of a, or of b from the width on.
template <class Index, class V, int... I>
inline auto shuffle(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, Index::at(I)...);
}

// Lanes of a and b in turn, from the lower or upper half of each group of `Group` lanes.
template <int Width, int Group, int Upper>
struct Interleave {
  static constexpr int at(int i) {
    const int from = i / Group * Group + Upper * (Group / 2) + i % Group / 2;
    return i % 2 == 0 ? from : Width + from;
  }
};

// Of each `Segment` of lanes: the first half of a and the second of b, or the other two swapped.
template <int Width, int Segment, bool Swapped>
struct Halves {
  static constexpr int at(int i) {
    const bool first = i % Segment < Segment / 2;
    if (Swapped) return first ? i + Segment / 2 : Width + i - Segment / 2;
    return first ? i : Width + i;
  }
};

template <int Offset>
struct Consecutive {
  static constexpr int at(int i) { return Offset + i; }
};

template <class T, class Index>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b) {
  return shuffle<Index>(a, b, std::make_integer_sequence<int, Simd<T>::width>());
}

// 16 bytes: the lanes within which a transposition is cheap.
template <class T>
struct Group {
  static constexpr int size = 16 / int(sizeof(T));
  static constexpr int count = Simd<T>::width / size;
  typedef T loose __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
};

// The groups at p, p + step, ... side by side in a register.
template <class T>
inline Vector<T> load_groups(const T* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX2__)  // GCC 12 would load each group into a register of its own, and shuffle
  const auto at = [=](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + i * step)); };
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(at(0));
  v = _mm512_insertf32x4(v, at(1), 1);
  v = _mm512_insertf32x4(v, at(2), 2);
  return Vector<T>(_mm512_insertf32x4(v, at(3), 3));
#else
  return Vector<T>(_mm256_insertf128_ps(_mm256_castps128_ps256(at(0)), at(1), 1));
#endif
#else
  return load(p);
#endif
}

template <class T, int... I>
inline void store_groups(T* p, int64_t step, Vector<T> v, std::integer_sequence<int, I...>) {
  ((*reinterpret_cast<typename Group<T>::loose*>(p + I * step) =
        shuffle<Consecutive<I * Group<T>::size>>(
            v, v, std::make_integer_sequence<int, Group<T>::size>())),
   ...);
}

// Transposes each square of groups: lane j of register i for lane i of register j.
template <class T>
inline void transpose(Vector<T>* q) {
  constexpr int W = Simd<T>::width, G = Group<T>::size;
  using Low = Interleave<W, G, 0>;
  using High = Interleave<W, G, 1>;
  if constexpr (G == 2) {
    const Vector<T> a = q[0], b = q[1];
    q[0] = shuffle<T, Low>(a, b);
    q[1] = shuffle<T, High>(a, b);
  } else {
    const Vector<T> a = shuffle<T, Low>(q[0], q[2]), b = shuffle<T, High>(q[0], q[2]);
    const Vector<T> c = shuffle<T, Low>(q[1], q[3]), d = shuffle<T, High>(q[1], q[3]);
    q[0] = shuffle<T, Low>(a, c);
    q[1] = shuffle<T, High>(a, c);
    q[2] = shuffle<T, Low>(b, d);
    q[3] = shuffle<T, High>(b, d);
  }
}

// The sums over lanes of v[0 .. N), N a power of two up to the width, into every (width / N)-th
// lane: a register's halves are added while those of another fill the space.
template <class T, int N, int Segment = Simd<T>::width>
inline Vector<T> sums_of_lanes(Vector<T>* v) {
  constexpr int W = Simd<T>::width;
  if constexpr (N > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      v[i] = shuffle<T, Halves<W, Segment, false>>(v[i], v[i + N / 2]) +
             shuffle<T, Halves<W, Segment, true>>(v[i], v[i + N / 2]);
    }
    return sums_of_lanes<T, N / 2, Segment / 2>(v);
  } else if constexpr (Segment > 1) {
    v[0] += shuffle<T, Halves<W, Segment, true>>(v[0], v[0]);
    return sums_of_lanes<T, 1, Segment / 2>(v);
  } else {
    return v[0];
  }
}

// Stores the sums over lanes of v[0 .. N), any N, which it overwrites.
template <class T, int N>
inline void store_sums(Vector<T>* v, T* sums) {
  constexpr int W = Simd<T>::width;
  constexpr int P = N >= W ? W : (N > 8 ? 16 : N > 4 ? 8 : N > 2 ? 4 : N);  // N = 3 pads to 4
  T lane[W];
  Vector<T> part[P];
#pragma GCC unroll 16
  for (int j = 0; j < P; ++j) part[j] = j < N ? v[j] : Vector<T>{};
  store(lane, sums_of_lanes<T, P>(part));
  for (int j = 0; j < P && j < N; ++j) sums[j] = lane[j * (W / P)];
  if constexpr (N > P) store_sums<T, N - P>(v + P, sums + P);
}

}  // namespace HOS_ISA
}  // namespace hos
