// diag(d) + U diag(w) U^T on the CPU: the dense matrix, each line written once, and the product
// with one or several vectors, which reads U once (its tiles stay in cache between U^T v and U t).

#include "kernels.h"
#include "low_rank.h"
#include "panel.h"
#include "parallel.h"

HOS_DECLARE_KERNELS(HOS_ISA)

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kGrain = 1 << 15;  // entries below which no second thread wakes

template <class T>
inline T weight_of(const LowRankArgs& a, int64_t k) {
  return a.sign != nullptr ? static_cast<const T*>(a.sign)[k] : T(1);
}

template <class T>
inline const T* at(const View& view, int64_t sample, int64_t row) {
  return static_cast<const T*>(view.data) + sample * view.batch + row * view.row;
}

template <class T>
void assemble(const LowRankArgs& a, int threads) {
  const int64_t stride = padded(a.rank), width = padded(a.size);
  const int64_t tiles = (a.size + kTile - 1) / kTile;
  if (a.out_row == a.size && a.out_batch == a.size * a.size) {
    advise_huge_pages(a.out, a.batch * a.size * a.size * int64_t(sizeof(T)));
  }
  const int64_t grain = kGrain / (kTile * a.size + 1) + 1;
  parallel_for(a.batch * tiles, 1, grain, threads, [&](int64_t begin, int64_t end) {
    Scratch<T> panel((kTile + kTileRows) * stride), turned(a.rank * width);
    Scratch<T> block((kTile + kTileRows) * width);
    int64_t held = -1;  // the sample whose weighted U^T lies in `turned`
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / tiles, row = item % tiles * kTile;
      const int64_t n = a.size - row < kTile ? a.size - row : kTile;
      if (held != sample && a.rank > 0) {
        const T* u = at<T>(a.factor, sample, 0);
        for (int64_t k = 0; k < a.rank; ++k) {
          const T w = weight_of<T>(a, k);
          T* to = turned.get() + k * width;
          for (int64_t i = 0; i < a.size; ++i)
            to[i] = w * u[i * a.factor.row + k * a.factor.column];
          for (int64_t i = a.size; i < width; ++i) to[i] = T(0);
        }
        held = sample;
      }
      const int64_t whole = (n + kTileRows - 1) / kTileRows * kTileRows;
      for (int64_t k = 0; k < whole * width; ++k) block.get()[k] = T(0);
      if (a.rank > 0) {
        pack(at<T>(a.factor, sample, row), a.factor.row, a.factor.column, n, a.size - row, a.rank,
             panel.get(), stride);
        for (int64_t k = n * stride; k < whole * stride; ++k) panel.get()[k] = T(0);
        add_product(panel.get(), stride, n, a.rank, turned.get(), width, a.size, block.get(),
                    width);
      }
      const T* d = at<T>(a.diag, sample, row);
      T* out = static_cast<T*>(a.out) + sample * a.out_batch + row * a.out_row;
      for (int64_t i = 0; i < n; ++i) {
        const T* from = block.get() + i * width;
        for (int64_t j = 0; j < a.size; ++j) out[i * a.out_row + j] = from[j];
        out[i * a.out_row + row + i] = hessian_entry(from[row + i], d[i], true);
      }
    }
  });
}

template <class T>
void matvec(const LowRankArgs& a, int threads) {
  using V = Vector<T>;
  const int64_t stride = padded(a.rank);
  const int64_t grain = kGrain / (a.size * (a.rank + 1) * a.columns + 1) + 1;
  parallel_for(a.batch, 1, grain, threads, [&](int64_t begin, int64_t end) {
    Scratch<T> panel(kTile * stride), inner(a.columns * stride);
    for (int64_t sample = begin; sample < end; ++sample) {
      T* t = inner.get();
      for (int64_t k = 0; k < a.columns * stride; ++k) t[k] = T(0);
      // Two passes over the tiles: t = diag(w) U^T v, then d v + U t.
      for (int pass = a.rank > 0 ? 0 : 1; pass < 2; ++pass) {
        for (int64_t row = 0; row < a.size; row += kTile) {
          const int64_t n = a.size - row < kTile ? a.size - row : kTile;
          if (a.rank > 0) {
            pack(at<T>(a.factor, sample, row), a.factor.row, a.factor.column, n, a.size - row,
                 a.rank, panel.get(), stride);
          }
          const T* v = at<T>(a.v, sample, row);
          const T* d = at<T>(a.diag, sample, row);
          T* out = static_cast<T*>(a.out) + (sample * a.size + row) * a.columns;
          for (int64_t c = 0; c < a.columns; ++c) {
            for (int64_t i = 0; i < n; ++i) {
              const T x = v[i * a.v.row + c * a.v.column];
              const T* u = panel.get() + i * stride;
              T* tc = t + c * stride;
              V sum = {};
              for (int64_t k = 0; k < a.rank; k += Simd<T>::width) {
                if (pass == 0) {
                  store(tc + k, load(tc + k) + load(u + k) * x);
                } else {
                  sum += load(u + k) * load(tc + k);
                }
              }
              if (pass == 1) out[i * a.columns + c] = d[i] * x + sum_lanes<T>(sum);
            }
          }
        }
        for (int64_t c = 0; pass == 0 && c < a.columns; ++c) {
          for (int64_t k = 0; k < a.rank; ++k) t[c * stride + k] *= weight_of<T>(a, k);
          for (int64_t k = a.rank; k < stride; ++k) t[c * stride + k] = T(0);  // 0 * inf is NaN
        }
      }
    }
  });
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
