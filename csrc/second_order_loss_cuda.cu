// Score matching losses on CUDA. Forward: one block a sample; Gram matrices by tiles of columns,
// rows of V = [U, s] passing through shared memory; a warp a column for the sums that run once
// along it. Backward: one block for 32 rows x 32 columns of dL/dV, from the saved Gram matrices.
// Nothing but V and the R x R matrices in `saved` is ever formed (R = r + 1). Bytes moved: 4 D R a
// point for each pass, times the number of column tiles where R > 32.

#include "launch.cuh"
#include "second_order_loss.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int kPairs = kTile / 16;         // a thread owns kPairs x kPairs Gram entries of a tile
constexpr int kTileRows = kTile / kWarps;  // rows of a tile that a thread owns in backward
constexpr int64_t kEntryRows = 4 * kThreads;  // rows a block takes of the entry-wise gradients

// Sizes that follow from the kind of loss, found on the host.
struct Sizes {
  int64_t points, gram_points, columns, saved;
};

// The two parts of a second-order loss, summed in double.
struct Sums {
  double norm, inner;  // A |psi|^2 / A, sigma^2 <C, psi> (or its second difference)
};

__device__ double sigma_of(const LossArgs& a, int64_t sample) {
  return a.sigmas != nullptr ? a.sigmas[sample] : a.sigma;
}

// V_ik of V = [U, s]; a score that is left out counts as 0.
template <class T>
__device__ T v_entry(const LossArgs& a, int64_t point, int64_t sample, int64_t i, int64_t k) {
  if (k < a.rank) return at<T>(a.factor, point, sample, i, k);
  return point < a.score_points ? at<T>(a.score, point, sample, i) : T(0);
}

// Rows from `row` and columns from `column` of V; 0 beyond its ends.
template <class T>
__device__ void load_tile(const LossArgs& a, int64_t point, int64_t sample, int64_t row,
                          int64_t column, Tile<T>& tile) {
  for_tile(a.factor.column != 1, [&](int i, int k) {
    const bool inside = row + i < a.size && column + k <= a.rank;
    tile[i][k] = inside ? v_entry<T>(a, point, sample, row + i, column + k) : T(0);
  });
}

// What the diagonal adds to norm and inner; a thread takes every kThreads-th row.
template <class T>
__device__ void add_diagonal(const LossArgs& a, bool reduced, int64_t sample, Sums& sums) {
  for (int64_t i = threadIdx.x; i < a.size; i += kThreads) {
    const T z = at<T>(a.noise, 0, sample, i), d = at<T>(a.diag, 0, sample, i);
    const T c = T(1) - z * z;
    if (!reduced) {
      sums.norm += double(d * d);
      sums.inner += double(d * c);
      continue;
    }
    const T minus = at<T>(a.diag, 1, sample, i), clean = at<T>(a.diag, 2, sample, i);
    sums.norm += double(d * d + minus * minus);
    sums.inner += double(((d - clean) + (minus - clean)) * c);
  }
}

// What each column adds by itself, all but |V_k|^2 of the plain loss; keeps g = V^T z. With
// variance reduction the differences D+- = V+- - V0 come first: the second difference, which is
// divided by sigma^2, must not be taken between sums.
template <class T>
__device__ void add_columns(const LossArgs& a, const Sizes& n, int64_t sample, T* projections,
                            Sums& sums) {
  const bool reduced = n.points == 3;
  const int lane = threadIdx.x % kWarp;
  for (int64_t k = threadIdx.x / kWarp; k < n.columns; k += kWarps) {
    T up = T(0), down = T(0), base = T(0), norm = T(0), inner = T(0);
    for (int64_t i = lane; i < a.size; i += kWarp) {
      const T z = at<T>(a.noise, 0, sample, i), v = v_entry<T>(a, 0, sample, i, k);
      norm += v * v * at<T>(a.diag, 0, sample, i);
      if (!reduced) {
        up += v * z;
        continue;
      }
      const T minus = v_entry<T>(a, 1, sample, i, k), clean = v_entry<T>(a, 2, sample, i, k);
      const T dp = v - clean, dm = minus - clean;
      norm += minus * minus * at<T>(a.diag, 1, sample, i);
      inner += difference_entry(v, minus, clean);
      up += dp * z;
      down += dm * z;
      base += clean * z;
    }
    up = warp_sum(up);
    down = warp_sum(down);
    base = warp_sum(base);
    norm = warp_sum(norm);
    inner = warp_sum(inner);
    if (lane != 0) continue;
    const double w = weight_of<T>(a.sign, a.rank, k), p = up, m = down, b = base;
    sums.norm += 2.0 * w * double(norm);
    sums.inner += column_inner(w, inner, p, m, b);
    projections[k] = T(p + b);
    if (!reduced) continue;
    projections[n.columns + k] = T(m + b);
    projections[2 * n.columns + k] = base;
  }
}

