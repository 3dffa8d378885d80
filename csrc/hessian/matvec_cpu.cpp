// The product of diag(d) + U diag(w) U^T with one or several vectors on the CPU, on U packed by
// columns. Sums run in an order that the number of threads does not change.

#include <algorithm>

#include "base/panels.h"
#include "base/parallel.h"
#include "hessian/hessian.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int64_t kGrain = 1 << 15;         // entries below which no second thread wakes
constexpr int64_t kTile = 128;              // rows of U, v and d that lie in the first cache
constexpr int64_t kChunkEntries = 1 << 16;  // of them, in the second: what is summed in one go
constexpr int kStripe = 8;                  // columns, or vectors of rows, of a register tile

// body(first, width) for stripes of [0, n) of nearly equal width, which is a constant.
template <class Body, int... I>
inline void for_stripes(int64_t n, const Body& body, std::integer_sequence<int, I...>) {
  int64_t first = 0;
  for (int64_t stripes = (n + kStripe - 1) / kStripe; stripes > 0; --stripes) {
    const int64_t width = (n - first + stripes - 1) / stripes;
    ((width == I + 1 ? body(first, std::integral_constant<int, I + 1>()) : void()), ...);
    first += width;
  }
}

template <class Body>
inline void for_stripes(int64_t n, const Body& body) {
  for_stripes(n, body, std::make_integer_sequence<int, kStripe>());
}

// sums[k] += <u_k, v> lane by lane, for N columns of a tile.
template <class T, int N>
inline void add_dots(const T* u, const T* v, int64_t n, T* sums) {
  constexpr int W = Simd<T>::width;
  Vector<T> acc[N];
  for (int k = 0; k < N; ++k) acc[k] = load(sums + k * W);
  for (int64_t i = 0; i < n; i += W) {
    const Vector<T> x = load(v + i);
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) acc[k] += load(u + k * kTile + i) * x;
  }
  for (int k = 0; k < N; ++k) store(sums + k * W, acc[k]);
}

// v <- d v + U t for N vectors of rows of a tile.
template <class T, int N>
inline void multiply_rows(const T* u, const T* d, const T* t, int64_t rank, T* v) {
  constexpr int W = Simd<T>::width;
  Vector<T> acc[N];
  for (int j = 0; j < N; ++j) acc[j] = load(d + j * W) * load(v + j * W);
  for (int64_t k = 0; k < rank; ++k, u += kTile) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[j] += t[k] * load(u + j * W);
  }
  for (int j = 0; j < N; ++j) store(v + j * W, acc[j]);
}

// A sample is a sequence of chunks of rows. One chunk alone is packed once and stays; of several,
// each is packed again when U t is taken.
template <class T>
struct Multiplication {
  static constexpr int64_t kSums = 4;  // sums over lanes that are taken together

  explicit Multiplication(const HessianArgs& args)
      : a(args), tile((args.rank + args.columns + 1) * kTile) {
    const int64_t fit = kChunkEntries / tile * kTile;
    rows = std::min(a.size, std::max(fit, kTile));
    chunks = a.size > 0 ? (a.size + rows - 1) / rows : 1;
    sums = (a.columns * a.rank + kSums - 1) / kSums * kSums;
  }

  int64_t panel_size() const { return (chunks > 1 ? 1 : (rows + kTile - 1) / kTile) * tile; }

  // U, then v, then d of rows [row, row + n) as columns.
  void pack(int64_t sample, int64_t row, int64_t n, T* panel) const {
    if (a.rank > 0) {
      pack_columns(place<T>(a.factor, 0, sample, row), a.factor.row, a.factor.column, n, a.rank,
                   panel, kTile);
    }
    panel += a.rank * kTile;
    pack_columns(place<T>(a.v, 0, sample, row), a.v.row, a.v.column, n, a.columns, panel, kTile);
    pack_run(place<T>(a.diag, 0, sample, row), n, panel + a.columns * kTile);
  }

  template <class Body>
  void for_tiles(int64_t chunk, T* panel, const Body& body) const {
    const int64_t end = std::min(a.size, (chunk + 1) * rows);
    for (int64_t row = chunk * rows; row < end; row += kTile) {
      body(row, std::min(end - row, kTile), panel);
      if (chunks == 1) panel += tile;
    }
  }

