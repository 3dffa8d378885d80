// diag(d) + U diag(w) U^T as a dense matrix on CUDA. A block computes 128 x 128 entries on or above
// the diagonal, each thread 16 x 4 of them in registers, and writes them and their mirror image in
// whole lines, each once: 2 r flops for two entries, 8 bytes, where the full product would be bound
// by its flops from r = 30 on.

#include "base/staging.cuh"
#include "hessian/hessian.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

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
  const HessianArgs& a;
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
    assemble_kernel(HessianArgs a, AssemblePlan p) {
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
void run_assemble(const HessianArgs& a, Queue queue) {
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
         queue, a, p);
}

}  // namespace

void assemble(const HessianArgs& a, int dtype, Queue queue) {
  dtype == kFloat64 ? run_assemble<double>(a, queue) : run_assemble<float>(a, queue);
}

}  // namespace HOS_ISA
}  // namespace hos