// G = V^T V of one point, tile by tile of its upper triangle, and what it adds to the sums.
template <class T>
__device__ void add_gram(const LossArgs& a, const Sizes& n, int64_t point, int64_t sample, T* gram,
                         Sums& sums) {
  __shared__ Tile<T> left, right;
  const int tk = threadIdx.x / 16, tl = threadIdx.x % 16;
  for (int64_t k0 = 0; k0 < n.columns; k0 += kTile) {
    for (int64_t l0 = k0; l0 < n.columns; l0 += kTile) {
      T total[kPairs][kPairs] = {};
      for (int64_t row = 0; row < a.size; row += kTile) {
        __syncthreads();
        load_tile(a, point, sample, row, k0, left);
        load_tile(a, point, sample, row, l0, right);
        __syncthreads();
        T part[kPairs][kPairs] = {};  // sums of sums: the error grows with D / 32, not with D
        for (int i = 0; i < kTile; ++i) {
          for (int p = 0; p < kPairs; ++p) {
            for (int q = 0; q < kPairs; ++q) {
              part[p][q] = mul_add(left[i][tk + 16 * p], right[i][tl + 16 * q], part[p][q]);
            }
          }
        }
        for (int p = 0; p < kPairs; ++p) {
          for (int q = 0; q < kPairs; ++q) total[p][q] += part[p][q];
        }
      }
      for (int p = 0; p < kPairs; ++p) {
        for (int q = 0; q < kPairs; ++q) {
          const int64_t k = k0 + tk + 16 * p, l = l0 + tl + 16 * q;
          if (k > l || l >= n.columns) continue;
          const double value = total[p][q];
          const double w = weight_of<T>(a.sign, a.rank, k) * weight_of<T>(a.sign, a.rank, l);
          sums.norm += (k == l ? 1.0 : 2.0) * w * value * value;
          if (k == l && n.points == 1) sums.inner += weight_of<T>(a.sign, a.rank, k) * value;
          gram[k * n.columns + l] = gram[l * n.columns + k] = total[p][q];
        }
      }
    }
  }
}

// Two blocks a multiprocessor: left to itself the compiler aims at 64 registers, and spills.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) low_rank_loss_kernel(LossArgs a, Sizes n) {
  const bool reduced = n.points == 3;
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    T* saved = static_cast<T*>(a.saved) + sample * n.saved;
    Sums sums = {};
    add_diagonal<T>(a, reduced, sample, sums);
    add_columns(a, n, sample, saved + n.gram_points * n.columns * n.columns, sums);
    for (int64_t point = 0; point < n.gram_points; ++point) {
      add_gram(a, n, point, sample, saved + point * n.columns * n.columns, sums);
    }
    const double norm = block_sum(sums.norm), inner = block_sum(sums.inner);
    const double precision = 1.0 / (sigma_of(a, sample) * sigma_of(a, sample));
    if (threadIdx.x > 0) continue;
    static_cast<T*>(a.loss)[sample] = T(loss_value(reduced, norm, inner, precision));
  }
}

