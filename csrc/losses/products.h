// The two register-tiled products of a panel on the CPU: its Gram matrix, and panel times small
// matrix.
#pragma once

#include <utility>

#include "base/panels.h"

namespace hos {
inline namespace HOS_ISA {

// Register tiles: columns by columns of the Gram matrix, vectors of rows by columns of the product.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGramRows = 4, kProductColumns = 8;
#else
constexpr int kGramRows = 2, kProductColumns = 6;
#endif
constexpr int kProductRows = 2;
constexpr int64_t kGramBytes = 25 << 10;

// gram[m][v] += <left column m, right column v>; Same: the columns are the same ones, v >= m alone.
template <class T, int M, int N, bool Same>
inline void gram_tile(const T* left, const T* right, int64_t stride, int64_t n, T* gram,
                      int64_t gram_stride) {
  using V = Vector<T>;
  constexpr int kCount = Same ? M * (M + 1) / 2 : M * N;
  V acc[kCount] = {};
  for (int64_t i = 0; i < n; i += Simd<T>::width) {
    V b[N];
    for (int v = 0; v < N; ++v) b[v] = load(right + v * stride + i);
    int t = 0;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V a = Same ? b[m] : load(left + m * stride + i);
#pragma GCC unroll 4
      for (int v = Same ? m : 0; v < N; ++v, ++t) acc[t] += a * b[v];
    }
  }
  T sums[kCount];
  store_sums<T, kCount>(acc, sums);
  const T* from = sums;
  for (int m = 0; m < M; ++m) {
#pragma GCC ivdep
    for (int v = Same ? m : 0; v < N; ++v) gram[m * gram_stride + v] += *from++;
  }
}

// `N` columns from `column` on, times those of [first, last) up to the diagonal.
template <class T, int N>
inline void gram_stripe(const T* panel, int64_t stride, int64_t n, int64_t first, int64_t last,
                        int64_t column, T* gram, int64_t gram_stride) {
  const T* right = panel + column * stride;
  for (int64_t k = first; k < (last < column ? last : column); k += kGramRows) {
    gram_tile<T, kGramRows, N, false>(panel + k * stride, right, stride, n,
                                      gram + k * gram_stride + column, gram_stride);
  }
  if (column >= last) return;
  gram_tile<T, N, N, true>(right, right, stride, n, gram + column * gram_stride + column,
                           gram_stride);
}

// gram += panel^T panel on and above the diagonal, by blocks of rows whose columns of the panel
// stay in the first cache.
template <class T>
inline void add_gram(const T* panel, int64_t stride, int64_t n, int64_t columns, T* gram,
                     int64_t gram_stride) {
  static_assert(4 % kGramRows == 0, "blocks end on whole tiles");
  const int64_t fit = kGramBytes / (n * int64_t(sizeof(T)) + 1) / 4 * 4, block = fit < 4 ? 4 : fit;
  for (int64_t first = 0; first < columns; first += block) {
    for (int64_t k = first; k < columns; k += 4) {
      const auto stripe = [&](auto width) {
        gram_stripe<T, width()>(panel, stride, n, first, first + block, k, gram, gram_stride);
      };
      const int64_t width = columns - k;
      if (width >= 4) stripe(std::integral_constant<int, 4>());
      if (width == 3) stripe(std::integral_constant<int, 3>());
      if (width == 2) stripe(std::integral_constant<int, 2>());
      if (width == 1) stripe(std::integral_constant<int, 1>());
    }
  }
}

// What product_of_columns takes: out = panel matrix + z by_noise^T + diag(d) panel diag(by_diag).
template <class T>
struct Product {
  const T* panel;
  int64_t stride, inner, columns;  // `inner` columns enter the product with the matrix
  const T *matrix, *z, *d, *by_noise, *by_diag;
  int64_t matrix_stride;
  T* out;
};

template <class T, int Rows, int N>
inline void product_tile(const Product<T>& p, int64_t i, int64_t k) {
  using V = Vector<T>;
  constexpr int W = Simd<T>::width;
  V acc[Rows][N];
  for (int m = 0; m < Rows; ++m) {
    const V z = load(p.z + i + m * W), d = load(p.d + i + m * W);
    for (int v = 0; v < N; ++v) {
      acc[m][v] = z * p.by_noise[k + v] +
                  (d * p.by_diag[k + v]) * load(p.panel + (k + v) * p.stride + i + m * W);
    }
  }
  for (int64_t l = 0; l < p.inner; ++l) {
    const T* b = p.matrix + l * p.matrix_stride + k;
    V a[Rows];
    for (int m = 0; m < Rows; ++m) a[m] = load(p.panel + l * p.stride + i + m * W);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      for (int m = 0; m < Rows; ++m) acc[m][v] += a[m] * b[v];
    }
  }
  for (int v = 0; v < N; ++v) {
    for (int m = 0; m < Rows; ++m) store(p.out + (k + v) * p.stride + i + m * W, acc[m][v]);
  }
}

template <class T, int N, class Between>
inline void product_stripe(const Product<T>& p, int64_t n, int64_t k, const Between& between) {
  constexpr int W = Simd<T>::width;
  int64_t i = 0;
  for (; i + W < n; i += kProductRows * W) {
    product_tile<T, kProductRows, N>(p, i, k);
    between();
  }
  if (i < n) product_tile<T, 1, N>(p, i, k);
}

template <class T, class Between, int... I>
inline void product_stripe(const Product<T>& p, int64_t n, int64_t k, int64_t width,
                           const Between& between, std::integer_sequence<int, I...>) {
  ((width == I + 1 ? product_stripe<T, I + 1>(p, n, k, between) : void()), ...);
}

inline int64_t product_stripes(int64_t columns) {
  return (columns + kProductColumns - 1) / kProductColumns;
}

// How often product_of_columns calls `between`.
template <class T>
inline int64_t product_tiles(int64_t n, int64_t columns) {
  return product_stripes(columns) * (n / Simd<T>::width / kProductRows);
}

// The product for rows [0, n), in stripes of nearly equal width; `between` runs after each tile of
// kProductRows vectors.
template <class T, class Between>
inline void product_of_columns(const Product<T>& p, int64_t n, const Between& between) {
  int64_t stripes = product_stripes(p.columns);
  for (int64_t k = 0; k < p.columns; --stripes) {
    const int64_t width = (p.columns - k + stripes - 1) / stripes;
    product_stripe(p, n, k, width, between, std::make_integer_sequence<int, kProductColumns>());
    k += width;
  }
}

}  // namespace HOS_ISA
}  // namespace hos
