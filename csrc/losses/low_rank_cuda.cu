// Losses of low rank on CUDA, forward: U is read from memory once. A block takes a
// chunk of rows of a sample at all points; tiles of V = [U, s] arrive in shared memory while the
// one before is at work, Gram matrices grow in registers (kSide x kSide entries a thread, upper
// triangle), column sums come from the same tile. A sample of one chunk is finished by its block;
// otherwise each chunk leaves its sums in `scratch`, and two small kernels add them in fixed order.
// Bytes moved: 4 (3 r + 7) a row with variance reduction. Above kMostTiles * kSide columns V is cut
// into spans, and a block takes a pair of them. Why no tensor cores: docs/cuda.md.

#include "losses/sums.cuh"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int kMostTiles = 11;           // across a span: its pairs fit a block
constexpr int kMostGroups = 16;          // threads that share a Gram tile, or a column
constexpr int64_t kBlocksWanted = 1024;  // to fill a GPU, several blocks a multiprocessor
constexpr int64_t kLeastRows = 256, kMostRows = 4096;  // of a chunk: cost and rounding of its sums

// How a problem is cut up, found on the host.
struct Plan {
  int points, gram_points, columns;
  int spans, span, pairs;  // spans of columns; pairs of them
  int64_t chunk, chunks;   // rows in a chunk, chunks in a sample
  TileShape tile;
  int copies;      // elements of U in one copy
  int tiles_each;  // tiles of V in a stage
  int stage;       // elements of a stage
  int threads;
  int64_t sums, saved;  // elements for a chunk and a sample
  bool direct;          // a block finishes its sample
};

// Sums of a chunk: packed Gram matrices, then five for each column, then two of the diagonal.
HOS_HD int64_t sums_size(int64_t gram_points, int64_t columns) {
  return gram_points * triangle(0, columns) + kColumnSums * columns + 2;
}

struct Cut {
  int side, spans, span, tile_rows;
  int64_t chunk, chunks;
};

Cut cut_up(bool wide, int64_t batch, int64_t size, int64_t rank) {
  Cut c;
  const int64_t columns = rank + 1;
  c.side = wide || columns <= 32 ? 4 : 8;
  c.spans = int(ceil_div(columns, c.side * kMostTiles));
  c.span = round_up(ceil_div(columns, c.spans), c.side);
  c.tile_rows = c.side == 4 && !wide ? 32 : 16;
  const int64_t pairs = int64_t(c.spans) * (c.spans + 1) / 2;
  const int64_t wanted = ceil_div(kBlocksWanted, std::max<int64_t>(1, batch * pairs));
  const int64_t most = std::max<int64_t>(1, size / kLeastRows);
  const int64_t chunks = std::max(std::min(wanted, most), ceil_div(size, kMostRows));
  c.chunk = round_up(std::max<int64_t>(1, ceil_div(size, std::max<int64_t>(1, chunks))), 32);
  c.chunks = std::max<int64_t>(1, ceil_div(size, c.chunk));
  return c;
}

// The block that leaves the fewest threads without a Gram tile.
int best_threads(int slots) {
  int best = 0, used = -1;
  for (int threads = 128; threads <= kThreads; threads += kWarp) {
    const int groups = std::min(threads / slots, kMostGroups);
    const int share = groups * slots * 1000 / threads;
    if (groups > 0 && share > used) {
      best = threads;
      used = share;
    }
  }
  return best;
}

template <class T>
Plan plan_of(const LossArgs& a) {
  const Cut c = cut_up(sizeof(T) == 8, a.batch, a.size, a.rank);
  Plan p;
  p.points = int(points_of(a.kind));
  p.gram_points = int(gram_points_of(p.points));
  p.columns = int(a.rank + 1);
  p.spans = c.spans;
  p.span = c.span;
  p.pairs = c.spans * (c.spans + 1) / 2;
  p.chunk = c.chunk;
  p.chunks = c.chunks;
  const bool down = a.factor.column != 1 && a.rank > 0;
  p.tile = tile_shape<T>(c.tile_rows, c.span, down);
  p.copies = copy_count(a.factor, a.rank, int(sizeof(T)), down);
  p.tiles_each = c.spans == 1 ? p.points : std::max(p.points, 2 * p.gram_points);
  p.stage = p.tiles_each * tile_elements(p.tile) + (1 + p.points) * p.tile.rows;
  const int across = c.span / c.side;
  const int most = c.spans == 1 ? across * (across + 1) / 2 : across * across;
  p.threads = best_threads(most * p.gram_points);
  p.sums = sums_size(p.gram_points, p.columns);
  p.saved = saved_size(a.kind, a.rank);
  p.direct = p.chunks == 1 && p.pairs == 1;
  return p;
}