// Gradients of rows [row, row + 32) and columns [column, column + 32) of V at one point; the block
// of the first columns also writes those of the diagonal. At the clean point A = 0: V itself
// enters, no Gram matrix.
template <class T>
__device__ void tile_backward(const LossArgs& a, const Sizes& n, int64_t point, int64_t sample,
                              int64_t row, int64_t column) {
  __shared__ Tile<T> rows, weights;
  const bool full = point < n.gram_points;
  const Coefficients<T> c = coefficients<T>(a.kind, point);
  const T g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
  const T precision = T(1.0 / (sigma_of(a, sample) * sigma_of(a, sample)));
  const T* saved = static_cast<const T*>(a.saved) + sample * n.saved;
  const T* gram = saved + point * n.columns * n.columns;
  const T* projections = saved + n.gram_points * n.columns * n.columns + point * n.columns;
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kTileRows;
  T product[kTileRows] = {}, norm[kTileRows] = {}, own[kTileRows] = {};
  for (int64_t l0 = full ? 0 : column; l0 < (full ? n.columns : column + 1); l0 += kTile) {
    __syncthreads();
    load_tile(a, point, sample, row, l0, rows);
    for_tile(false, [&](int i, int j) {
      const int64_t l = l0 + i, k = column + j;
      const bool inside = full && l < n.columns && k < n.columns;
      weights[i][j] = inside
                          ? gram_weight(c, gram[l * n.columns + k], weight_of<T>(a.sign, a.rank, l),
                                        weight_of<T>(a.sign, a.rank, k), l == k, precision, g)
                          : T(0);
    });
    __syncthreads();
    const T w = weight_of<T>(a.sign, a.rank, l0 + lane);
    for (int j = 0; j < kTileRows; ++j) {
      const T v = rows[first + j][lane];
      if (l0 == column) own[j] = v;
      norm[j] = mul_add(w * v, v, norm[j]);
    }
    for (int l = 0; full && l < kTile; ++l) {
      const T weight = weights[l][lane];
      for (int j = 0; j < kTileRows; ++j) {
        product[j] = mul_add(rows[first + j][l], weight, product[j]);
      }
    }
  }
  const int64_t k = column + lane;
  const T w = weight_of<T>(a.sign, a.rank, k);
  const T by_noise = k < n.columns ? noise_weight(c, projections[k], w, precision, g) : T(0);
  const T by_own = full ? diag_weight(c, w, g) : gram_weight(c, T(0), w, w, true, precision, g);
  __syncthreads();
  for (int j = 0; j < kTileRows; ++j) {
    const T row_norm = warp_sum(norm[j]);
    const int64_t i = row + first + j;
    if (i >= a.size) continue;
    const T d = at<T>(a.diag, point, sample, i), z = at<T>(a.noise, 0, sample, i);
    rows[first + j][lane] = product[j] + (z * by_noise + (full ? d : T(1)) * by_own * own[j]);
    if (column > 0 || lane > 0) continue;
    static_cast<T*>(a.grad_diag)[(point * a.batch + sample) * a.size + i] =
        diag_grad(c, d, full ? row_norm : T(0), z, precision, g);
  }
  __syncthreads();
  for_tile(a.grad_factor.column != 1, [&](int i, int j) {
    const int64_t to = row + i, from = column + j;
    if (to >= a.size || from > a.rank) return;
    if (from < a.rank) {
      const_cast<T&>(at<T>(a.grad_factor, point, sample, to, from)) = rows[i][j];
    } else if (point < a.score_points) {
      static_cast<T*>(a.grad_score)[(point * a.batch + sample) * a.size + to] = rows[i][j];
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) low_rank_backward_kernel(LossArgs a, Sizes n) {
  const int64_t across = ceil_div(n.columns, kTile), down = ceil_div(a.size, kTile);
  const int64_t items = n.points * a.batch * down * across;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t rest = item / across, owner = rest / down;
    tile_backward<T>(a, n, owner / a.batch, owner % a.batch, rest % down * kTile,
                     item % across * kTile);
  }
}

// One entry of an entry-wise loss.
template <class T>
__device__ T entry_of(const LossArgs& a, int64_t sample, int64_t i, T inverse) {
  const T precision = inverse * inverse;
  const T s = at<T>(a.score, 0, sample, i), z = at<T>(a.noise, 0, sample, i);
  if (a.kind == kDsm) return dsm_entry(s, z, inverse);
  if (a.kind == kDsmVr) return dsm_vr_entry(s, at<T>(a.score, 1, sample, i), z, inverse);
  const T d = at<T>(a.diag, 0, sample, i);
  if (a.kind == kD2smDiag) return diagonal_entry(s, d, z, precision);
  const bool clean = a.score_points == 3;
  return diagonal_vr_entry(
      s, at<T>(a.score, 1, sample, i), clean ? at<T>(a.score, 2, sample, i) : T(0), d,
      at<T>(a.diag, 1, sample, i), at<T>(a.diag, 2, sample, i), z, precision, clean);
}

template <class T>
__global__ void __launch_bounds__(kThreads) entry_loss_kernel(LossArgs a, Sizes) {
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    const T inverse = T(1) / T(sigma_of(a, sample));
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < a.size; i += kThreads) {
      sum += double(entry_of(a, sample, i, inverse));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) static_cast<T*>(a.loss)[sample] = T(sum);
  }
}

