// Losses of low rank on CUDA, backward: dL/dV = V W + z n^T + diag(d) V diag(o), with
// W, n and o from the saved Gram matrices and projections. A block takes a chunk of rows of one
// sample at one point; W is formed once in shared memory, tiles of V pass through as in forward, a
// thread owns kRows x kQuad entries of the product, and the gradient leaves through the tile it
// came in by: U is read once and dU written once, 16 bytes at a time. At the clean point W is
// diagonal. Bytes moved: 4 (6 r + 13) a row with variance reduction. Above a span of columns V is
// cut into spans, and a block makes one span of the gradient from all of them.

#include "losses/sums.cuh"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int kQuad = 4;  // columns of a thread
constexpr int kBackwardThreads = 128;
constexpr int64_t kBlocksWanted = 2048;
constexpr int64_t kLeastTiles = 4;  // of a chunk, for which a block forms W

struct Plan {
  int points, gram_points, columns;
  int spans, span;
  int groups;  // of threads, one above another in a tile
  int64_t chunk, chunks;
  TileShape tile;
  int copies, puts;  // elements of U and of its gradient in one copy
  bool same_order;   // of U and its gradient
  int stage;         // elements of a stage: tile, z, d
  int64_t saved;
};

template <class T>
constexpr int kMostColumns = sizeof(T) == 8 ? 64 : 96;  // of a span

template <class T>
Plan plan_of(const LossArgs& a, int rows_each) {
  Plan p;
  p.points = int(points_of(a.kind));
  p.gram_points = int(gram_points_of(p.points));
  p.columns = int(a.rank + 1);
  p.spans = int(ceil_div(p.columns, kMostColumns<T>));
  p.span = round_up(ceil_div(p.columns, p.spans), kQuad);
  p.groups = std::min(kBackwardThreads / (p.span / kQuad), kBackwardThreads / rows_each);
  const bool down = a.factor.column != 1 && a.rank > 0;
  p.tile = tile_shape<T>(p.groups * rows_each, p.span, down);
  p.copies = copy_count(a.factor, a.rank, int(sizeof(T)), down);
  p.same_order = a.rank > 0 && (a.grad_factor.column != 1) == down;
  p.puts = copy_count(a.grad_factor, a.rank, int(sizeof(T)), down);
  p.stage = tile_elements(p.tile) + 2 * p.tile.rows;
  p.saved = saved_size(a.kind, a.rank);
  const int64_t tiles = ceil_div(a.size, p.tile.rows);
  const int64_t items = std::max<int64_t>(1, a.batch * p.points * p.spans);
  const int64_t chunks =
      std::max<int64_t>(1, std::min(ceil_div(kBlocksWanted, items), ceil_div(tiles, kLeastTiles)));
  p.chunk = std::max<int64_t>(1, ceil_div(tiles, chunks)) * p.tile.rows;
  p.chunks = ceil_div(a.size, p.chunk);
  return p;
}

template <class T>
int64_t shared_bytes(const Plan& p) {
  return int64_t(sizeof(T)) * (int64_t(kStages) * p.stage + int64_t(p.span) * (p.span + 2));
}

// One block's share: span `own` of the gradient in rows [begin, end).
template <class T, int kRows, bool kDown>
struct Block {
  const LossArgs& a;
  const Plan& p;
  int64_t point, sample, begin, end;
  int own;
  T* ring;
  T* weights;  // span x span of W

  Coefficients<T> c = {};
  T g = T(0), precision = T(0);
  const T* saved = nullptr;
  bool full = false;         // W is a matrix, not its diagonal alone
  int turns = 1;             // spans of V that make a tile of the gradient
  int group = 0, first = 0;  // rows and first column of this thread in a tile
  int64_t begin_of_tile = 0;
  T product[kRows][kQuad] = {};
  T norm = T(0);

  __device__ __forceinline__ void prepare() {
    c = coefficients<T>(a.kind, point);
    g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
    precision = T(precision_of(a, sample));
    saved = static_cast<const T*>(a.saved) + sample * p.saved;
    full = point < p.gram_points;
    turns = full ? p.spans : 1;
    group = int(threadIdx.x) / (p.span / kQuad);
    first = int(threadIdx.x) % (p.span / kQuad) * kQuad;
    const T* projections =
        saved + int64_t(p.gram_points) * p.columns * p.columns + point * p.columns;
    for (int j = threadIdx.x; j < p.span; j += blockDim.x) {
      const int k = own * p.span + j;
      const T w = weight_of<T>(a.sign, a.rank, k);
      by_noise()[j] = k < p.columns ? noise_weight(c, projections[k], w, precision, g) : T(0);
      by_own()[j] = full ? diag_weight(c, w, g) : gram_weight(c, T(0), w, w, true, precision, g);
    }
  }