constexpr int kKept = kColumnSums + 2;  // sums of a thread in shared memory

// Elements of the ring of stages, queue the sums of a chunk are gathered at the end.
HOS_HD int64_t ring_size(const Plan& p) {
  const int64_t ring = int64_t(kStages) * p.stage;
  const int64_t sums = p.pairs == 1 ? ceil_div(p.sums, 4) * 4 : 0;
  return ring > sums ? ring : sums;
}

template <class T>
int64_t shared_bytes(const Plan& p) {
  return int64_t(sizeof(T)) * (ring_size(p) + int64_t(kKept) * p.threads);
}

// One block's share of the rows [begin, end) of a sample: the spans `left` <= `right` of columns.
template <class T, int kSide, bool kDown>
struct Block {
  static constexpr int kRun = kDown ? 16 / kSide < kWord<T> ? 16 / kSide : kWord<T> : 1;

  const LossArgs& a;
  const Plan& p;
  int64_t sample, begin, end;
  int left, right;
  T *ring, *kept;  // kept: sums of each thread's column and share of the diagonal

  T gram[kSide][kSide] = {};                     // of this thread
  int point = 0, gram_left = 0, gram_right = 0;  // first columns of the tile, in its spans
  int group = 0, groups = 1, slice = 0, slices = 1;
  int own_column = 0;

  __device__ __forceinline__ bool square() const { return left == right; }

  __device__ __forceinline__ void share_out() {
    const int across = p.span / kSide;
    const int each = square() ? across * (across + 1) / 2 : across * across;
    const int slots = each * p.gram_points;
    groups = min(int(blockDim.x) / slots, kMostGroups);
    group = int(threadIdx.x) / slots;
    const int slot = int(threadIdx.x) % slots;
    point = slot / each;
    int rest = slot % each, row = 0;
    if (square()) {
      for (; rest >= across - row; ++row) rest -= across - row;
      rest += row;
    } else {
      row = rest / across;
      rest %= across;
    }
    gram_left = row * kSide;
    gram_right = rest * kSide;
    slices = min(int(blockDim.x) / p.span, kMostGroups);
    slice = square() ? int(threadIdx.x) / p.span : slices;
    own_column = int(threadIdx.x) % p.span;
    if (left * p.span + own_column >= p.columns) slice = slices;
  }

  __device__ __forceinline__ T* tile(int stage, int index) const {
    return ring + stage * p.stage + index * tile_elements(p.tile);
  }
  __device__ __forceinline__ T* runs(int stage) const { return tile(stage, p.tiles_each); }

  // Columns and scores that do not exist stay 0 in every tile.
  __device__ __forceinline__ void clear(int tiles) {
    const int n = min(tiles, kStages) * p.stage;
    for (int k = threadIdx.x; k < n; k += blockDim.x) ring[k] = T(0);
    for (int k = threadIdx.x; k < kKept * int(blockDim.x); k += blockDim.x) kept[k] = T(0);
    __syncthreads();
  }

  // Sums of sums: a tile's to those of the tiles before.
  __device__ __forceinline__ void keep(int index, T sum) {
    kept[index * int(blockDim.x) + int(threadIdx.x)] += sum;
  }

