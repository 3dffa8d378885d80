// Panels of columns on the CPU: the columns of a matrix one after another, rows in the lanes,
// padded with zeros to whole vectors. No column is padded, a matrix with its rows fastest is copied
// as it lies, and one with its columns fastest is transposed in registers.
#pragma once

#include "base/simd.h"

namespace hos {
inline namespace HOS_ISA {

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

}  // namespace HOS_ISA
}  // namespace hos
