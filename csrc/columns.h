// Panels of columns on the CPU: the columns of V = [U, s] one after another, rows in the lanes,
// padded with zeros to whole vectors. No column is padded, a factor with D fastest is copied as it
// lies, and one with r fastest is transposed in registers. On them the two register-tiled products,
// Gram and panel times small matrix.
#pragma once

#include <utility>

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hos {
inline namespace HOS_ISA {

// GCC/Clang vector types: the width follows the instruction set that the file is compiled for.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd {
  static constexpr int width = kVectorBytes / int(sizeof(T));
  typedef T vector __attribute__((vector_size(kVectorBytes)));
  typedef T loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};

template <class T>
using Vector = typename Simd<T>::vector;

template <class T>
inline Vector<T> load(const T* p) {
  return Vector<T>(*reinterpret_cast<const typename Simd<T>::loose*>(p));
}

template <class T>
inline void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Simd<T>::loose*>(p) = typename Simd<T>::loose(v);
}

template <class T>
inline int64_t vectors(int64_t columns) {
  return (columns + Simd<T>::width - 1) / Simd<T>::width;
}

// Register tiles: columns by columns of the Gram matrix, vectors of rows by columns of the product.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGramRows = 4, kProductColumns = 8;
#else
constexpr int kGramRows = 2, kProductColumns = 6;
#endif
constexpr int kProductRows = 2;
constexpr int64_t kGramBytes = 25 << 10;

template <class T>
constexpr int64_t kLine = 64 / int64_t(sizeof(T));  // of a cache

template <class T>
inline int64_t whole_vectors(int64_t n) {
  return vectors<T>(n) * Simd<T>::width;
}

// ------------------------------------------------------------------------------------- shuffles

// Lane i of the result is lane Index::at(i) of a, or of b from the width on.
template <class Index, class V, int... I>
inline auto shuffle(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, Index::at(I)...);
}

// Lanes of a and b in turn, from the lower or upper half of each group of `Group` lanes.
template <int Width, int Group, int Upper>
struct Interleave {
  static constexpr int at(int i) {
    const int from = i / Group * Group + Upper * (Group / 2) + i % Group / 2;
    return i % 2 == 0 ? from : Width + from;
  }
};

// Of each `Segment` of lanes: the first half of a and the second of b, or the other two swapped.
template <int Width, int Segment, bool Swapped>
struct Halves {
  static constexpr int at(int i) {
    const bool first = i % Segment < Segment / 2;
    if (Swapped) return first ? i + Segment / 2 : Width + i - Segment / 2;
    return first ? i : Width + i;
  }
};

template <int Offset>
struct Consecutive {
  static constexpr int at(int i) { return Offset + i; }
};

template <class T, class Index>
inline Vector<T> shuffle(Vector<T> a, Vector<T> b) {
  return shuffle<Index>(a, b, std::make_integer_sequence<int, Simd<T>::width>());
}

// 16 bytes: the lanes within which a transposition is cheap.
template <class T>
struct Group {
  static constexpr int size = 16 / int(sizeof(T));
  static constexpr int count = Simd<T>::width / size;
  typedef T loose __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
};

// The groups at p, p + step, ... side by side in a register.
template <class T>
inline Vector<T> load_groups(const T* p, [[maybe_unused]] int64_t step) {
#if defined(__AVX2__)  // GCC 12 would load each group into a register of its own, and shuffle
  const auto at = [=](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + i * step)); };
#if defined(__AVX512F__)
  __m512 v = _mm512_castps128_ps512(at(0));
  v = _mm512_insertf32x4(v, at(1), 1);
  v = _mm512_insertf32x4(v, at(2), 2);
  return Vector<T>(_mm512_insertf32x4(v, at(3), 3));
#else
  return Vector<T>(_mm256_insertf128_ps(_mm256_castps128_ps256(at(0)), at(1), 1));
#endif
#else
  return load(p);
#endif
}

template <class T, int... I>
inline void store_groups(T* p, int64_t step, Vector<T> v, std::integer_sequence<int, I...>) {
  ((*reinterpret_cast<typename Group<T>::loose*>(p + I * step) =
        shuffle<Consecutive<I * Group<T>::size>>(
            v, v, std::make_integer_sequence<int, Group<T>::size>())),
   ...);
}

