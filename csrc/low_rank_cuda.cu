// diag(d) + U diag(w) U^T on CUDA. The dense matrix: a block computes 128 x 128 entries on or above
// the diagonal, each thread 16 x 4 of them in registers, and writes them and their mirror image in
// whole lines, each once: 2 r flops for two entries, 8 bytes, where the full product would be bound
// by its flops from r = 30 on. The product with vectors: U^T v of a chunk of rows a block, then
// d v + U t with t from the chunks in fixed order; U is read twice, the matrix never formed.

#include "low_rank.h"
#include "staging.cuh"

namespace hos {
inline namespace HOS_ISA {

namespace {

// ------------------------------------------------------------------------------------ dense matrix

constexpr int kSquare = 128;                 // rows and columns of a block's entries
constexpr int kRowsEach = kSquare / kWarps;  // entries of a thread
constexpr int kColumnsEach = kSquare / kWarp;

// Columns of U in shared memory at a time; and of the entries on their way to the mirror image,
// whose odd pitch has a column meet every bank.
template <class T>
constexpr int kDepth = 256 / int(sizeof(T));
template <class T>
constexpr int kMirror = 512 / int(sizeof(T));

struct AssemblePlan {
  TileShape tile;
  int copies, count;  // elements of U in a copy; of a row of the result in a store
  int64_t tiles;      // across the matrix
};

template <class T, bool kDown>
struct Square {
  const LowRankArgs& a;
  const AssemblePlan& p;
  int64_t sample, row, column;  // of the first entry
  T* memory;
  T inner[kRowsEach][kColumnsEach] = {};

  // Entries of this thread, such that its reads of U are wide and meet different banks.
  __device__ __forceinline__ int row_of(int i) const {
    const int warp = threadIdx.x / kWarp;
    return kDown ? warp * kRowsEach + i : warp + i * kWarps;
  }
  __device__ __forceinline__ int column_of(int j) const {
    const int lane = threadIdx.x % kWarp;
    return kDown ? lane * kColumnsEach + j : lane + j * kWarp;
  }

  __device__ __forceinline__ void fetch(int64_t first, int64_t from, T* to) const {
    const Lines lines = factor_lines(a.factor, p.tile, a.size - first, a.rank - from);
    fetch_lines(place<T>(a.factor, 0, sample, first, from), lines, p.copies, to);
  }

  __device__ __forceinline__ void multiply(const T* left, const T* right, int64_t from, int depth) {
    constexpr int kEach = kDown ? 1 : kWord<T>;
    for (int k = 0; k < depth; k += kEach) {
      T y[kColumnsEach][kEach];
      if constexpr (kDown) {
        load_run<kColumnsEach>(right + k * p.tile.pitch + column_of(0), &y[0][0]);
      } else {
#pragma unroll
        for (int j = 0; j < kColumnsEach; ++j) {
          load_run<kEach>(right + column_of(j) * p.tile.pitch + k, y[j]);
        }
      }
      if (a.sign != nullptr) {
#pragma unroll
        for (int m = 0; m < kEach; ++m) {
          const T w = k + m < depth ? weight_of<T>(a.sign, a.rank, from + k + m) : T(0);
#pragma unroll
          for (int j = 0; j < kColumnsEach; ++j) y[j][m] *= w;
        }
      }
      constexpr int kRun = kDown ? kWord<T> : 1;  // rows in one go
#pragma unroll
      for (int i = 0; i < kRowsEach; i += kRun) {
        T x[kDown ? kRun : kEach];
        load_run<(kDown ? kRun : kEach)>(
            left + (kDown ? k * p.tile.pitch + row_of(i) : row_of(i) * p.tile.pitch + k), x);
#pragma unroll
        for (int run = 0; run < kRun; ++run) {
#pragma unroll
          for (int j = 0; j < kColumnsEach; ++j) {
#pragma unroll
            for (int m = 0; m < kEach; ++m) {
              inner[i + run][j] = mul_add(x[kDown ? run : m], y[j][m], inner[i + run][j]);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ T* out_row(int64_t i) const {
    return static_cast<T*>(a.out) + sample * a.out_batch + i * a.out_row;
  }

  __device__ __forceinline__ void write() const {
    const int64_t to = column + column_of(0);
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      const int64_t from = row + row_of(i);
      if (from >= a.size) continue;
      const T d = row == column ? at<T>(a.diag, 0, sample, from) : T(0);
      T entries[kColumnsEach];
#pragma unroll
      for (int j = 0; j < kColumnsEach; ++j) {
        entries[j] = hessian_entry(inner[i][j], d, from == column + column_of(j));
      }
      T* out = out_row(from);
      if (kDown && p.count == kColumnsEach && to + kColumnsEach <= a.size) {
        store_run<kColumnsEach>(entries, out + to);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kColumnsEach; ++j) {
        if (column + column_of(j) < a.size) out[column + column_of(j)] = entries[j];
      }
    }
  }

  // The same entries below the diagonal, through shared memory, a warp a line.
  __device__ __forceinline__ void mirror() {
    constexpr int kPitch = kMirror<T> + 1;
    for (int first = 0; first < kSquare; first += kMirror<T>) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRowsEach; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnsEach; ++j) {
          const int to = column_of(j) - first;
          if (to >= 0 && to < kMirror<T>) memory[row_of(i) * kPitch + to] = inner[i][j];
        }
      }
      __syncthreads();
      for (int j = threadIdx.x / kWarp; j < kMirror<T>; j += kWarps) {
        if (column + first + j >= a.size) break;
        T* out = out_row(column + first + j) + row;
        for (int i = threadIdx.x % kWarp; i < kSquare; i += kWarp) out[i] = memory[i * kPitch + j];
      }
    }
  }

  __device__ __forceinline__ void run() {
    T *left = memory, *right = memory + tile_elements(p.tile);
    for (int64_t from = 0; from < a.rank; from += p.tile.columns) {
      __syncthreads();
      const int depth = int(min(a.rank - from, int64_t(p.tile.columns)));
      if (!kDown) {  // beyond the last column: 0, up to a word
        for_pieces(kSquare, round_up(depth, kWord<T>) - depth, [&](int i, int k) {
          left[i * p.tile.pitch + depth + k] = right[i * p.tile.pitch + depth + k] = T(0);
        });
      }
      fetch(row, from, left);
      if (row != column) fetch(column, from, right);
      __pipeline_commit();
      __pipeline_wait_prior(0);
      __syncthreads();
      multiply(left, row == column ? left : right, from, depth);
    }
    write();
    if (row != column) mirror();
    __syncthreads();
  }
};

template <class T, bool kDown>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2 - kPaired)
    assemble_kernel(LowRankArgs a, AssemblePlan p) {
  const int64_t pairs = p.tiles * (p.tiles + 1) / 2;
  for (int64_t item = blockIdx.x; item < a.batch * pairs; item += gridDim.x) {
    // The pair `rest` of the triangle, by rows: row r begins at r (2 tiles - r + 1) / 2.
    const int64_t rest = item % pairs;
    const double half = double(p.tiles) + 0.5;
    int64_t r = int64_t(half - sqrt(half * half - 2.0 * double(rest)));
    while (r > 0 && r * (2 * p.tiles - r + 1) / 2 > rest) --r;
    while ((r + 1) * (2 * p.tiles - r) / 2 <= rest) ++r;
    const int64_t c = rest - r * (2 * p.tiles - r + 1) / 2 + r;
    Square<T, kDown> square{a, p, item / pairs, r * kSquare, c * kSquare, shared_memory<T>()};
    square.run();
  }
}

template <class T>
void run_assemble(const LowRankArgs& a, Launch where) {
  const bool down = a.factor.column != 1 && a.rank > 0;
  AssemblePlan p;
  p.tile = tile_shape<T>(kSquare, int(std::min<int64_t>(kDepth<T>, round_up(a.rank, 4))), down);
  p.copies = copy_count(a.factor, a.rank, int(sizeof(T)), down);
  p.tiles = ceil_div(a.size, kSquare);
  const bool aligned = reinterpret_cast<uintptr_t>(a.out) % 16 == 0 && a.out_row % kWord<T> == 0 &&
                       a.out_batch % kWord<T> == 0;
  p.count = aligned ? kColumnsEach : 1;
  const int64_t elements = std::max<int64_t>(2 * tile_elements(p.tile), kSquare * (kMirror<T> + 1));
  launch("assemble", down ? assemble_kernel<T, true> : assemble_kernel<T, false>,
         Grid(a.batch * p.tiles * (p.tiles + 1) / 2, kThreads, elements * int64_t(sizeof(T))),
         where, a, p);
}

// ----------------------------------------------------------------------------- product with
// vectors

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
__global__ void __launch_bounds__(kThreads, 2) project_kernel(LowRankArgs a, Chunks chunks) {
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
    apply_kernel(LowRankArgs a, Chunks chunks, TileShape tile, int copies) {
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
void run_matvec(const LowRankArgs& a, Launch where) {
  const Chunks chunks = chunks_of(a.batch, a.size, a.columns);
  const int64_t groups = ceil_div(a.columns, kVectors);
  const bool down = a.factor.column != 1 && a.rank > 0;
  const TileShape tile =
      tile_shape<T>(kApplyThreads, int(std::min<int64_t>(a.rank, 256 / int64_t(sizeof(T)))), down);
  const int copies = copy_count(a.factor, a.rank, int(sizeof(T)), down);
  const int64_t blocks = ceil_div(a.rank, kProjectColumns);
  launch("matvec", project_kernel<T>, a.batch * chunks.count * groups * blocks, where, a, chunks);
  const int64_t elements = tile_elements(tile) + int64_t(tile.columns) * kVectors;
  launch("matvec", apply_kernel<T>,
         Grid(a.batch * ceil_div(a.size, kApplyThreads) * groups, kApplyThreads,
              elements * int64_t(sizeof(T))),
         where, a, chunks, tile, copies);
}

}  // namespace

}  // namespace HOS_ISA

void assemble_cuda(const LowRankArgs& a, int dtype, Launch where) {
  dtype == kFloat64 ? run_assemble<double>(a, where) : run_assemble<float>(a, where);
}

int64_t matvec_scratch(int64_t batch, int64_t size, int64_t rank, int64_t columns) {
  return batch * chunks_of(batch, size, columns).count * rank * columns;
}

void matvec_cuda(const LowRankArgs& a, int dtype, Launch where) {
  if (a.size == 0 || a.columns == 0) return;
  dtype == kFloat64 ? run_matvec<double>(a, where) : run_matvec<float>(a, where);
}

}  // namespace hos
