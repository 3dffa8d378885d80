// Tiles of a factor U in shared memory: asynchronous copies of 16, 8 or 4 bytes from either memory
// order of U, several tiles ahead of the arithmetic; and back for gradients. A tile keeps the order
// of U (row after row, or column after column), so that copies are wide on both sides, with lines
// an odd number of 16-byte words apart: 8 lanes that read 8 lines meet all banks.
#pragma once

#include <cuda_pipeline.h>

#include "base/launch.cuh"
#include "base/view.h"

namespace hos {
inline namespace HOS_ISA {

constexpr int kStages = 3;  // tiles in shared memory: one at work, two on their way

template <class T>
constexpr int kWord = 16 / int(sizeof(T));  // elements of a 16-byte word

template <class T>
HOS_HD int padded_line(int elements) {
  return (int(ceil_div(elements, kWord<T>)) | 1) * kWord<T>;
}

HOS_HD int round_up(int64_t n, int64_t to) { return int(ceil_div(n, to) * to); }

// kCount elements, aligned to 16 bytes or to all of them.
template <int kCount, class T>
__device__ void load_run(const T* from, T* to) {
  constexpr int kBytes = kCount * int(sizeof(T)) < 16 ? kCount * int(sizeof(T)) : 16;
  constexpr int kEach = kBytes / int(sizeof(T));
  struct alignas(kBytes) Word {
    T v[kEach];
  };
#pragma unroll
  for (int k = 0; k < kCount; k += kEach) {
    const Word word = *reinterpret_cast<const Word*>(from + k);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[k + j] = word.v[j];
  }
}

template <int kCount, class T>
__device__ void store_run(const T* from, T* to) {
  constexpr int kBytes = kCount * int(sizeof(T)) < 16 ? kCount * int(sizeof(T)) : 16;
  constexpr int kEach = kBytes / int(sizeof(T));
  struct alignas(kBytes) Word {
    T v[kEach];
  };
#pragma unroll
  for (int k = 0; k < kCount; k += kEach) {
    Word word;
#pragma unroll
    for (int j = 0; j < kEach; ++j) word.v[j] = from[k + j];
    *reinterpret_cast<Word*>(to + k) = word;
  }
}

// visit(line, piece) for `lines` lines of `across` <= 1024 pieces, shared out over the block.
template <class Visit>
__device__ __forceinline__ void for_pieces(int lines, int across, const Visit& visit) {
  if (across <= 0) return;
  const float inverse = 1.0f / float(across);  // exact below 1024, and cheaper than a division
  const int down = int((float(blockDim.x) + 0.5f) * inverse);
  const int right = int(blockDim.x) - down * across;
  int line = int((float(threadIdx.x) + 0.5f) * inverse), piece = int(threadIdx.x) - line * across;
  while (line < lines) {
    visit(line, piece);
    line += down;
    piece += right;
    if (piece >= across) {
      piece -= across;
      ++line;
    }
  }
}

// Lines of `run` elements that follow one another: in device memory `stride` apart, in shared
// memory `pitch` apart, of which the first `lines_there` with `run_there` elements exist.
struct Lines {
  int lines, run, lines_there, run_there;
  int64_t stride;
  int pitch;
};

// Zeros where nothing exists. With kCount > 1 `run` is a multiple of it, and addresses are aligned.
template <int kCount, class T>
__device__ void fetch_lines(const T* from, const Lines& n, T* to) {
  constexpr int kBytes = kCount * int(sizeof(T));
  for_pieces(n.lines, n.run / kCount, [&](int line, int piece) {
    const int k = piece * kCount;
    const int there = line < n.lines_there ? n.run_there - k : 0;
    const int zeros = there <= 0 ? kBytes : there < kCount ? kBytes - there * int(sizeof(T)) : 0;
    const T* source = zeros < kBytes ? from + line * n.stride + k : from;
    __pipeline_memcpy_async(to + line * n.pitch + k, source, kBytes, zeros);
  });
}

// The same, `count` elements (16, 8 or 4 bytes) in one copy.
template <class T>
__device__ __forceinline__ void fetch_lines(const T* from, const Lines& n, int count, T* to) {
  if (count * int(sizeof(T)) == 16) {
    fetch_lines<kWord<T>>(from, n, to);
  } else if (count == 2) {
    fetch_lines<2>(from, n, to);
  } else {
    fetch_lines<1>(from, n, to);
  }
}

template <int kCount, class T>
__device__ void put_lines(const T* from, const Lines& n, T* to) {
  for_pieces(n.lines_there, int(ceil_div(n.run_there, kCount)), [&](int line, int piece) {
    const int k = piece * kCount;
    T* target = to + line * n.stride + k;
    T run[kCount];
    load_run<kCount>(from + line * n.pitch + k, run);
    if (k + kCount <= n.run_there) {
      store_run<kCount>(run, target);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (k + j < n.run_there) target[j] = run[j];
      }
    }
  });
}

// A tile: `rows` x `columns` entries, of which `pitch` elements lie from line to line.
struct TileShape {
  int rows, columns, pitch;
  bool down;  // lines are columns, else rows
};

template <class T>
HOS_HD TileShape tile_shape(int rows, int columns, bool down) {
  return {rows, columns, padded_line<T>(down ? rows : columns), down};
}

HOS_HD int tile_elements(const TileShape& s) { return s.pitch * (s.down ? s.columns : s.rows); }

// The lines of columns [column, column + s.columns) of U in rows [row, row + s.rows), cut off at
// `rows` rows and `rank` columns.
HOS_HD Lines factor_lines(const View& factor, const TileShape& s, int64_t rows, int64_t columns) {
  const int there = int(rows < s.rows ? rows : s.rows);
  const int across = int(columns < 0 ? 0 : columns < s.columns ? columns : s.columns);
  if (s.down) return {across, s.rows, across, there, factor.column, s.pitch};
  return {s.rows, across, there, across, factor.row, s.pitch};
}

// `rows` entries of a row vector from `row` on, zeros up to `size`, by one warp.
template <class T>
__device__ void fetch_run(const View& view, int64_t point, int64_t sample, int64_t row,
                          int64_t rows, int size, T* to) {
  const T* from = place<T>(view, point, sample, row);
  const int there = int(rows < size ? rows : size);
  for (int i = threadIdx.x % kWarp; i < size; i += kWarp) {
    __pipeline_memcpy_async(to + i, i < there ? from + i : from, sizeof(T),
                            i < there ? 0 : sizeof(T));
  }
}

// How many elements of a factor one copy may take: 16, 8 or 4 bytes (float64: 16 or 8).
inline int copy_count(const View& f, int64_t rank, int bytes, bool down) {
  const auto fits = [&](int count) {
    const int64_t line = down ? f.column : f.row;
    return reinterpret_cast<uintptr_t>(f.data) % uintptr_t(count * bytes) == 0 &&
           f.point % count == 0 && f.batch % count == 0 && line % count == 0 &&
           (down || rank % count == 0);
  };
  const int most = 16 / bytes;
  return rank == 0 ? 1 : fits(most) ? most : fits(2) ? 2 : 1;
}

}  // namespace HOS_ISA
}  // namespace hos
