// What the CUDA files of the losses share.
#pragma once

#include "launch.cuh"
#include "second_order_loss.h"

namespace hos {

// Forward and backward of the low-rank losses, for any size and for small samples of few columns.
void low_rank_loss_cuda(const LossArgs&, int dtype, Launch);
void low_rank_backward_cuda(const LossArgs&, int dtype, Launch);
void small_loss_cuda(const LossArgs&, int dtype, Launch);
void small_backward_cuda(const LossArgs&, int dtype, Launch);
int64_t low_rank_scratch(int kind, int64_t batch, int64_t size, int64_t rank);

constexpr int64_t kSmallRank = 8, kSmallSize = 128;

inline namespace HOS_ISA {

inline bool is_low_rank(int kind) { return kind == kD2sm || kind == kD2smVr; }

inline bool is_small(int64_t size, int64_t rank) {
  return rank <= kSmallRank && size <= kSmallSize;
}

HOS_HD int64_t gram_points_of(int64_t points) { return points == 3 ? 2 : 1; }

// Where entry (k, l), k <= l, of a symmetric matrix lies in its packed upper triangle.
HOS_HD int64_t triangle(int64_t k, int64_t l) { return l * (l + 1) / 2 + k; }

__device__ inline double sigma_of(const LossArgs& a, int64_t sample) {
  return a.sigmas != nullptr ? a.sigmas[sample] : a.sigma;
}

__device__ inline double precision_of(const LossArgs& a, int64_t sample) {
  const double sigma = sigma_of(a, sample);
  return 1.0 / (sigma * sigma);
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