  // part[c * rank + k] = <u_k, v_c> over the rows of a chunk.
  void project(int64_t sample, int64_t chunk, T* panel, T* lanes, T* part) const {
    constexpr int W = Simd<T>::width;
    memset(lanes, 0, size_t(sums * W) * sizeof(T));
    for_tiles(chunk, panel, [&](int64_t row, int64_t n, T* u) {
      pack(sample, row, n, u);
      for (int64_t c = 0; c < a.columns; ++c) {
        for_stripes(a.rank, [&](int64_t k, auto width) {
          add_dots<T, width()>(u + k * kTile, u + (a.rank + c) * kTile, n,
                               lanes + (c * a.rank + k) * W);
        });
      }
    });
    for (int64_t k = 0; k < sums; k += kSums) {
      Vector<T> v[kSums];
      for (int j = 0; j < kSums; ++j) v[j] = load(lanes + (k + j) * W);
      store_sums<T, kSums>(v, part + k);
    }
  }

  // The sum of the parts, weighted, in the first one.
  void add_parts(T* parts) const {
    for (int64_t k = 0; k < a.columns * a.rank; ++k) {
      for (int64_t chunk = 1; chunk < chunks; ++chunk) parts[k] += parts[chunk * sums + k];
      parts[k] *= weight_of<T>(a.sign, a.rank, k % a.rank);
    }
  }

  // out = d v + U t for the rows of a chunk.
  void apply(int64_t sample, int64_t chunk, T* panel, const T* t) const {
    constexpr int W = Simd<T>::width;
    for_tiles(chunk, panel, [&](int64_t row, int64_t n, T* u) {
      if (chunks > 1) pack(sample, row, n, u);
      T* v = u + a.rank * kTile;
      const T* d = v + a.columns * kTile;
      for (int64_t c = 0; c < a.columns; ++c) {
        for_stripes(vectors<T>(n), [&](int64_t j, auto width) {
          multiply_rows<T, width()>(u + j * W, d + j * W, t + c * a.rank, a.rank,
                                    v + c * kTile + j * W);
        });
      }
      T* out = static_cast<T*>(a.out) + (sample * a.size + row) * a.columns;
      unpack_columns(v, kTile, n, a.columns, out, a.columns, int64_t(1));
    });
  }

  const HessianArgs& a;
  int64_t tile;  // entries of a packed tile
  int64_t rows, chunks, sums;
};

template <class T>
void run_matvec(const HessianArgs& a, int threads) {
  const Multiplication<T> m(a);
  const auto with_scratch = [&](const auto& body) {
    Scratch<T> panel(m.panel_size()), lanes(m.sums * Simd<T>::width);
    body(panel.get(), lanes.get());
  };
  if (m.chunks <= 1 || a.batch >= threads) {
    const int64_t work = (a.size + kTile / 2) * (a.rank + 1) * a.columns;  // small ones cost too
    const int64_t grain = kGrain / (work + 1) + 1;
    parallel_for(a.batch, 1, grain, threads, [&](int64_t begin, int64_t end) {
      Scratch<T> parts(m.chunks * m.sums);
      with_scratch([&](T* panel, T* lanes) {
        for (int64_t sample = begin; sample < end; ++sample) {
          for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
            m.project(sample, chunk, panel, lanes, parts.get() + chunk * m.sums);
          }
          m.add_parts(parts.get());
          for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
            m.apply(sample, chunk, panel, parts.get());
          }
        }
      });
    });
    return;
  }
  Scratch<T> parts(m.chunks * m.sums);
  for (int64_t sample = 0; sample < a.batch; ++sample) {  // few large samples: chunks in parallel
    parallel_for(m.chunks, 1, 1, threads, [&](int64_t begin, int64_t end) {
      with_scratch([&](T* panel, T* lanes) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          m.project(sample, chunk, panel, lanes, parts.get() + chunk * m.sums);
        }
      });
    });
    m.add_parts(parts.get());
    parallel_for(m.chunks, 1, 1, threads, [&](int64_t begin, int64_t end) {
      with_scratch([&](T* panel, T*) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          m.apply(sample, chunk, panel, parts.get());
        }
      });
    });
  }
}

}  // namespace

void matvec(const HessianArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat32) run_matvec<float>(a, queue.threads());
  if (dtype == kFloat64) run_matvec<double>(a, queue.threads());
}

int64_t matvec_scratch(int64_t, int64_t, int64_t, int64_t) { return 0; }

}  // namespace HOS_ISA
}  // namespace hos
