// diag(d) + U diag(w) U^T on the CPU: the dense matrix, each line written once, straight from
// registers; and the product with one or several vectors, on U packed by columns as in the losses.
// Sums run in an order that the number of threads does not change.

#include <algorithm>

#include "columns.h"
#include "kernels.h"
#include "low_rank.h"
#include "parallel.h"

HOS_DECLARE_KERNELS(HOS_ISA)

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int64_t kGrain = 1 << 15;  // entries below which no second thread wakes

template <class T>
inline T weight_of(const LowRankArgs& a, int64_t k) {
  return a.sign != nullptr ? static_cast<const T*>(a.sign)[k] : T(1);
}

template <class T>
inline const T* at(const View& view, int64_t sample, int64_t row) {
  return static_cast<const T*>(view.data) + sample * view.batch + row * view.row;
}

// --------------------------------------------------------------------------------------- assembly

// A register tile of the matrix: rows by cache lines.
#if defined(__AVX512F__)
constexpr int kRows = 8, kLines = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6, kLines = 1;
#else
constexpr int kRows = 2, kLines = 1;
#endif
constexpr int64_t kStrips = 8;              // of kRows rows, for which columns of U stay in cache
constexpr int64_t kColumnBytes = 16 << 10;  // of U, in the first cache
// From here on no cache holds the output, and writing past them takes half of the time. Fresh
// memory, which the system has just cleared in the cache, would take longer that way.
constexpr int64_t kStreamBytes = 32 << 20;

// Stores a whole vector; Stream: past the caches, aligned.
template <class T, bool Stream>
inline void put(T* p, Vector<T> v) {
#if defined(__AVX512F__)
  if constexpr (Stream) return _mm512_stream_ps(reinterpret_cast<float*>(p), __m512(v));
#elif defined(__AVX2__)
  if constexpr (Stream) return _mm256_stream_ps(reinterpret_cast<float*>(p), __m256(v));
#endif
  store(p, v);
}

// Stores the first n lanes, at least one and not all.
template <class T>
inline void put_first(T* p, Vector<T> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v));
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), __m512d(v));
  }
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// out = left right^T for kRows rows and `Lines` lines of columns: `left` is a strip of weighted
// rows of U, `right` blocks of kLine rows, both column after column.
template <class T, int Lines, bool Stream>
inline void assemble_tile(const T* left, const T* right, int64_t rank, T* out, int64_t out_row) {
  constexpr int W = Simd<T>::width, L = kLine<T>, N = L / W;
  Vector<T> acc[kRows][Lines * N] = {};
  for (int64_t k = 0; k < rank; ++k, left += kRows, right += L) {
    Vector<T> b[Lines * N];
#pragma GCC unroll 8
    for (int c = 0; c < Lines * N; ++c) b[c] = load(right + c / N * L * rank + c % N * W);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const T u = left[m];
#pragma GCC unroll 8
      for (int c = 0; c < Lines * N; ++c) acc[m][c] += u * b[c];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < Lines * N; ++c) put<T, Stream>(out + m * out_row + c * W, acc[m][c]);
  }
}

// Columns [first, last) of rows [row, row + kRows) of a sample, as far as there are such.
template <class T, bool Stream>
void assemble_strip(const LowRankArgs& a, const T* left, const T* panel, const T* d, int64_t row,
                    int64_t first, int64_t last, T* out) {
  constexpr int W = Simd<T>::width, L = kLine<T>;
  const int64_t rows = std::min<int64_t>(a.size - row, kRows);
  for (int64_t j = first, width; j < last; j += width) {
    const T* right = panel + j * a.rank;
    const auto plain = [&](int64_t n) {
      return rows == kRows && j + n <= last && (!Stream || j + n <= row || row + rows <= j);
    };
    width = L;
    if (plain(kLines * L)) {
      assemble_tile<T, kLines, Stream>(left, right, a.rank, out + j, a.out_row);
      width = kLines * L;
    } else if (plain(L)) {
      assemble_tile<T, 1, Stream>(left, right, a.rank, out + j, a.out_row);
    } else {  // the ends of rows and columns, and a diagonal that cannot be added to in memory
      alignas(64) T edge[kRows * L];
      assemble_tile<T, 1, false>(left, right, a.rank, edge, L);
      for (int64_t m = 0; m < rows; ++m) {
        T *from = edge + m * L, *to = out + m * a.out_row + j;
        const int64_t diagonal = row + m - j;
        if (Stream && 0 <= diagonal && diagonal < L) {
          from[diagonal] = hessian_entry(from[diagonal], d[row + m], true);
        }
        for (int64_t c = 0; c < L && j + c < last; c += W) {
          if (j + c + W <= last) {
            put<T, Stream>(to + c, load(from + c));
          } else {
            put_first(to + c, load(from + c), last - j - c);
          }
        }
      }
    }
  }
  for (int64_t m = 0; m < rows && !Stream; ++m) {
    if (row + m < first || row + m >= last) continue;
    T& entry = out[m * a.out_row + row + m];
    entry = hessian_entry(entry, d[row + m], true);
  }
}