template <class T>
__device__ void entry_backward(const LossArgs& a, int64_t point, int64_t sample, int64_t i,
                               T inverse, T g) {
  const int64_t flat = (point * a.batch + sample) * a.size + i;
  const bool scored = point < a.score_points;  // without it the clean point has a = 0
  const T s = scored ? at<T>(a.score, point, sample, i) : T(0);
  const T z = at<T>(a.noise, 0, sample, i);
  T* grad_score = static_cast<T*>(a.grad_score) + flat;
  if (a.kind == kDsm || a.kind == kDsmVr) {
    *grad_score = dsm_grad(point, s, z, inverse, g);
    return;
  }
  const T slope = diagonal_grad(coefficients<T>(a.kind, point), s, at<T>(a.diag, point, sample, i),
                                z, inverse * inverse, g);
  static_cast<T*>(a.grad_diag)[flat] = slope;
  if (scored) *grad_score = T(2) * s * slope;
}

template <class T>
__global__ void __launch_bounds__(kThreads) entry_backward_kernel(LossArgs a, Sizes n) {
  const int64_t chunks = ceil_div(a.size, kEntryRows);
  for (int64_t item = blockIdx.x; item < n.points * a.batch * chunks; item += gridDim.x) {
    const int64_t owner = item / chunks, begin = item % chunks * kEntryRows;
    const int64_t sample = owner % a.batch;
    const int64_t end = begin + kEntryRows < a.size ? begin + kEntryRows : a.size;
    const T inverse = T(1) / T(sigma_of(a, sample));
    const T g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      entry_backward(a, owner / a.batch, sample, i, inverse, g);
    }
  }
}

Sizes sizes_of(const LossArgs& a) {
  const int64_t points = points_of(a.kind);
  return {points, points == 3 ? 2 : 1, a.rank + 1, saved_size(a.kind, a.rank)};
}

bool is_low_rank(const LossArgs& a) { return a.kind == kD2sm || a.kind == kD2smVr; }

// The kernel for float32 or float64, as the Python layer has checked.
template <class Kernel>
Kernel of_type(int dtype, Kernel of_float, Kernel of_double) {
  return dtype == kFloat64 ? of_double : of_float;
}

}  // namespace

}  // namespace HOS_ISA

void loss_cuda(const LossArgs& a, int dtype, Launch where) {
  const auto low_rank = of_type(dtype, low_rank_loss_kernel<float>, low_rank_loss_kernel<double>);
  const auto entry = of_type(dtype, entry_loss_kernel<float>, entry_loss_kernel<double>);
  launch("loss", is_low_rank(a) ? low_rank : entry, a.batch, where, a, sizes_of(a));
}

void loss_backward_cuda(const LossArgs& a, int dtype, Launch where) {
  const Sizes n = sizes_of(a);
  const int64_t samples = n.points * a.batch;
  if (is_low_rank(a)) {
    const auto kernel =
        of_type(dtype, low_rank_backward_kernel<float>, low_rank_backward_kernel<double>);
    const int64_t tiles = ceil_div(a.size, kTile) * ceil_div(n.columns, kTile);
    launch("loss_backward", kernel, samples * tiles, where, a, n);
  } else {
    const auto kernel = of_type(dtype, entry_backward_kernel<float>, entry_backward_kernel<double>);
    launch("loss_backward", kernel, samples * ceil_div(a.size, kEntryRows), where, a, n);
  }
}

}  // namespace hos
