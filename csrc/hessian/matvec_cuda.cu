// The product of diag(d) + U diag(w) U^T with vectors on CUDA: U^T v of a chunk of rows a block,
// then d v + U t with t from the chunks in fixed order; U is read twice, the matrix never formed.

#include "base/staging.cuh"
#include "hessian/hessian.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int kVectors = 4;                // right-hand sides of a block
constexpr int kProjectColumns = kThreads;  // columns of U of a block
constexpr int kApplyThreads = 128;         // rows of a block
constexpr int64_t kBlocksWanted = 1024, kLeastRows = 256;

struct Chunks {
  int64_t rows, count;
};

Chunks chunks_of(int64_t batch, int64_t size, int64_t columns) {
  const int64_t items = std::max<int64_t>(1, batch * ceil_div(columns, kVectors));
  const int64_t most = std::max<int64_t>(1, size / kLeastRows);
  const int64_t count = std::min(ceil_div(kBlocksWanted, items), most);
  const int64_t rows = std::max<int64_t>(1, ceil_div(size, count));
  return {rows, std::max<int64_t>(1, ceil_div(size, rows))};
}

// sum_i U_ik v_ij over the rows of a chunk, for kVectors columns j of v, into
// (sample, chunk, j, k) of scratch.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) project_kernel(HessianArgs a, Chunks chunks) {
  __shared__ T parts[kThreads][kVectors];
  const int64_t groups = ceil_div(a.columns, kVectors), blocks = ceil_div(a.rank, kProjectColumns);
  const bool down = a.factor.column != 1;
  for (int64_t item = blockIdx.x; item < a.batch * chunks.count * groups * blocks;
       item += gridDim.x) {
    const int64_t first = item % blocks * kProjectColumns, rest = item / blocks;
    const int64_t j0 = rest % groups * kVectors, owner = rest / groups;
    const int64_t sample = owner / chunks.count, begin = owner % chunks.count * chunks.rows;
    const int64_t end = min(begin + chunks.rows, a.size);
    const int width = int(min(a.rank - first, int64_t(kProjectColumns)));
    T* out = static_cast<T*>(a.scratch) + (owner * a.columns + j0) * a.rank + first;
    const auto add = [&](int64_t i, int k, T(&sum)[kVectors]) {
      const T u = at<T>(a.factor, 0, sample, i, first + k);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (j0 + j < a.columns) sum[j] = mul_add(u, at<T>(a.v, 0, sample, i, j0 + j), sum[j]);
      }
    };
    if (down) {  // a warp a column, its lanes along the rows
      for (int k = threadIdx.x / kWarp; k < width; k += kWarps) {
        T sum[kVectors] = {};
        for (int64_t i = begin + threadIdx.x % kWarp; i < end; i += kWarp) add(i, k, sum);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          sum[j] = warp_sum(sum[j]);
          if (threadIdx.x % kWarp == 0 && j0 + j < a.columns) out[j * a.rank + k] = sum[j];
        }
      }
      continue;
    }
    // A thread a column and every `slices`-th row: neighbours in memory.
    const int slices = kThreads / width, slice = int(threadIdx.x) / width;
    const int k = int(threadIdx.x) % width;
    T sum[kVectors] = {};
    if (slice < slices) {
      for (int64_t i = begin + slice; i < end; i += slices) add(i, k, sum);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) parts[threadIdx.x][j] = sum[j];
    __syncthreads();
    if (slice == 0) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        for (int other = 1; other < slices; ++other) sum[j] += parts[other * width + k][j];
        if (j0 + j < a.columns) out[j * a.rank + k] = sum[j];
      }
    }
    __syncthreads();
  }
}

// d v + U t for 128 rows and kVectors columns; t = diag(w) U^T v from the chunks.
template <class T>
__global__ void __launch_bounds__(kApplyThreads)
    apply_kernel(HessianArgs a, Chunks chunks, TileShape tile, int copies) {
  T* u = shared_memory<T>();
  T* t = u + tile_elements(tile);
  const int64_t groups = ceil_div(a.columns, kVectors), across = ceil_div(a.size, kApplyThreads);
  for (int64_t item = blockIdx.x; item < a.batch * across * groups; item += gridDim.x) {
    const int64_t j0 = item % groups * kVectors, rest = item / groups;
    const int64_t sample = rest / across, row = rest % across * kApplyThreads;
    const int64_t i = row + threadIdx.x;
    T sum[kVectors] = {};
    for (int64_t from = 0; from < a.rank; from += tile.columns) {
      const int depth = int(min(a.rank - from, int64_t(tile.columns)));
      __syncthreads();
      const Lines lines = factor_lines(a.factor, tile, a.size - row, a.rank - from);
      fetch_lines(place<T>(a.factor, 0, sample, row, from), lines, copies, u);
      __pipeline_commit();
      for (int e = threadIdx.x; e < depth * kVectors; e += kApplyThreads) {
        const int64_t k = from + e / kVectors, j = j0 + e % kVectors;
        const T* parts =
            static_cast<const T*>(a.scratch) + (sample * chunks.count * a.columns + j) * a.rank + k;
        T total = T(0);
        for (int64_t chunk = 0; chunk < chunks.count && j < a.columns; ++chunk) {
          total += parts[chunk * a.columns * a.rank];
        }
        t[e] = weight_of<T>(a.sign, a.rank, k) * total;
      }
      __pipeline_wait_prior(0);
      __syncthreads();
      const T* line = u + int(threadIdx.x) * (tile.down ? 1 : tile.pitch);
      for (int k = 0; k < depth; ++k) {
        const T x = line[tile.down ? k * tile.pitch : k];
        T y[kVectors];
        load_run<kVectors>(t + k * kVectors, y);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) sum[j] = mul_add(x, y[j], sum[j]);
      }
    }
    if (i >= a.size) continue;
    const T d = at<T>(a.diag, 0, sample, i);
    T* out = static_cast<T*>(a.out) + (sample * a.size + i) * a.columns + j0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (j0 + j < a.columns) out[j] = mul_add(d, at<T>(a.v, 0, sample, i, j0 + j), sum[j]);
    }
  }
}

template <class T>
void run_matvec(const HessianArgs& a, Queue queue) {
  const Chunks chunks = chunks_of(a.batch, a.size, a.columns);
  const int64_t groups = ceil_div(a.columns, kVectors);
  const bool down = a.factor.column != 1 && a.rank > 0;
  const TileShape tile =
      tile_shape<T>(kApplyThreads, int(std::min<int64_t>(a.rank, 256 / int64_t(sizeof(T)))), down);
  const int copies = copy_count(a.factor, a.rank, int(sizeof(T)), down);
  const int64_t blocks = ceil_div(a.rank, kProjectColumns);
  launch("matvec", project_kernel<T>, a.batch * chunks.count * groups * blocks, queue, a, chunks);
  const int64_t elements = tile_elements(tile) + int64_t(tile.columns) * kVectors;
  launch("matvec", apply_kernel<T>,
         Grid(a.batch * ceil_div(a.size, kApplyThreads) * groups, kApplyThreads,
              elements * int64_t(sizeof(T))),
         queue, a, chunks, tile, copies);
}

}  // namespace

int64_t matvec_scratch(int64_t batch, int64_t size, int64_t rank, int64_t columns) {
  return batch * chunks_of(batch, size, columns).count * rank * columns;
}

void matvec(const HessianArgs& a, int dtype, Queue queue) {
  if (a.size == 0 || a.columns == 0) return;
  dtype == kFloat64 ? run_matvec<double>(a, queue) : run_matvec<float>(a, queue);
}

}  // namespace HOS_ISA
}  // namespace hos