// Transposes each square of groups: lane j of register i for lane i of register j.
template <class T>
inline void transpose(Vector<T>* q) {
  constexpr int W = Simd<T>::width, G = Group<T>::size;
  using Low = Interleave<W, G, 0>;
  using High = Interleave<W, G, 1>;
  if constexpr (G == 2) {
    const Vector<T> a = q[0], b = q[1];
    q[0] = shuffle<T, Low>(a, b);
    q[1] = shuffle<T, High>(a, b);
  } else {
    const Vector<T> a = shuffle<T, Low>(q[0], q[2]), b = shuffle<T, High>(q[0], q[2]);
    const Vector<T> c = shuffle<T, Low>(q[1], q[3]), d = shuffle<T, High>(q[1], q[3]);
    q[0] = shuffle<T, Low>(a, c);
    q[1] = shuffle<T, High>(a, c);
    q[2] = shuffle<T, Low>(b, d);
    q[3] = shuffle<T, High>(b, d);
  }
}

// The sums over lanes of v[0 .. N), N a power of two up to the width, into every (width / N)-th
// lane: a register's halves are added while those of another fill the space.
template <class T, int N, int Segment = Simd<T>::width>
inline Vector<T> sums_of_lanes(Vector<T>* v) {
  constexpr int W = Simd<T>::width;
  if constexpr (N > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      v[i] = shuffle<T, Halves<W, Segment, false>>(v[i], v[i + N / 2]) +
             shuffle<T, Halves<W, Segment, true>>(v[i], v[i + N / 2]);
    }
    return sums_of_lanes<T, N / 2, Segment / 2>(v);
  } else if constexpr (Segment > 1) {
    v[0] += shuffle<T, Halves<W, Segment, true>>(v[0], v[0]);
    return sums_of_lanes<T, 1, Segment / 2>(v);
  } else {
    return v[0];
  }
}

// Stores the sums over lanes of v[0 .. N), any N, which it overwrites.
template <class T, int N>
inline void store_sums(Vector<T>* v, T* sums) {
  constexpr int W = Simd<T>::width;
  constexpr int P = N >= W ? W : (N > 8 ? 16 : N > 4 ? 8 : N > 2 ? 4 : N);  // N = 3 pads to 4
  T lane[W];
  Vector<T> part[P];
#pragma GCC unroll 16
  for (int j = 0; j < P; ++j) part[j] = j < N ? v[j] : Vector<T>{};
  store(lane, sums_of_lanes<T, P>(part));
  for (int j = 0; j < P && j < N; ++j) sums[j] = lane[j * (W / P)];
  if constexpr (N > P) store_sums<T, N - P>(v + P, sums + P);
}

// --------------------------------------------------------------------------------------- panels

// A contiguous run of n entries, followed by zeros up to a whole vector.
template <class T>
inline void pack_run(const T* from, int64_t n, T* to) {
  memcpy(to, from, size_t(n) * sizeof(T));
  for (int64_t i = n; i < whole_vectors<T>(n); ++i) to[i] = T(0);
}

// Rows [0, n) and columns [0, rank) of a matrix, rows or columns contiguous, into a panel of column
// stride `stride`.
template <class T>
inline void pack_columns(const T* source, int64_t row, int64_t column, int64_t n, int64_t rank,
                         T* panel, int64_t stride) {
  constexpr int W = Simd<T>::width, G = Group<T>::size;
  if (row == 1) {
    for (int64_t k = 0; k < rank; ++k) pack_run(source + k * column, n, panel + k * stride);
    return;
  }
  const bool grouped = n >= W && rank >= G && column == 1;
  if (grouped && n % W != 0) {
    for (int64_t k = 0; k < rank; ++k) store(panel + k * stride + n / W * W, Vector<T>{});
  }
  for (int64_t begin = 0; begin < n && grouped; begin += W) {
    const int64_t i = begin + W <= n ? begin : n - W;  // the last rows overlap those before,
    for (int64_t e = 0; e < W * row; e += kLine<T>) {  // two blocks ahead, in memory order
      __builtin_prefetch(source + (i + 2 * W) * row + e);
    }
    for (int64_t first = 0; first < rank; first += G) {
      const int64_t k = first + G <= rank ? first : rank - G;  // and so do the last columns
      Vector<T> q[G];
      for (int j = 0; j < G; ++j) q[j] = load_groups(source + (i + j) * row + k, G * row);
      transpose<T>(q);
      for (int j = 0; j < G; ++j) store(panel + (k + j) * stride + i, q[j]);
    }
  }
  for (int64_t k = 0; k < rank && !grouped; ++k) {
    for (int64_t i = 0; i < n; ++i) panel[k * stride + i] = source[i * row + k * column];
    for (int64_t i = n; i < whole_vectors<T>(n); ++i) panel[k * stride + i] = T(0);
  }
}

