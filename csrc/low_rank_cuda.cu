// diag(d) + U diag(w) U^T on CUDA: the dense matrix, 32 x 32 entries a block, each written once;
// and the product with vectors, one block for a sample and a right-hand side: U^T v goes to shared
// memory, then U times it. The product never forms the matrix; it reads U twice.

#include "launch.cuh"
#include "low_rank.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int kTileRows = kTile / kWarps;  // rows of a tile that a thread owns
constexpr int kColumns = 1024;             // columns of U in one go of a product

// Rows from `row` and columns from `column` of U; 0 beyond its ends.
template <class T>
__device__ void load_tile(const LowRankArgs& a, int64_t sample, int64_t row, int64_t column,
                          Tile<T>& tile) {
  for_tile(a.factor.column != 1, [&](int i, int k) {
    const bool inside = row + i < a.size && column + k < a.rank;
    tile[i][k] = inside ? at<T>(a.factor, 0, sample, row + i, column + k) : T(0);
  });
}

template <class T>
__device__ void assemble_tile(const LowRankArgs& a, int64_t sample, int64_t row, int64_t column) {
  __shared__ Tile<T> left, right;
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kTileRows;
  T inner[kTileRows] = {};
  for (int64_t k0 = 0; k0 < a.rank; k0 += kTile) {
    __syncthreads();
    load_tile(a, sample, row, k0, left);
    load_tile(a, sample, column, k0, right);
    __syncthreads();
    for (int k = 0; k < kTile; ++k) {
      const T weighted = weight_of<T>(a.sign, a.rank, k0 + k) * right[lane][k];
      for (int j = 0; j < kTileRows; ++j) {
        inner[j] = mul_add(left[first + j][k], weighted, inner[j]);
      }
    }
  }
  const int64_t to = column + lane;
  for (int j = 0; j < kTileRows; ++j) {
    const int64_t i = row + first + j;
    if (i >= a.size || to >= a.size) continue;
    static_cast<T*>(a.out)[sample * a.out_batch + i * a.out_row + to] =
        hessian_entry(inner[j], at<T>(a.diag, 0, sample, i), i == to);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) assemble_kernel(LowRankArgs a) {
  const int64_t tiles = ceil_div(a.size, kTile);
  for (int64_t item = blockIdx.x; item < a.batch * tiles * tiles; item += gridDim.x) {
    const int64_t rest = item / tiles;
    assemble_tile<T>(a, rest / tiles, rest % tiles * kTile, item % tiles * kTile);
  }
}

// inner_k = w_k sum_i U_ik v_i for columns [begin, end): a warp a column.
template <class T>
__device__ void project(const LowRankArgs& a, int64_t sample, int64_t column, int64_t begin,
                        int64_t end, T* inner) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t k = begin + threadIdx.x / kWarp; k < end; k += kWarps) {
    T sum = T(0);
    for (int64_t i = lane; i < a.size; i += kWarp) {
      sum = mul_add(at<T>(a.factor, 0, sample, i, k), at<T>(a.v, 0, sample, i, column), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) inner[k - begin] = weight_of<T>(a.sign, a.rank, k) * sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) matvec_kernel(LowRankArgs a) {
  __shared__ T inner[kColumns];
  for (int64_t item = blockIdx.x; item < a.batch * a.columns; item += gridDim.x) {
    const int64_t sample = item / a.columns, column = item % a.columns;
    T* out = static_cast<T*>(a.out) + sample * a.size * a.columns + column;
    for (int64_t begin = 0; begin == 0 || begin < a.rank; begin += kColumns) {
      const int64_t end = begin + kColumns < a.rank ? begin + kColumns : a.rank;
      __syncthreads();
      project(a, sample, column, begin, end, inner);
      __syncthreads();
      for (int64_t i = threadIdx.x; i < a.size; i += kThreads) {
        T sum = begin == 0 ? at<T>(a.diag, 0, sample, i) * at<T>(a.v, 0, sample, i, column)
                           : out[i * a.columns];
        for (int64_t k = begin; k < end; ++k) {
          sum = mul_add(at<T>(a.factor, 0, sample, i, k), inner[k - begin], sum);
        }
        out[i * a.columns] = sum;
      }
    }
  }
}

}  // namespace

}  // namespace HOS_ISA

void assemble_cuda(const LowRankArgs& a, int dtype, Launch where) {
  const int64_t tiles = ceil_div(a.size, kTile);
  launch("assemble", dtype == kFloat64 ? assemble_kernel<double> : assemble_kernel<float>,
         a.batch * tiles * tiles, where, a);
}

void matvec_cuda(const LowRankArgs& a, int dtype, Launch where) {
  launch("matvec", dtype == kFloat64 ? matvec_kernel<double> : matvec_kernel<float>,
         a.size > 0 ? a.batch * a.columns : 0, where, a);
}

}  // namespace hos
