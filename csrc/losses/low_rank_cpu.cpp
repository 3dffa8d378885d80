// Losses of low rank on the CPU, forward: a sample is read once, in panels that stay in the second
// cache. V of all points is packed by columns; Gram matrices and column dot products accumulate in
// registers. Sums run in a fixed order that the number of threads does not change: chunks of a
// sample are added one after another.

#include "losses/engines.h"
#include "losses/low_rank.h"
#include "losses/products.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

// Sums over rows of one sample, in memory order: Gram matrices (on and above the diagonal, rows of
// whole vectors), then one row each of the inner products, the projections g = V^T z (difference to
// the clean point for + and -) and sum d V^2, then the sums of d^2 and of the diagonal's inner
// part.
template <class T>
struct Sums {
  Sums(const Problem<T>& p, T* data)
      : gram_stride(whole_vectors<T>(p.columns)), gram_size(p.columns * gram_stride) {
    gram = data;
    inner = gram + p.gram_points * gram_size;
    for (int point = 0; point < 3; ++point) project[point] = inner + (1 + point) * p.columns;
    norm = inner + 4 * p.columns;
    scalar = inner + 5 * p.columns;
  }
  static int64_t size(const Problem<T>& p) {
    return p.gram_points * p.columns * whole_vectors<T>(p.columns) + 5 * p.columns + 2;
  }
  int64_t gram_stride, gram_size;
  T *gram, *inner, *project[3], *norm, *scalar;
};

// Projections and weighted norms of a panel, for the plain loss.
template <class T>
void add_dots(const T* panel, int64_t stride, const T* d, const T* z, int64_t n, int64_t columns,
              Sums<T>& sums) {
  using V = Vector<T>;
  for (int64_t k = 0; k < columns; ++k, panel += stride) {
    V acc[2] = {};
    for (int64_t i = 0; i < n; i += Simd<T>::width) {
      const V x = load(panel + i);
      acc[0] += x * load(z + i);
      acc[1] += x * x * load(d + i);
    }
    T sum[2];
    store_sums<T, 2>(acc, sum);
    sums.project[0][k] += sum[0];
    sums.norm[k] += sum[1];
  }
}

// The same for the variance-reduced loss: differences D+- = V+- - V0 first, then
// <D+, D+> + <D-, D-> + 2 <V0, D+ + D-> column by column.
template <class T>
void add_dots(const T* plus, const T* minus, const T* clean, int64_t stride, const T* dp,
              const T* dm, const T* z, int64_t n, int64_t columns, Sums<T>& sums) {
  using V = Vector<T>;
  for (int64_t k = 0; k < columns; ++k) {
    V acc[5] = {};
    for (int64_t i = 0; i < n; i += Simd<T>::width) {
      const V a = load(plus + k * stride + i), b = load(minus + k * stride + i);
      const V c = load(clean + k * stride + i), noise = load(z + i);
      acc[0] += difference_entry(a, b, c);
      acc[1] += (a - c) * noise;
      acc[2] += (b - c) * noise;
      acc[3] += c * noise;
      acc[4] += a * a * load(dp + i) + b * b * load(dm + i);
    }
    T sum[5];
    store_sums<T, 5>(acc, sum);
    sums.inner[k] += sum[0];
    for (int point = 0; point < 3; ++point) sums.project[point][k] += sum[1 + point];
    sums.norm[k] += sum[4];
  }
}