// The inverse.
template <class T>
inline void unpack_columns(const T* panel, int64_t stride, int64_t n, int64_t rank, T* out,
                           int64_t row, int64_t column) {
  constexpr int W = Simd<T>::width, G = Group<T>::size;
  if (row == 1) {
    for (int64_t k = 0; k < rank; ++k) {
      memcpy(out + k * column, panel + k * stride, size_t(n) * sizeof(T));
    }
    return;
  }
  const int64_t whole = n < W || column != 1 ? 0 : rank / G * G;
  for (int64_t begin = 0; begin < n && whole > 0; begin += W) {
    const int64_t i = begin + W <= n ? begin : n - W;
    for (int64_t k = 0; k < whole; k += G) {
      Vector<T> q[G];
      for (int j = 0; j < G; ++j) q[j] = load(panel + (k + j) * stride + i);
      transpose<T>(q);
      for (int j = 0; j < G; ++j) {
        store_groups<T>(out + (i + j) * row + k, G * row, q[j],
                        std::make_integer_sequence<int, Group<T>::count>());
      }
    }
  }
  for (int64_t k = whole; k < rank; ++k) {
    for (int64_t i = 0; i < n; ++i) out[i * row + k * column] = panel[k * stride + i];
  }
}

// The cache lines of rows [0, n) of a matrix that is to be written, fetched in `parts` parts while
// something else runs.
template <class T>
class Fetch {
 public:
  Fetch(const T* data, int64_t row, int64_t column, int64_t n, int64_t rank, int64_t parts)
      : data_(data), step_(row == 1 ? column : row), runs_(row == 1 ? rank : n) {
    length_ = row == 1 ? n : rank;
    if (step_ == length_) {  // dense: a single run
      length_ *= runs_;
      runs_ = 1;
    }
    const int64_t lines = runs_ * (length_ / kLine<T> + 1);
    part_ = parts > 0 ? (lines + parts - 1) / parts : 0;
  }
  void next_part() {
    for (int64_t count = part_; count > 0 && runs_ > 0; --count) {
      __builtin_prefetch(data_ + at_, 1, 2);
      at_ += kLine<T>;
      if (at_ < length_ + kLine<T>) continue;  // one line more: a run need not begin with one
      at_ = 0;
      data_ += step_;
      --runs_;
    }
  }

 private:
  const T* data_;
  int64_t step_, runs_, length_, part_, at_ = 0;
};

// ------------------------------------------------------------------------------------- products

// gram[m][v] += <left column m, right column v>; Same: the columns are the same ones, v >= m alone.
template <class T, int M, int N, bool Same>
inline void gram_tile(const T* left, const T* right, int64_t stride, int64_t n, T* gram,
                      int64_t gram_stride) {
  using V = Vector<T>;
  constexpr int kCount = Same ? M * (M + 1) / 2 : M * N;
  V acc[kCount] = {};
  for (int64_t i = 0; i < n; i += Simd<T>::width) {
    V b[N];
    for (int v = 0; v < N; ++v) b[v] = load(right + v * stride + i);
    int t = 0;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V a = Same ? b[m] : load(left + m * stride + i);
#pragma GCC unroll 4
      for (int v = Same ? m : 0; v < N; ++v, ++t) acc[t] += a * b[v];
    }
  }
  T sums[kCount];
  store_sums<T, kCount>(acc, sums);
  const T* from = sums;
  for (int m = 0; m < M; ++m) {
#pragma GCC ivdep
    for (int v = Same ? m : 0; v < N; ++v) gram[m * gram_stride + v] += *from++;
  }
}

// `N` columns from `column` on, times those of [first, last) up to the diagonal.
template <class T, int N>
inline void gram_stripe(const T* panel, int64_t stride, int64_t n, int64_t first, int64_t last,
                        int64_t column, T* gram, int64_t gram_stride) {
  const T* right = panel + column * stride;
  for (int64_t k = first; k < (last < column ? last : column); k += kGramRows) {
    gram_tile<T, kGramRows, N, false>(panel + k * stride, right, stride, n,
                                      gram + k * gram_stride + column, gram_stride);
  }
  if (column >= last) return;
  gram_tile<T, N, N, true>(right, right, stride, n, gram + column * gram_stride + column,
                           gram_stride);
}

