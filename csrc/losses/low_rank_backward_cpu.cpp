// Losses of low rank on the CPU, backward: U is read once more and its gradient written once, from
// the saved Gram matrices, by tiles that stay in the first cache.

#include "losses/engines.h"
#include "losses/low_rank.h"
#include "losses/products.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

// Gradients of rows [begin, end) of one sample at one point. `matrix` is scratch for columns + 2
// rows of `columns`, `scratch` for two panels of a tile and three runs of its rows.
template <class T>
void rows_backward(const Problem<T>& p, int64_t point, int64_t sample, int64_t begin, int64_t end,
                   T* matrix, T* scratch) {
  using V = Vector<T>;
  const LossArgs& a = p.a;
  const int64_t columns = p.columns, stride = p.tile;
  const T* w = p.weight.get();
  const T g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
  const T precision = T(precision_of(a, sample));
  const Coefficients<T> c = coefficients<T>(a.kind, point);
  const T* saved = static_cast<const T*>(a.saved) + sample * saved_size(a.kind, a.rank);
  const T* gram = saved + point * columns * columns;
  const T* project = saved + p.gram_points * columns * columns + point * columns;
  const bool full = point < p.gram_points;  // the clean point has none: V itself enters
  T *by_noise = matrix + columns * columns, *by_diag = by_noise + columns;
  for (int64_t k = 0; k < columns; ++k) {
    by_noise[k] = noise_weight(c, project[k], w[k], precision, g);
    by_diag[k] =
        full ? diag_weight(c, w[k], g) : gram_weight(c, T(0), w[k], w[k], true, precision, g);
  }
  for (int64_t l = 0; full && l < columns; ++l) {
    T* row = matrix + l * columns;
    const T* from = gram + l * columns;
    for (int64_t k = 0; k < columns; ++k) {
      row[k] = gram_weight(c, from[k], w[l], w[k], false, precision, g);
    }
    row[l] = gram_weight(c, from[l], w[l], w[l], true, precision, g);
  }
  T *panel = scratch, *out = panel + columns * stride;
  T *z = out + columns * stride, *d = z + stride, *norm = d + stride;
  const Product<T> product{
      panel, stride, full ? columns : 0, columns, matrix, z, d, by_noise, by_diag, columns, out};
  for (int64_t row = begin; row < end; row += stride) {
    const int64_t n = end - row < stride ? end - row : stride, whole = whole_vectors<T>(n);
    p.pack(point, sample, row, n, panel, stride);
    pack_run(place<T>(a.noise, 0, sample, row), n, z);
    pack_run(place<T>(a.diag, point, sample, row), n, d);
    for (int64_t i = 0; i < whole; i += Simd<T>::width) {
      V sum = {};
      for (int64_t k = 0; full && k < columns; ++k) {
        const V v = load(panel + k * stride + i);
        sum += w[k] * v * v;
      }
      store(norm + i, sum);
    }
    const int64_t flat = (point * a.batch + sample) * a.size + row;
    T* grad_diag = static_cast<T*>(a.grad_diag) + flat;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      grad_diag[i] = diag_grad(c, d[i], norm[i], z[i], precision, g);
    }
    for (int64_t i = 0; !full && i < whole; ++i) d[i] = T(1);
    T* to = a.rank == 0 ? nullptr : const_cast<T*>(place<T>(a.grad_factor, point, sample, row));
    const View& f = a.grad_factor;
    Fetch<T> result(to, f.row, f.column, n, a.rank, product_tiles<T>(whole, columns));
    product_of_columns(product, whole, [&] { result.next_part(); });  // hides that memory
    if (a.rank > 0) unpack_columns(out, stride, n, a.rank, to, f.row, f.column);
    if (point < a.score_points) {
      memcpy(static_cast<T*>(a.grad_score) + flat, out + a.rank * stride, size_t(n) * sizeof(T));
    }
  }
}

template <class T>
void run_backward(const LossArgs& a, int threads) {
  const Problem<T> p(a);
  const int64_t chunks = a.size > kChunk ? ceil_div(a.size, kChunk) : 1;
  if (a.rank > 0) {
    advise_huge_pages(const_cast<void*>(a.grad_factor.data),
                      p.points * a.batch * a.size * a.rank * int64_t(sizeof(T)));
  }
  parallel_for(
      a.batch * chunks, 1, grain_of(a, a.size / chunks), threads, [&](int64_t begin, int64_t end) {
        Scratch<T> matrix((p.columns + 2) * p.columns), panels((2 * p.columns + 3) * p.tile);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t first = item % chunks * kChunk;
          const int64_t last = chunks == 1 || first + kChunk > a.size ? a.size : first + kChunk;
          for (int64_t point = 0; point < p.points; ++point) {
            rows_backward(p, point, item / chunks, first, last, matrix.get(), panels.get());
          }
        }
      });
}

}  // namespace

void low_rank_backward(const LossArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat32) run_backward<float>(a, queue.threads());
  if (dtype == kFloat64) run_backward<double>(a, queue.threads());
}

}  // namespace HOS_ISA
}  // namespace hos
