// What the CPU engines of the losses of low rank share: work enough for a thread, and the panels of
// a sample.
#pragma once

#include "base/panels.h"
#include "base/parallel.h"
#include "losses/loss.h"

namespace hos {
inline namespace HOS_ISA {

constexpr int64_t kChunk = 1024;          // rows of a sample summed in one go
constexpr int64_t kPanelBytes = 1 << 20;  // of V at all points, packed
constexpr int64_t kGrainFlops = 1 << 17;  // work below which no second thread wakes

template <class T>
void clear(T* data, int64_t n) {
  for (int64_t k = 0; k < n; ++k) data[k] = T(0);
}

// Items of `rows` rows each that are work enough for a thread.
inline int64_t grain_of(const LossArgs& a, int64_t rows) {
  const int64_t flops = points_of(a.kind) * rows * (a.rank + 4) * (a.rank + 4) + 1;
  return ceil_div(kGrainFlops, flops);
}

// Sizes of a problem of low rank and the signature w = [sign, 1] of its columns.
template <class T>
struct Problem {
  explicit Problem(const LossArgs& args)
      : a(args),
        points(points_of(args.kind)),
        columns(args.rank + 1),
        gram_points(gram_points_of(points)),
        rows(panel_rows(points * columns, args.size)),
        stride((rows / 16 | 1) * 16),  // an odd number of lines: columns fall on different sets
        tile(columns <= 32   ? 128
             : columns <= 80 ? 64
                             : 32),
        weight(columns) {
    for (int64_t k = 0; k < columns; ++k) weight.get()[k] = weight_of<T>(a.sign, a.rank, k);
  }
  static int64_t panel_rows(int64_t columns, int64_t size) {
    const int64_t fit = kPanelBytes / (columns * int64_t(sizeof(T))) / 64 * 64;
    const int64_t most = size < kChunk ? ceil_div(size, 16) * 16 : kChunk;
    return fit < 64 ? 64 : fit < most ? fit : most;
  }
  // V of `n` rows from `row` on, as a panel.
  void pack(int64_t point, int64_t sample, int64_t row, int64_t n, T* panel, int64_t stride) const {
    if (a.rank > 0) {
      pack_columns(place<T>(a.factor, point, sample, row), a.factor.row, a.factor.column, n, a.rank,
                   panel, stride);
    }
    T* last = panel + a.rank * stride;
    if (point < a.score_points) {
      pack_run(place<T>(a.score, point, sample, row), n, last);
    } else {
      clear(last, whole_vectors<T>(n));
    }
  }
  const LossArgs& a;
  int64_t points, columns, gram_points;
  int64_t rows, stride;  // of a panel in forward, at most
  int64_t tile;          // rows of a panel in backward, which stays in the first cache
  Scratch<T> weight;
};

}  // namespace HOS_ISA
}  // namespace hos
