// What the CUDA engines of the losses share: the sums that make up a loss, and tiles of V = [U, s].
#pragma once

#include "base/staging.cuh"
#include "losses/engines.h"

namespace hos {
inline namespace HOS_ISA {

// Where entry (k, l), k <= l, of a symmetric matrix lies in its packed upper triangle.
HOS_HD int64_t triangle(int64_t k, int64_t l) { return l * (l + 1) / 2 + k; }

// V of one point from `row` and `column` on into a tile; the clean score that is left out, and the
// columns beyond the last, are what the tile held before. `count` elements go in one copy.
template <class T>
__device__ void fetch_tile(const LossArgs& a, int64_t point, int64_t sample, int64_t row,
                           int64_t rows, int64_t column, const TileShape& s, int count, T* to) {
  const T* u = place<T>(a.factor, point, sample, row, column);
  fetch_lines(u, factor_lines(a.factor, s, rows, a.rank - column), count, to);
  const int64_t last = a.rank - column;
  if (last < 0 || last >= s.columns || point >= a.score_points) return;
  const T* score = place<T>(a.score, point, sample, row);
  T* into = to + (s.down ? last * s.pitch : last);
  const int step = s.down ? 1 : s.pitch;
  const int there = int(rows < s.rows ? rows : s.rows);
  for (int i = threadIdx.x; i < s.rows; i += blockDim.x) {
    __pipeline_memcpy_async(into + i * step, i < there ? score + i : score, sizeof(T),
                            i < there ? 0 : sizeof(T));
  }
}

// The two parts of a second-order loss.
struct Parts {
  double norm, inner;  // A |psi|^2 / A, sigma^2 <C, psi> (or its second difference)
};

// What one entry of the diagonal adds; minus and clean count with variance reduction alone.
template <class T>
__device__ void add_diagonal(bool reduced, T z, T d, T minus, T clean, T* norm, T* inner) {
  const T c = T(1) - z * z;
  if (reduced) {
    *norm += d * d + minus * minus;
    *inner += ((d - clean) + (minus - clean)) * c;
  } else {
    *norm += d * d;
    *inner += d * c;
  }
}

// Sums over rows of one column of V by itself: all but |V_k|^2 of the plain loss. With variance
// reduction the differences D+- = V+- - V0 come first: the second difference, which is divided by
// sigma^2, must not be taken between sums.
template <class T>
struct ColumnSums {
  T norm, inner, up, down, base;  // sum d V^2, difference_entry, then D+ z, D- z, V0 z (or V z)

  __device__ void add(bool reduced, T z, T plus, T d, T minus, T d_minus, T clean) {
    norm = mul_add(plus * plus, d, norm);
    if (!reduced) {
      up = mul_add(plus, z, up);
      return;
    }
    norm = mul_add(minus * minus, d_minus, norm);
    inner += difference_entry(plus, minus, clean);
    up = mul_add(plus - clean, z, up);
    down = mul_add(minus - clean, z, down);
    base = mul_add(clean, z, base);
  }
};

constexpr int kColumnSums = 5;

// What a column's sums add to the loss; keeps g = V^T z of each point, `columns` apart.
template <class T>
__device__ void finish_column(bool reduced, double w, double norm, double inner, double up,
                              double down, double base, int64_t columns, T* projection,
                              Parts* parts) {
  parts->norm += 2.0 * w * norm;
  parts->inner += column_inner(w, inner, up, down, base);
  projection[0] = T(up + base);
  if (!reduced) return;
  projection[columns] = T(down + base);
  projection[2 * columns] = T(base);
}

// What entry (k, l), k <= l, of a Gram matrix adds.
__device__ inline void finish_gram(bool reduced, double wk, double wl, double value, bool diagonal,
                                   Parts* parts) {
  parts->norm += (diagonal ? 1.0 : 2.0) * wk * wl * value * value;
  if (diagonal && !reduced) parts->inner += wk * value;
}

}  // namespace HOS_ISA
}  // namespace hos