  // n and o of the block's own columns, behind W.
  __device__ __forceinline__ T* by_noise() const { return weights + p.span * p.span; }
  __device__ __forceinline__ T* by_own() const { return by_noise() + p.span; }
  __device__ __forceinline__ bool works() const { return group < p.groups; }
  __device__ __forceinline__ T* tile(int stage) const { return ring + stage * p.stage; }
  __device__ __forceinline__ T* runs(int stage) const {
    return tile(stage) + tile_elements(p.tile);
  }
  // The span of V that comes in a step: the block's own at last, to be in shared memory then.
  __device__ __forceinline__ int span_of(int step) const {
    return (own + 1 + step % turns) % p.spans;
  }
  __device__ __forceinline__ int source_of(int step) const { return full ? span_of(step) : own; }

  // Columns beyond the last, and a score that is left out, stay 0.
  __device__ __forceinline__ void clear(int steps) {
    const int n = min(steps, kStages) * p.stage;
    for (int k = threadIdx.x; k < n; k += blockDim.x) ring[k] = T(0);
    __syncthreads();
  }

  __device__ __forceinline__ void fetch(int step, int steps) {
    if (step < steps) {
      const int64_t row = begin + int64_t(step / turns) * p.tile.rows, rows = end - row;
      const int stage = step % kStages, warp = threadIdx.x / kWarp;
      fetch_tile(a, point, sample, row, rows, int64_t(source_of(step)) * p.span, p.tile, p.copies,
                 tile(stage));
      if (warp < 2) {
        fetch_run(warp == 0 ? a.noise : a.diag, warp == 0 ? 0 : point, sample, row, rows,
                  p.tile.rows, runs(stage) + warp * p.tile.rows);
      }
    }
    __pipeline_commit();
  }

  // Rows `from` on of W, the block's own columns.
  __device__ __forceinline__ void form_weights(int from) {
    const T* gram = saved + point * p.columns * p.columns;
    for_pieces(p.span, p.span, [&](int i, int j) {
      const int l = from * p.span + i, k = own * p.span + j;
      const bool inside = l < p.columns && k < p.columns;
      weights[i * p.span + j] =
          inside ? gram_weight(c, gram[int64_t(l) * p.columns + k], weight_of<T>(a.sign, a.rank, l),
                               weight_of<T>(a.sign, a.rank, k), l == k, precision, g)
                 : T(0);
    });
  }

  // Row j of this thread in a tile: neighbours in memory where a column's rows are, else apart, for
  // the banks.
  __device__ __forceinline__ int row_of(int j) const {
    return kDown ? group * kRows + j : group + j * p.groups;
  }