  __device__ __forceinline__ void fetch(int index) {
    const int64_t row = begin + int64_t(index) * p.tile.rows, rows = end - row;
    if (rows > 0) {
      const int stage = index % kStages, own = square() ? p.points : 2 * p.gram_points;
      for (int q = 0; q < own; ++q) {
        const bool second = q >= p.points || (!square() && q >= p.gram_points);
        fetch_tile(a, second ? q - p.gram_points : q, sample, row, rows,
                   int64_t(second ? right : left) * p.span, p.tile, p.copies, tile(stage, q));
      }
      const int warp = threadIdx.x / kWarp;  // z, then d of each point: a warp each
      if (square() && warp <= p.points) {
        fetch_run(warp == 0 ? a.noise : a.diag, warp == 0 ? 0 : warp - 1, sample, row, rows,
                  p.tile.rows, runs(stage) + warp * p.tile.rows);
      }
    }
    __pipeline_commit();
  }

  // kRun rows of kSide columns.
  __device__ __forceinline__ void load(const T* from, int row, int column,
                                       T (&to)[kSide][kRun]) const {
    if constexpr (kDown) {
#pragma unroll
      for (int k = 0; k < kSide; ++k)
        load_run<kRun>(from + (column + k) * p.tile.pitch + row, to[k]);
    } else {
      load_run<kSide>(from + row * p.tile.pitch + column, &to[0][0]);
    }
  }