template <class T, bool Stream>
void assemble(const LowRankArgs& a, int threads) {
  constexpr int64_t L = kLine<T>, step = kLines * L;
  const int64_t strips = (a.size + kRows - 1) / kRows;
  const int64_t fit = kColumnBytes / ((a.rank + 1) * int64_t(sizeof(T))) / step * step;
  const int64_t columns = std::max(fit, step);
  const int64_t grain = kGrain / (kRows * a.size + 1) + 1;
  parallel_for(a.batch * strips, 1, grain, threads, [&](int64_t begin, int64_t end) {
    Scratch<T> panel((a.size + L - 1) / L * L * a.rank), left(kStrips * kRows * a.rank);
    int64_t held = -1;  // the sample whose U lies in `panel`
    for (int64_t item = begin, n; item < end; item += n) {
      const int64_t sample = item / strips, first = item % strips;
      n = std::min({kStrips, strips - first, end - item});
      for (int64_t i = 0; i < a.size && held != sample && a.rank > 0; i += L) {
        T* to = panel.get() + i * a.rank;
        if (i + L > a.size) memset(to, 0, size_t(L * a.rank) * sizeof(T));
        pack_columns(at<T>(a.factor, sample, i), a.factor.row, a.factor.column,
                     std::min(a.size - i, L), a.rank, to, L);
      }
      held = sample;
      for (int64_t s = 0; s < n; ++s) {
        const int64_t row = (first + s) * kRows;
        T* to = left.get() + s * kRows * a.rank;
        for (int64_t k = 0; k < a.rank; ++k) {
          const T w = weight_of<T>(a, k);
          if constexpr (L % kRows == 0) {
            const T* from = panel.get() + (row / L * a.rank + k) * L + row % L;
            for (int m = 0; m < kRows; ++m) to[k * kRows + m] = w * from[m];
          } else {
            for (int m = 0; m < kRows; ++m) {
              const int64_t i = std::min(row + m, a.size - 1);
              to[k * kRows + m] = w * panel.get()[(i / L * a.rank + k) * L + i % L];
            }
          }
        }
      }
      T* out = static_cast<T*>(a.out) + sample * a.out_batch;
      for (int64_t j = 0; j < a.size; j += columns) {
        for (int64_t s = 0; s < n; ++s) {
          const int64_t row = (first + s) * kRows;
          assemble_strip<T, Stream>(a, left.get() + s * kRows * a.rank, panel.get(),
                                    at<T>(a.diag, sample, 0), row, j, std::min(j + columns, a.size),
                                    out + row * a.out_row);
        }
      }
    }
    if (Stream) fence();
  });
}

template <class T>
void assemble(const LowRankArgs& a, int threads) {
  const int64_t bytes = a.batch * a.size * a.size * int64_t(sizeof(T));
  const auto lines = [](int64_t n) { return n % kLine<T> == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(a.out) % 64 == 0 && lines(a.out_row);
  if (a.out_row == a.size && a.out_batch == a.size * a.size) advise_huge_pages(a.out, bytes);
  if (bytes > kStreamBytes && aligned && lines(a.out_batch) && is_touched(a.out)) {
    assemble<T, true>(a, threads);
  } else {
    assemble<T, false>(a, threads);
  }
}

// ---------------------------------------------------------------------------------------- product

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

  explicit Multiplication(const LowRankArgs& args)
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
      pack_columns(at<T>(a.factor, sample, row), a.factor.row, a.factor.column, n, a.rank, panel,
                   kTile);
    }
    panel += a.rank * kTile;
    pack_columns(at<T>(a.v, sample, row), a.v.row, a.v.column, n, a.columns, panel, kTile);
    pack_run(at<T>(a.diag, sample, row), n, panel + a.columns * kTile);
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
      parts[k] *= weight_of<T>(a, k % a.rank);
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

  const LowRankArgs& a;
  int64_t tile;  // entries of a packed tile
  int64_t rows, chunks, sums;
};

template <class T>
void matvec(const LowRankArgs& a, int threads) {
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

void assemble_cpu(const LowRankArgs& a, int dtype, int threads) {
  if (dtype == kFloat32) assemble<float>(a, threads);
  if (dtype == kFloat64) assemble<double>(a, threads);
}

void matvec_cpu(const LowRankArgs& a, int dtype, int threads) {
  if (dtype == kFloat32) matvec<float>(a, threads);
  if (dtype == kFloat64) matvec<double>(a, threads);
}

}  // namespace HOS_ISA
}  // namespace hos