// Adds rows [begin, end) of a sample to `sums`; `scratch` holds a panel for each point, and three
// runs of its rows.
template <class T>
void add_rows(const Problem<T>& p, int64_t sample, int64_t begin, int64_t end, T* scratch,
              Sums<T>& sums) {
  const LossArgs& a = p.a;
  const int64_t panel_size = p.columns * p.stride;
  T *z = scratch + p.points * panel_size, *d = z + p.stride, *dm = d + p.stride;
  const int64_t pieces = end > begin ? ceil_div(end - begin, p.rows) : 1;
  const int64_t step = ceil_div(ceil_div(end - begin, pieces), 16) * 16;  // as equal as can be
  for (int64_t row = begin; row < end; row += step) {
    const int64_t n = end - row < step ? end - row : step, whole = whole_vectors<T>(n);
    for (int64_t point = 0; point < p.points; ++point) {
      p.pack(point, sample, row, n, scratch + point * panel_size, p.stride);
    }
    pack_run(place<T>(a.noise, 0, sample, row), n, z);
    pack_run(place<T>(a.diag, 0, sample, row), n, d);
    T square = T(0), inner = T(0);
    if (p.points == 1) {
      add_dots(scratch, p.stride, d, z, whole, p.columns, sums);
#pragma omp simd reduction(+ : square, inner)
      for (int64_t i = 0; i < n; ++i) {
        square += d[i] * d[i];
        inner += d[i] * (T(1) - z[i] * z[i]);
      }
    } else {
      const T* d0 = place<T>(a.diag, 2, sample, row);
      pack_run(place<T>(a.diag, 1, sample, row), n, dm);
      add_dots(scratch, scratch + panel_size, scratch + 2 * panel_size, p.stride, d, dm, z, whole,
               p.columns, sums);
#pragma omp simd reduction(+ : square, inner)
      for (int64_t i = 0; i < n; ++i) {
        square += d[i] * d[i] + dm[i] * dm[i];
        inner += ((d[i] - d0[i]) + (dm[i] - d0[i])) * (T(1) - z[i] * z[i]);
      }
    }
    sums.scalar[0] += square;
    sums.scalar[1] += inner;
    for (int64_t point = 0; point < p.gram_points; ++point) {
      add_gram(scratch + point * panel_size, p.stride, whole, p.columns,
               sums.gram + point * sums.gram_size, sums.gram_stride);
    }
  }
}

// Copies what is above the diagonal of a matrix below it.
template <class T>
void mirror(T* matrix, int64_t stride, int64_t n) {
  constexpr int W = Simd<T>::width;
  for (int64_t first = 0; first < n; first += W) {
    const int64_t next = first + W;
    for (int64_t l = first + 1; l < (next < n ? next : n); ++l) {
      for (int64_t k = first; k < l; ++k) matrix[l * stride + k] = matrix[k * stride + l];
    }
    if (next >= n) return;
    pack_columns(matrix + first * stride + next, stride, 1, W, n - next,
                 matrix + next * stride + first, stride);
  }
}

// The sum of w_k w_l G_kl^2, the padding of whose rows is zero.
template <class T>
double weighted_square(const T* gram, int64_t stride, int64_t n, const T* w) {
  constexpr int W = Simd<T>::width;
  double total = 0.0;
  for (int64_t first = 0; first < n; first += W, gram += W) {
    Vector<T> even = {}, odd = {};
    for (int64_t k = 0; k < n; ++k) {
      const Vector<T> g = load(gram + k * stride);
      (k % 2 == 0 ? even : odd) += w[k] * g * g;
    }
    T sum[W];
    store(sum, even + odd);
    for (int64_t l = first; l < (first + W < n ? first + W : n); ++l) {
      total += double(w[l]) * double(sum[l - first]);
    }
  }
  return total;
}

// Copies the rows of a padded matrix to a dense one; what is written too far is overwritten by the
// rows that follow.
template <class T>
void copy_rows(const T* from, int64_t stride, int64_t n, T* to) {
  constexpr int W = Simd<T>::width;
  for (int64_t k = n - 1; k >= 0; --k, from += stride, to += n) {
    if (k * n < W - 1) {
      memcpy(to, from, size_t(n) * sizeof(T));
    } else {
      for (int64_t l = 0; l < n; l += W) store(to + l, load(from + l));
    }
  }
}

