// Packed panels for the CPU: rows of V = [U, s], padded with zeros to whole vectors, and the two
// register-tiled products on them (Gram, and panel times small matrix). GCC/Clang vector types: the
// width follows the instruction set that the file is compiled for.
#pragma once

#include <type_traits>

#include "common.h"

namespace hos {
inline namespace HOS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;  // rows of a register tile: 8 x 3 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 4;  // 4 x 3 of 16
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;
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

// The sum over lanes, by halves: in the order of the lanes it would cost as much as a row's
// product.
template <class T>
inline T sum_lanes(Vector<T> v) {
  typedef T Half __attribute__((vector_size(kVectorBytes / 2)));
  T lane[Simd<T>::width / 2];
  Half low, high;
  memcpy(&low, &v, sizeof low);
  memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  const Half both = low + high;
  memcpy(lane, &both, sizeof both);
#pragma GCC unroll 4
  for (int n = Simd<T>::width / 4; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) lane[k] += lane[k + n];
  }
  return lane[0];
}

// The first n lanes of v, 0 in the others.
template <class T>
inline Vector<T> first_lanes(Vector<T> v, int64_t n) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Lane Index __attribute__((vector_size(kVectorBytes)));
  Index lane;
  for (int k = 0; k < Simd<T>::width; ++k) lane[k] = Lane(k);
  const Vector<T> zero = {};
  return lane < Lane(n) ? v : zero;
}

// Columns, padded so that every instruction set agrees on the layout.
inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

template <class T>
inline int64_t vectors(int64_t columns) {
  return (columns + Simd<T>::width - 1) / Simd<T>::width;
}

// Copies rows [0, n) of a strided (row, column) matrix, `rank` columns, into a panel of row stride
// `stride`; the padding is zero. `readable` rows (>= n) of the source lie in memory after the
// first.
template <class T>
inline void pack(const T* source, int64_t row, int64_t column, int64_t n, int64_t readable,
                 int64_t rank, T* panel, int64_t stride) {
  constexpr int W = Simd<T>::width;
  if (column == 1 || rank <= 1) {
    const int64_t whole = rank / W * W;
    const int64_t last = (readable - 1) * row + rank;  // elements that may be read
    for (int64_t i = 0; i < n; ++i) {
      const T* from = source + i * row;
      T* to = panel + i * stride;
      int64_t k = 0;
      for (; k < whole; k += W) store(to + k, load(from + k));
      if (k < rank && i * row + k + W <= last) {  // the tail as one vector
        store(to + k, first_lanes<T>(load(from + k), rank - k));
        k += W;
      } else {
        for (; k < rank; ++k) to[k] = from[k];
      }
      for (; k < stride && k % W != 0; ++k) to[k] = T(0);
      for (; k < stride; k += W) store(to + k, Vector<T>{});
    }
    return;
  }
  constexpr int64_t kRows = 16;
  for (int64_t begin = 0; begin < n; begin += kRows) {
    const int64_t end = begin + kRows < n ? begin + kRows : n;
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t i = begin; i < end; ++i) {
        panel[i * stride + k] = source[i * row + k * column];
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = rank; k < stride; ++k) panel[i * stride + k] = T(0);
    }
  }
}

template <class T, int N>
inline void product_block(const T* panel, int64_t stride, int64_t inner, const T* matrix,
                          int64_t matrix_stride, T* out, int64_t out_stride) {
  using V = Vector<T>;
  constexpr int W = Simd<T>::width;
  V acc[kTileRows][N];
  for (int m = 0; m < kTileRows; ++m) {
    for (int v = 0; v < N; ++v) acc[m][v] = load(out + m * out_stride + v * W);
  }
  for (int64_t l = 0; l < inner; ++l) {
    V b[N];
    for (int v = 0; v < N; ++v) b[v] = load(matrix + l * matrix_stride + v * W);
    for (int m = 0; m < kTileRows; ++m) {
      const T a = panel[m * stride + l];
      for (int v = 0; v < N; ++v) acc[m][v] += a * b[v];
    }
  }
  for (int m = 0; m < kTileRows; ++m) {
    for (int v = 0; v < N; ++v) store(out + m * out_stride + v * W, acc[m][v]);
  }
}

// out += panel (n x inner) matrix (inner x columns); n is rounded up to kTileRows, the panel and
// out hold that many rows.
template <class T>
inline void add_product(const T* panel, int64_t stride, int64_t n, int64_t inner, const T* matrix,
                        int64_t matrix_stride, int64_t columns, T* out, int64_t out_stride) {
  constexpr int W = Simd<T>::width;
  const int64_t end = vectors<T>(columns) * W;
  int64_t c = 0;
  for (; end - c >= 3 * W; c += 3 * W) {
    for (int64_t i = 0; i < n; i += kTileRows) {
      product_block<T, 3>(panel + i * stride, stride, inner, matrix + c, matrix_stride,
                          out + i * out_stride + c, out_stride);
    }
  }
  for (; end - c >= 2 * W; c += 2 * W) {
    for (int64_t i = 0; i < n; i += kTileRows) {
      product_block<T, 2>(panel + i * stride, stride, inner, matrix + c, matrix_stride,
                          out + i * out_stride + c, out_stride);
    }
  }
  for (; end - c >= W; c += W) {
    for (int64_t i = 0; i < n; i += kTileRows) {
      product_block<T, 1>(panel + i * stride, stride, inner, matrix + c, matrix_stride,
                          out + i * out_stride + c, out_stride);
    }
  }
}

}  // namespace HOS_ISA
}  // namespace hos