  __device__ __forceinline__ void multiply(const T* v, int count) {
    if (!works()) return;
    constexpr int kEach = kDown ? 1 : kWord<T>;  // rows of W in one go
    for (int l = 0; l < count; l += kEach) {
      T x[kRows][kEach];
      if constexpr (kDown) {
        load_run<kRows>(v + l * p.tile.pitch + group * kRows, &x[0][0]);
      } else {
#pragma unroll
        for (int j = 0; j < kRows; ++j) load_run<kEach>(v + row_of(j) * p.tile.pitch + l, x[j]);
      }
#pragma unroll
      for (int m = 0; m < kEach; ++m) {
        T w[kQuad];
        load_run<kQuad>(weights + (l + m) * p.span + first, w);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
#pragma unroll
          for (int k = 0; k < kQuad; ++k) product[j][k] = mul_add(x[j][m], w[k], product[j][k]);
        }
      }
    }
  }

  // sum_k w_k V_ik^2 of the row of this thread, one span more.
  __device__ __forceinline__ void add_norm(const T* v, int from, int count) {
    if (own > 0 || int(threadIdx.x) >= p.tile.rows) return;
    const T* row = v + int(threadIdx.x) * (kDown ? 1 : p.tile.pitch);
    for (int l = 0; l < count; ++l) {
      const T x = row[kDown ? l * p.tile.pitch : l];
      norm = mul_add(weight_of<T>(a.sign, a.rank, from * p.span + l) * x, x, norm);
    }
  }

  // The gradient in place of the block's own columns of V.
  __device__ __forceinline__ void replace(T* v, const T* z, int rows) {
    const T* d = z + p.tile.rows;
    if (works()) {
      T noise_by[kQuad], own_by[kQuad];
      load_run<kQuad>(by_noise() + first, noise_by);
      load_run<kQuad>(by_own() + first, own_by);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int i = row_of(j);
        const T by_row = full ? d[i] : T(1), noise = z[i];
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          const T x = v[kDown ? (first + k) * p.tile.pitch + i : i * p.tile.pitch + first + k];
          product[j][k] += noise * noise_by[k] + by_row * own_by[k] * x;
        }
      }
    }
    if (own == 0 && int(threadIdx.x) < rows) {
      const int i = threadIdx.x;
      static_cast<T*>(a.grad_diag)[(point * a.batch + sample) * a.size + begin_of_tile + i] =
          diag_grad(c, d[i], norm, z[i], precision, g);
    }
    norm = T(0);
    __syncthreads();
    if (works()) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int i = row_of(j);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          const bool there = own * p.span + first + k < p.columns;  // else NaN could spread
          v[kDown ? (first + k) * p.tile.pitch + i : i * p.tile.pitch + first + k] =
              there ? product[j][k] : T(0);
          product[j][k] = T(0);
        }
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void put(const T* v, int rows) {
    const int64_t column = int64_t(own) * p.span, last = a.rank - column;
    if (last > 0) {
      const View& f = a.grad_factor;
      T* to = const_cast<T*>(place<T>(f, point, sample, begin_of_tile, column));
      const Lines lines = factor_lines(f, p.tile, rows, last);
      if (!p.same_order) {
        for_pieces(rows, int(min(last, int64_t(p.span))), [&](int i, int k) {
          to[i * f.row + k * f.column] = v[kDown ? k * p.tile.pitch + i : i * p.tile.pitch + k];
        });
      } else if (p.puts * int(sizeof(T)) == 16) {
        put_lines<kWord<T>>(v, lines, to);
      } else if (p.puts == 2) {
        put_lines<2>(v, lines, to);
      } else {
        put_lines<1>(v, lines, to);
      }
    }
    if (last >= p.span || point >= a.score_points) return;
    T* to = static_cast<T*>(a.grad_score) + (point * a.batch + sample) * a.size + begin_of_tile;
    const T* from = v + (kDown ? last * p.tile.pitch : last);
    for (int i = threadIdx.x; i < rows; i += blockDim.x)
      to[i] = from[i * (kDown ? 1 : p.tile.pitch)];
  }

  __device__ __forceinline__ void run() {
    prepare();
    const int steps = int(ceil_div(end - begin, p.tile.rows)) * turns;
    clear(steps);
    for (int step = 1 - kStages; step < steps; ++step) {
      if (step >= 0) {
        __pipeline_wait_prior(kStages - 2);
        __syncthreads();  // the tile is there for all, and the one before is done with
      }
      fetch(step + kStages - 1, steps);
      if (step < 0) continue;
      T* v = tile(step % kStages);
      if (full) {
        const int from = span_of(step), count = min(p.span, p.columns - from * p.span);
        if (turns > 1 || step == 0) {
          form_weights(from);
          __syncthreads();
        }
        multiply(v, count);
        add_norm(v, from, count);
      }
      if (step % turns + 1 < turns) continue;
      begin_of_tile = begin + int64_t(step / turns) * p.tile.rows;
      const int rows = int(min(end - begin_of_tile, int64_t(p.tile.rows)));
      replace(v, runs(step % kStages), rows);
      put(v, rows);
    }
    __syncthreads();
  }
};

template <class T, int kRows, bool kDown>
__global__ void __launch_bounds__(kBackwardThreads, sizeof(T) == 8 ? 3
                                                    : kRows == 4   ? 5
                                                                   : 4)
    backward_kernel(LossArgs a, Plan p) {
  T* memory = shared_memory<T>();
  for (int64_t item = blockIdx.x; item < p.points * a.batch * p.chunks * p.spans;
       item += gridDim.x) {
    const int64_t chunk = item / p.spans, owner = chunk / p.chunks;
    const int64_t begin = chunk % p.chunks * p.chunk;
    const int64_t end = begin + p.chunk < a.size ? begin + p.chunk : a.size;
    Block<T, kRows, kDown> block{a,
                                 p,
                                 owner / a.batch,
                                 owner % a.batch,
                                 begin,
                                 end,
                                 int(item % p.spans),
                                 memory,
                                 memory + kStages * p.stage};
    block.run();
  }
}

template <class T, int kRows>
void run_backward(const LossArgs& a, Queue queue) {
  const Plan p = plan_of<T>(a, kRows);
  const auto kernel =
      p.tile.down ? backward_kernel<T, kRows, true> : backward_kernel<T, kRows, false>;
  const Grid grid(p.points * a.batch * p.chunks * p.spans, kBackwardThreads, shared_bytes<T>(p));
  launch("loss_backward", kernel, grid, queue, a, p);
}

}  // namespace

void low_rank_backward(const LossArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat64) {
    run_backward<double, 4>(a, queue);
  } else if (a.rank < 32) {
    run_backward<float, 4>(a, queue);
  } else {
    run_backward<float, 8>(a, queue);
  }
}

}  // namespace HOS_ISA
}  // namespace hos