// The loss of a sample from its sums; keeps what backward needs.
template <class T>
void finish(const Problem<T>& p, int64_t sample, const Sums<T>& sums) {
  const LossArgs& a = p.a;
  const T* w = p.weight.get();
  const double precision = precision_of(a, sample);
  const bool reduced = p.points == 3;
  T* saved = static_cast<T*>(a.saved) + sample * saved_size(a.kind, a.rank);
  double norm = sums.scalar[0], inner = sums.scalar[1];
  for (int64_t point = 0; point < p.gram_points; ++point) {
    T* gram = sums.gram + point * sums.gram_size;
    mirror(gram, sums.gram_stride, p.columns);
    norm += weighted_square(gram, sums.gram_stride, p.columns, w);
    copy_rows(gram, sums.gram_stride, p.columns, saved);
    saved += p.columns * p.columns;
  }
  for (int64_t k = 0; k < p.columns; ++k) {
    norm += 2.0 * w[k] * double(sums.norm[k]);
    const double up = sums.project[0][k];
    if (!reduced) {
      inner += column_inner(w[k], sums.gram[k * sums.gram_stride + k], up, 0.0, 0.0);
      saved[k] = T(up);
      continue;
    }
    const double down = sums.project[1][k], base = sums.project[2][k];
    inner += column_inner(w[k], sums.inner[k], up, down, base);
    saved[k] = T(up + base);
    saved[p.columns + k] = T(down + base);
    saved[2 * p.columns + k] = T(base);
  }
  static_cast<T*>(a.loss)[sample] = T(loss_value(reduced, norm, inner, precision));
}

template <class T>
void add_to(T* total, const T* part, int64_t n) {
  for (int64_t k = 0; k < n; ++k) total[k] += part[k];
}

template <class T>
void run_loss(const LossArgs& a, int threads) {
  const Problem<T> p(a);
  const int64_t size = Sums<T>::size(p), panels_size = (p.points * p.columns + 3) * p.stride;
  const int64_t chunks = a.size > kChunk ? ceil_div(a.size, kChunk) : 1;
  const auto chunk_sums = [&](int64_t sample, int64_t chunk, T* panels, T* data) {
    clear(data, size);
    Sums<T> sums(p, data);
    const int64_t end = (chunk + 1) * kChunk < a.size ? (chunk + 1) * kChunk : a.size;
    add_rows(p, sample, chunk * kChunk, end, panels, sums);
  };
  if (a.batch >= threads || chunks == 1) {  // a sample to a thread
    parallel_for(a.batch, 1, grain_of(a, a.size), threads, [&](int64_t begin, int64_t end) {
      Scratch<T> panels(panels_size), total(size), part(size);
      for (int64_t sample = begin; sample < end; ++sample) {
        chunk_sums(sample, 0, panels.get(), total.get());
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
          chunk_sums(sample, chunk, panels.get(), part.get());
          add_to(total.get(), part.get(), size);
        }
        finish(p, sample, Sums<T>(p, total.get()));
      }
    });
    return;
  }
  Scratch<T> parts(a.batch * chunks * size);  // few large samples: a chunk to a thread
  parallel_for(a.batch * chunks, 1, grain_of(a, kChunk), threads, [&](int64_t begin, int64_t end) {
    Scratch<T> panels(panels_size);
    for (int64_t item = begin; item < end; ++item) {
      chunk_sums(item / chunks, item % chunks, panels.get(), parts.get() + item * size);
    }
  });
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    T* total = parts.get() + sample * chunks * size;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) add_to(total, total + chunk * size, size);
    finish(p, sample, Sums<T>(p, total));
  }
}

}  // namespace

void low_rank_loss(const LossArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat32) run_loss<float>(a, queue.threads());
  if (dtype == kFloat64) run_loss<double>(a, queue.threads());
}

int64_t low_rank_scratch(int, int64_t, int64_t, int64_t) { return 0; }

}  // namespace HOS_ISA
}  // namespace hos
