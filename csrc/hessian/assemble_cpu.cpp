// diag(d) + U diag(w) U^T as a dense matrix on the CPU: each line is written once, straight from
// registers.

#include <algorithm>

#include "base/panels.h"
#include "base/parallel.h"
#include "hessian/hessian.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int64_t kGrain = 1 << 15;  // entries below which no second thread wakes
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
void assemble_strip(const HessianArgs& a, const T* left, const T* panel, const T* d, int64_t row,
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
void run_assemble(const HessianArgs& a, int threads) {
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
        pack_columns(place<T>(a.factor, 0, sample, i), a.factor.row, a.factor.column,
                     std::min(a.size - i, L), a.rank, to, L);
      }
      held = sample;
      for (int64_t s = 0; s < n; ++s) {
        const int64_t row = (first + s) * kRows;
        T* to = left.get() + s * kRows * a.rank;
        for (int64_t k = 0; k < a.rank; ++k) {
          const T w = weight_of<T>(a.sign, a.rank, k);
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
                                    place<T>(a.diag, 0, sample, 0), row, j,
                                    std::min(j + columns, a.size), out + row * a.out_row);
        }
      }
    }
    if (Stream) fence();
  });
}

template <class T>
void run_assemble(const HessianArgs& a, int threads) {
  const int64_t bytes = a.batch * a.size * a.size * int64_t(sizeof(T));
  const auto lines = [](int64_t n) { return n % kLine<T> == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(a.out) % 64 == 0 && lines(a.out_row);
  if (a.out_row == a.size && a.out_batch == a.size * a.size) advise_huge_pages(a.out, bytes);
  if (bytes > kStreamBytes && aligned && lines(a.out_batch) && is_touched(a.out)) {
    run_assemble<T, true>(a, threads);
  } else {
    run_assemble<T, false>(a, threads);
  }
}

}  // namespace

void assemble(const HessianArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat32) run_assemble<float>(a, queue.threads());
  if (dtype == kFloat64) run_assemble<double>(a, queue.threads());
}

}  // namespace HOS_ISA
}  // namespace hos