  __device__ __forceinline__ void add_gram(int stage, int rows) {
    if (group >= groups) return;
    const T* l = tile(stage, point);
    const T* r = square() ? l : tile(stage, p.gram_points + point);
#pragma unroll(kSide == 8 ? 1 : 2)
    for (int i = group * kRun; i < rows; i += groups * kRun) {
      T x[kSide][kRun], y[kSide][kRun];
      load(l, i, gram_left, x);
      load(r, i, gram_right, y);
#pragma unroll
      for (int run = 0; run < kRun; ++run) {
#pragma unroll
        for (int k = 0; k < kSide; ++k) {
#pragma unroll
          for (int m = 0; m < kSide; ++m) gram[k][m] = mul_add(x[k][run], y[m][run], gram[k][m]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_columns(int stage, int rows) {
    constexpr int kEach = kDown ? kWord<T> : 1;
    if (slice >= slices) return;
    const bool reduced = p.points == 3;
    const T* z = runs(stage);
    const int64_t step = tile_elements(p.tile);
    const T* v = tile(stage, 0) + own_column * (kDown ? p.tile.pitch : 1);
    ColumnSums<T> sums = {};
    for (int i = slice * kEach; i < rows; i += slices * kEach) {
      T plus[kEach], minus[kEach] = {}, clean[kEach] = {}, noise[kEach], d[2][kEach] = {};
      const T* from = v + i * (kDown ? 1 : p.tile.pitch);
      load_run<kEach>(from, plus);
      load_run<kEach>(z + i, noise);
      load_run<kEach>(z + p.tile.rows + i, d[0]);
      if (reduced) {
        load_run<kEach>(from + step, minus);
        load_run<kEach>(from + 2 * step, clean);
        load_run<kEach>(z + 2 * p.tile.rows + i, d[1]);
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        sums.add(reduced, noise[j], plus[j], d[0][j], minus[j], d[1][j], clean[j]);
      }
    }
    keep(0, sums.norm);
    keep(1, sums.inner);
    keep(2, sums.up);
    keep(3, sums.down);
    keep(4, sums.base);
  }

  __device__ __forceinline__ void add_diagonals(int stage, int rows) {
    if (left > 0 || right > 0) return;
    const T* z = runs(stage);
    const T *d = z + p.tile.rows, *minus = d + p.tile.rows, *clean = minus + p.tile.rows;
    const bool reduced = p.points == 3;
    const int i = threadIdx.x;
    if (i >= rows) return;
    T norm = T(0), inner = T(0);
    add_diagonal(reduced, z[i], d[i], reduced ? minus[i] : T(0), reduced ? clean[i] : T(0), &norm,
                 &inner);
    keep(kColumnSums, norm);
    keep(kColumnSums + 1, inner);
  }

  __device__ __forceinline__ void run() {
    const int tiles = int(ceil_div(end - begin, p.tile.rows));
    clear(tiles);
    for (int index = 1 - kStages; index < tiles; ++index) {
      if (index >= 0) {
        __pipeline_wait_prior(kStages - 2);
        __syncthreads();  // the tile is there for all, and the one before is done with
      }
      fetch(index + kStages - 1);
      if (index < 0) continue;
      const int stage = index % kStages;
      const int rows = int(min(end - begin - int64_t(index) * p.tile.rows, int64_t(p.tile.rows)));
      add_gram(stage, rows);
      add_columns(stage, rows);
      add_diagonals(stage, rows);
    }
    __syncthreads();
  }

  // Adds what the threads hold, one group after another.
  __device__ __forceinline__ void reduce(T* totals) {
    const int64_t packed = triangle(0, p.columns);
    for (int round = 0; round < groups; ++round) {
      if (round == group) {
        const int k = left * p.span + gram_left;
        T* to = totals + point * packed + k;
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          const int m = right * p.span + gram_right + j;
          if (m >= p.columns) continue;
          T* sums = to + triangle(0, m);
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
            if (k + i <= m) sums[i] = round == 0 ? gram[i][j] : sums[i] + gram[i][j];
          }
        }
      }
      __syncthreads();
    }
    if (!square()) return;
    T* columns = totals + p.gram_points * packed + left * p.span;
    if (slice == 0) {
      for (int index = 0; index < kColumnSums; ++index) {
        const T* from = kept + index * int(blockDim.x) + own_column;
        T sum = from[0];
        for (int other = 1; other < slices; ++other) sum += from[other * p.span];
        columns[index * p.columns + own_column] = sum;
      }
    }
    if (left > 0) return;
    const T* diagonal = kept + kColumnSums * int(blockDim.x) + int(threadIdx.x);
    const double norm = block_sum(diagonal[0]), inner = block_sum(diagonal[blockDim.x]);
    if (threadIdx.x > 0) return;
    columns[kColumnSums * p.columns] = T(norm);
    columns[kColumnSums * p.columns + 1] = T(inner);
  }
};

// The loss of a sample and what backward needs, from its sums.
template <class T>
__device__ void finish(const LossArgs& a, const Plan& p, int64_t sample, const T* sums) {
  const bool reduced = p.points == 3;
  T* saved = static_cast<T*>(a.saved) + sample * p.saved;
  const int64_t packed = triangle(0, p.columns), square = int64_t(p.columns) * p.columns;
  Parts parts = {};
  for (int l = threadIdx.x / kWarp; l < p.columns; l += blockDim.x / kWarp) {
    const double wl = weight_of<T>(a.sign, a.rank, l);
    for (int k = threadIdx.x % kWarp; k <= l; k += kWarp) {
      const double wk = weight_of<T>(a.sign, a.rank, k);
      for (int q = 0; q < p.gram_points; ++q) {
        const T value = sums[q * packed + triangle(k, l)];
        T* gram = saved + q * square;
        gram[int64_t(l) * p.columns + k] = gram[int64_t(k) * p.columns + l] = value;
        finish_gram(reduced, wk, wl, value, k == l, &parts);
      }
    }
  }
  const T* c = sums + p.gram_points * packed;
  T* projections = saved + p.gram_points * square;
  for (int k = threadIdx.x; k < p.columns; k += blockDim.x) {
    const int64_t n = p.columns;
    finish_column(reduced, weight_of<T>(a.sign, a.rank, k), c[k], c[n + k], c[2 * n + k],
                  c[3 * n + k], c[4 * n + k], n, projections + k, &parts);
  }
  const T* diagonal = c + kColumnSums * int64_t(p.columns);
  const double norm = block_sum(parts.norm) + double(diagonal[0]);
  const double inner = block_sum(parts.inner) + double(diagonal[1]);
  if (threadIdx.x > 0) return;
  static_cast<T*>(a.loss)[sample] = T(loss_value(reduced, norm, inner, precision_of(a, sample)));
}

// Blocks of 256 threads a multiprocessor must hold, at least: as many as need no spilling.
template <class T, int kSide>
constexpr int kLeastBlocks = sizeof(T) == 8 ? 1 : (kSide == 4 ? 3 : 2) - kPaired;

template <class T, int kSide, bool kDown>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<T, kSide>)
    gram_kernel(LossArgs a, Plan p) {
  T* memory = shared_memory<T>();
  for (int64_t item = blockIdx.x; item < a.batch * p.chunks * p.pairs; item += gridDim.x) {
    int left = 0, rest = int(item % p.pairs);
    for (; rest >= p.spans - left; ++left) rest -= p.spans - left;
    const int64_t owner = item / p.pairs, sample = owner / p.chunks;
    const int64_t begin = owner % p.chunks * p.chunk;
    const int64_t end = begin + p.chunk < a.size ? begin + p.chunk : a.size;
    Block<T, kSide, kDown> block{
        a, p, sample, begin, end, left, left + rest, memory, memory + ring_size(p)};
    block.share_out();
    block.run();
    T* partial = static_cast<T*>(a.scratch) + owner * p.sums;
    T* totals = p.pairs == 1 ? memory : partial;
    block.reduce(totals);
    __syncthreads();
    if (p.direct) {
      finish(a, p, sample, totals);
    } else if (p.pairs == 1) {
      for (int64_t k = threadIdx.x; k < p.sums; k += blockDim.x) partial[k] = totals[k];
    }
    __syncthreads();
  }
}

// The sums of all chunks of a sample, into those of its first: kWarp sums a block, a warp for every
// kWarps-th chunk.
template <class T>
__global__ void __launch_bounds__(kThreads) add_chunks_kernel(LossArgs a, Plan p) {
  __shared__ double parts[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t across = ceil_div(p.sums, kWarp);
  for (int64_t item = blockIdx.x; item < a.batch * across; item += gridDim.x) {
    const int64_t k = item % across * kWarp + lane;
    T* first = static_cast<T*>(a.scratch) + item / across * p.chunks * p.sums + k;
    double sum = 0.0;
    if (k < p.sums) {
#pragma unroll 4
      for (int64_t chunk = warp; chunk < p.chunks; chunk += kWarps) sum += first[chunk * p.sums];
    }
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && k < p.sums) {
      for (int other = 1; other < kWarps; ++other) sum += parts[other][lane];
      *first = T(sum);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) finish_kernel(LossArgs a, Plan p) {
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    finish(a, p, sample, static_cast<const T*>(a.scratch) + sample * p.chunks * p.sums);
    __syncthreads();
  }
}

template <class T>
void run_loss(const LossArgs& a, Queue queue) {
  const Plan p = plan_of<T>(a);
  const bool narrow = sizeof(T) == 8 || p.columns <= 32;
  auto kernel = p.tile.down ? gram_kernel<T, 4, true> : gram_kernel<T, 4, false>;
  if constexpr (sizeof(T) == 4) {
    if (!narrow) kernel = p.tile.down ? gram_kernel<T, 8, true> : gram_kernel<T, 8, false>;
  }
  const Grid grid(a.batch * p.chunks * p.pairs, p.threads, shared_bytes<T>(p));
  launch("loss", kernel, grid, queue, a, p);
  if (p.direct) return;
  if (p.chunks > 1) {
    launch("loss", add_chunks_kernel<T>, a.batch * ceil_div(p.sums, kWarp), queue, a, p);
  }
  launch("loss", finish_kernel<T>, a.batch, queue, a, p);
}

}  // namespace

int64_t low_rank_scratch(int kind, int64_t batch, int64_t size, int64_t rank) {
  int64_t most = 0;
  for (const bool wide : {false, true}) {  // float32, float64
    const Cut c = cut_up(wide, batch, size, rank);
    if (c.chunks > 1 || c.spans > 1) most = std::max(most, c.chunks);
  }
  return batch * most * sums_size(gram_points_of(points_of(kind)), rank + 1);
}

void low_rank_loss(const LossArgs& a, int dtype, Queue queue) {
  dtype == kFloat64 ? run_loss<double>(a, queue) : run_loss<float>(a, queue);
}

}  // namespace HOS_ISA
}  // namespace hos