// gram += panel^T panel on and above the diagonal, by blocks of rows whose columns of the panel
// stay in the first cache.
template <class T>
inline void add_gram(const T* panel, int64_t stride, int64_t n, int64_t columns, T* gram,
                     int64_t gram_stride) {
  static_assert(4 % kGramRows == 0, "blocks end on whole tiles");
  const int64_t fit = kGramBytes / (n * int64_t(sizeof(T)) + 1) / 4 * 4, block = fit < 4 ? 4 : fit;
  for (int64_t first = 0; first < columns; first += block) {
    for (int64_t k = first; k < columns; k += 4) {
      const auto stripe = [&](auto width) {
        gram_stripe<T, width()>(panel, stride, n, first, first + block, k, gram, gram_stride);
      };
      const int64_t width = columns - k;
      if (width >= 4) stripe(std::integral_constant<int, 4>());
      if (width == 3) stripe(std::integral_constant<int, 3>());
      if (width == 2) stripe(std::integral_constant<int, 2>());
      if (width == 1) stripe(std::integral_constant<int, 1>());
    }
  }
}

// What product_of_columns takes: out = panel matrix + z by_noise^T + diag(d) panel diag(by_diag).
template <class T>
struct Product {
  const T* panel;
  int64_t stride, inner, columns;  // `inner` columns enter the product with the matrix
  const T *matrix, *z, *d, *by_noise, *by_diag;
  int64_t matrix_stride;
  T* out;
};

template <class T, int Rows, int N>
inline void product_tile(const Product<T>& p, int64_t i, int64_t k) {
  using V = Vector<T>;
  constexpr int W = Simd<T>::width;
  V acc[Rows][N];
  for (int m = 0; m < Rows; ++m) {
    const V z = load(p.z + i + m * W), d = load(p.d + i + m * W);
    for (int v = 0; v < N; ++v) {
      acc[m][v] = z * p.by_noise[k + v] +
                  (d * p.by_diag[k + v]) * load(p.panel + (k + v) * p.stride + i + m * W);
    }
  }
  for (int64_t l = 0; l < p.inner; ++l) {
    const T* b = p.matrix + l * p.matrix_stride + k;
    V a[Rows];
    for (int m = 0; m < Rows; ++m) a[m] = load(p.panel + l * p.stride + i + m * W);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      for (int m = 0; m < Rows; ++m) acc[m][v] += a[m] * b[v];
    }
  }
  for (int v = 0; v < N; ++v) {
    for (int m = 0; m < Rows; ++m) store(p.out + (k + v) * p.stride + i + m * W, acc[m][v]);
  }
}

template <class T, int N, class Between>
inline void product_stripe(const Product<T>& p, int64_t n, int64_t k, const Between& between) {
  constexpr int W = Simd<T>::width;
  int64_t i = 0;
  for (; i + W < n; i += kProductRows * W) {
    product_tile<T, kProductRows, N>(p, i, k);
    between();
  }
  if (i < n) product_tile<T, 1, N>(p, i, k);
}

template <class T, class Between, int... I>
inline void product_stripe(const Product<T>& p, int64_t n, int64_t k, int64_t width,
                           const Between& between, std::integer_sequence<int, I...>) {
  ((width == I + 1 ? product_stripe<T, I + 1>(p, n, k, between) : void()), ...);
}

inline int64_t product_stripes(int64_t columns) {
  return (columns + kProductColumns - 1) / kProductColumns;
}

// How often product_of_columns calls `between`.
template <class T>
inline int64_t product_tiles(int64_t n, int64_t columns) {
  return product_stripes(columns) * (n / Simd<T>::width / kProductRows);
}

// The product for rows [0, n), in stripes of nearly equal width; `between` runs after each tile of
// kProductRows vectors.
template <class T, class Between>
inline void product_of_columns(const Product<T>& p, int64_t n, const Between& between) {
  int64_t stripes = product_stripes(p.columns);
  for (int64_t k = 0; k < p.columns; --stripes) {
    const int64_t width = (p.columns - k + stripes - 1) / stripes;
    product_stripe(p, n, k, width, between, std::make_integer_sequence<int, kProductColumns>());
    k += width;
  }
}

}  // namespace HOS_ISA
}  // namespace hos
