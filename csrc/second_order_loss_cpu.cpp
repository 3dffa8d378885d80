// Score matching losses on the CPU. A sample of the second-order losses is read once in forward, in
// panels that stay in the second cache: V of all points is packed by columns, Gram matrices and
// column dot products accumulate in registers. Backward reads U once more and writes its gradient
// once, from the saved Gram matrices. Sums run in a fixed order that the number of threads does not
// change: chunks of a sample are added one after another.

#include "columns.h"
#include "kernels.h"
#include "parallel.h"
#include "second_order_loss.h"

HOS_DECLARE_KERNELS(HOS_ISA)

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int64_t kChunk = 1024;          // rows of a sample summed in one go
constexpr int64_t kEntryChunk = 8192;     // the same for the entry-wise losses
constexpr int64_t kPanelBytes = 1 << 20;  // of V at all points, packed
constexpr int64_t kGrainFlops = 1 << 17;  // work below which no second thread wakes

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
inline const T* at(const View& view, int64_t point, int64_t sample, int64_t row) {
  return static_cast<const T*>(view.data) + point * view.point + sample * view.batch +
         row * view.row;
}

template <class T>
void clear(T* data, int64_t n) {
  for (int64_t k = 0; k < n; ++k) data[k] = T(0);
}

inline double sigma_of(const LossArgs& a, int64_t sample) {
  return a.sigmas != nullptr ? a.sigmas[sample] : a.sigma;
}

// Sizes of a second-order problem and the signature w = [sign, 1] of its columns.
template <class T>
struct Problem {
  explicit Problem(const LossArgs& args)
      : a(args),
        points(points_of(args.kind)),
        columns(args.rank + 1),
        gram_points(points == 3 ? 2 : 1),
        rows(panel_rows(points * columns, args.size)),
        stride((rows / 16 | 1) * 16),  // an odd number of lines: columns fall on different sets
        tile(columns <= 32   ? 128
             : columns <= 80 ? 64
                             : 32),
        weight(columns) {
    for (int64_t k = 0; k < columns; ++k) {
      const bool given = a.sign != nullptr && k < a.rank;
      weight.get()[k] = given ? static_cast<const T*>(a.sign)[k] : T(1);
    }
  }
  static int64_t panel_rows(int64_t columns, int64_t size) {
    const int64_t fit = kPanelBytes / (columns * int64_t(sizeof(T))) / 64 * 64;
    const int64_t most = size < kChunk ? ceil_div(size, 16) * 16 : kChunk;
    return fit < 64 ? 64 : fit < most ? fit : most;
  }
  // V of `n` rows from `row` on, as a panel.
  void pack(int64_t point, int64_t sample, int64_t row, int64_t n, T* panel, int64_t stride) const {
    if (a.rank > 0) {
      pack_columns(at<T>(a.factor, point, sample, row), a.factor.row, a.factor.column, n, a.rank,
                   panel, stride);
    }
    T* last = panel + a.rank * stride;
    if (point < a.score_points) {
      pack_run(at<T>(a.score, point, sample, row), n, last);
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
    pack_run(at<T>(a.noise, 0, sample, row), n, z);
    pack_run(at<T>(a.diag, 0, sample, row), n, d);
    T square = T(0), inner = T(0);
    if (p.points == 1) {
      add_dots(scratch, p.stride, d, z, whole, p.columns, sums);
#pragma omp simd reduction(+ : square, inner)
      for (int64_t i = 0; i < n; ++i) {
        square += d[i] * d[i];
        inner += d[i] * (T(1) - z[i] * z[i]);
      }
    } else {
      const T* d0 = at<T>(a.diag, 2, sample, row);
      pack_run(at<T>(a.diag, 1, sample, row), n, dm);
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
  const double precision = 1.0 / (sigma_of(a, sample) * sigma_of(a, sample));
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

inline int64_t grain_of(const LossArgs& a, int64_t rows) {
  const int64_t flops = points_of(a.kind) * rows * (a.rank + 4) * (a.rank + 4) + 1;
  return ceil_div(kGrainFlops, flops);
}

// Samples of a few entries, `kLanes` of them side by side: lane s of every array is a sample of its
// own, so that no sum crosses lanes. Backward takes the Gram matrices anew; nothing is saved.
constexpr int kLanes = 16, kSmallRows = 16, kSmallColumns = 8, kSmallEntries = 64;

inline bool is_small(const LossArgs& a) {
  return a.size <= kSmallRows && a.rank < kSmallColumns && a.size * (a.rank + 1) <= kSmallEntries;
}

template <class T>
using Lanes = T[kLanes];

template <class Body>
inline void for_lanes(const Body& body) {
#pragma omp simd
  for (int s = 0; s < kLanes; ++s) body(s);
}

// Samples [first, first + n), the last one repeated in the lanes left over.
template <class T>
struct Small {
  Small(const LossArgs& args, int64_t first, int64_t n)
      : a(args), size(args.size), columns(args.rank + 1) {
    for (int64_t k = 0; k < columns; ++k) {
      w[k] = a.sign != nullptr && k < a.rank ? static_cast<const T*>(a.sign)[k] : T(1);
    }
    for (int s = 0; s < kLanes; ++s) {
      sample[s] = first + (s < n ? s : n - 1);
      precision[s] = 1.0 / (sigma_of(a, sample[s]) * sigma_of(a, sample[s]));
    }
    for (int64_t i = 0; i < size; ++i) gather(a.noise, 0, i, 0, z[i]);
    for (int64_t point = 0; point < points_of(a.kind); ++point) {
      for (int64_t i = 0; i < size; ++i) {
        gather(a.diag, point, i, 0, d[point][i]);
        for (int64_t k = 0; k < a.rank; ++k) gather(a.factor, point, i, k, column(point, i, k));
        T* s = column(point, i, a.rank);
        if (point < a.score_points) {
          gather(a.score, point, i, 0, s);
        } else {
          clear(s, kLanes);
        }
      }
    }
  }
  void gather(const View& view, int64_t point, int64_t i, int64_t k, T* to) const {
    const T* from =
        static_cast<const T*>(view.data) + point * view.point + i * view.row + k * view.column;
    for (int s = 0; s < kLanes; ++s) to[s] = from[sample[s] * view.batch];
  }
  T* column(int64_t point, int64_t i, int64_t k) { return v[point][i * columns + k]; }
  // <column k, column l>
  void gram(int64_t point, int64_t k, int64_t l, T* sum) {
    clear(sum, kLanes);
    for (int64_t i = 0; i < size; ++i) {
      const T *x = column(point, i, k), *y = column(point, i, l);
      for_lanes([=](int s) { sum[s] += x[s] * y[s]; });
    }
  }
  const LossArgs& a;
  int64_t size, columns, sample[kLanes];
  double precision[kLanes];
  T w[kSmallColumns];
  Lanes<T> z[kSmallEntries], d[3][kSmallEntries], v[3][kSmallEntries];
};

template <class T, bool Reduced>
void small_loss(const LossArgs& a, int64_t first, int64_t n) {
  Small<T> p(a, first, n);
  double norm[kLanes] = {}, inner[kLanes] = {};
  for (int64_t i = 0; i < p.size; ++i) {
    const T *z = p.z[i], *d = p.d[0][i], *dm = p.d[1][i], *d0 = p.d[2][i];
    for_lanes([&](int s) {
      norm[s] += Reduced ? d[s] * d[s] + dm[s] * dm[s] : d[s] * d[s];
      inner[s] += (Reduced ? (d[s] - d0[s]) + (dm[s] - d0[s]) : d[s]) * (T(1) - z[s] * z[s]);
    });
  }
  for (int64_t k = 0; k < p.columns; ++k) {
    Lanes<T> entries = {}, weighted = {}, up = {}, down = {}, base = {};
    for (int64_t i = 0; i < p.size; ++i) {
      const T *z = p.z[i], *d = p.d[0][i], *dm = p.d[1][i];
      const T *plus = p.column(0, i, k), *minus = p.column(1, i, k), *clean = p.column(2, i, k);
      for_lanes([&](int s) {
        if (Reduced) {
          entries[s] += difference_entry(plus[s], minus[s], clean[s]);
          up[s] += (plus[s] - clean[s]) * z[s];
          down[s] += (minus[s] - clean[s]) * z[s];
          base[s] += clean[s] * z[s];
          weighted[s] += plus[s] * plus[s] * d[s] + minus[s] * minus[s] * dm[s];
        } else {
          entries[s] += plus[s] * plus[s];
          up[s] += plus[s] * z[s];
          weighted[s] += plus[s] * plus[s] * d[s];
        }
      });
    }
    const T w = p.w[k];
    for_lanes([&](int s) {
      norm[s] += 2.0 * w * double(weighted[s]);
      inner[s] += column_inner(w, entries[s], up[s], down[s], base[s]);
    });
    for (int64_t l = k; l < p.columns; ++l) {
      const double weight = (l == k ? 1.0 : 2.0) * w * p.w[l];
      for (int point = 0; point < (Reduced ? 2 : 1); ++point) {
        Lanes<T> gram;
        p.gram(point, k, l, gram);
        for_lanes([&](int s) { norm[s] += weight * double(gram[s] * gram[s]); });
      }
    }
  }
  for (int64_t s = 0; s < n; ++s) {
    static_cast<T*>(a.loss)[first + s] = T(loss_value(Reduced, norm[s], inner[s], p.precision[s]));
  }
  const int64_t saved = saved_size(a.kind, a.rank);
  clear(static_cast<T*>(a.saved) + first * saved, n * saved);
}

template <class T>
void small_backward(const LossArgs& a, int64_t first, int64_t n) {
  Small<T> p(a, first, n);
  Lanes<T> g, precision;
  for (int s = 0; s < kLanes; ++s) {
    g[s] = static_cast<const T*>(a.grad)[p.sample[s] * a.grad_stride];
    precision[s] = T(p.precision[s]);
  }
  const auto scatter = [n](const T* from, T* to, int64_t stride) {
    for (int64_t s = 0; s < n; ++s) to[s * stride] = from[s];
  };
  for (int64_t point = 0; point < points_of(a.kind); ++point) {
    const Coefficients<T> c = coefficients<T>(a.kind, point);
    const bool full = point < 2;  // the clean point has no Gram matrix: V itself enters
    Lanes<T> matrix[kSmallColumns * kSmallColumns];
    Lanes<T> by_noise[kSmallColumns], by_diag[kSmallColumns];
    for (int64_t k = 0; k < p.columns; ++k) {
      const T w = p.w[k];
      Lanes<T> project = {};
      for (int64_t i = 0; i < p.size; ++i) {
        const T *z = p.z[i], *v = p.column(point, i, k);
        for_lanes([&](int s) { project[s] += v[s] * z[s]; });
      }
      for_lanes([&](int s) {
        by_noise[k][s] = noise_weight(c, project[s], w, precision[s], g[s]);
        by_diag[k][s] = diag_weight(c, w, g[s]);
      });
      for (int64_t l = 0; l <= k; ++l) {
        Lanes<T> gram = {};
        if (full) p.gram(point, k, l, gram);
        T *to = matrix[l * p.columns + k], *mirror = matrix[k * p.columns + l];
        const T other = p.w[l];
        for_lanes([&](int s) {
          mirror[s] = gram_weight(c, gram[s], w, other, l == k, precision[s], g[s]);
          to[s] = gram_weight(c, gram[s], other, w, l == k, precision[s], g[s]);
        });
      }
    }
    for (int64_t i = 0; i < p.size; ++i) {
      const T *z = p.z[i], *d = p.d[point][i];
      Lanes<T> norm = {}, out;
      for (int64_t k = 0; k < p.columns; ++k) {
        const T* v = p.column(point, i, k);
        for_lanes([&](int s) {
          norm[s] += full ? p.w[k] * v[s] * v[s] : T(0);
          out[s] = z[s] * by_noise[k][s] + (full ? d[s] * by_diag[k][s] * v[s] : T(0));
        });
        for (int64_t l = full ? 0 : k; l < (full ? p.columns : k + 1); ++l) {
          const T *x = p.column(point, i, l), *m = matrix[l * p.columns + k];
          for_lanes([&](int s) { out[s] += x[s] * m[s]; });
        }
        if (k < a.rank) {
          const View& to = a.grad_factor;
          scatter(out, const_cast<T*>(at<T>(to, point, first, i)) + k * to.column, to.batch);
        } else if (point < a.score_points) {
          const int64_t flat = (point * a.batch + first) * a.size + i;
          scatter(out, static_cast<T*>(a.grad_score) + flat, a.size);
        }
      }
      for_lanes([&](int s) { out[s] = diag_grad(c, d[s], norm[s], z[s], precision[s], g[s]); });
      scatter(out, static_cast<T*>(a.grad_diag) + (point * a.batch + first) * a.size + i, a.size);
    }
  }
}

// body(first, n) for every few samples.
template <class Body>
void for_small(const LossArgs& a, int threads, const Body& body) {
  parallel_for(a.batch, kLanes, grain_of(a, a.size), threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kLanes) {
      body(first, end - first < kLanes ? end - first : kLanes);
    }
  });
}

template <class T>
void low_rank_loss(const LossArgs& a, int threads) {
  if (is_small(a)) {
    for_small(a, threads, [&](int64_t first, int64_t n) {
      points_of(a.kind) == 3 ? small_loss<T, true>(a, first, n) : small_loss<T, false>(a, first, n);
    });
    return;
  }
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
  const T precision = T(1.0 / (sigma_of(a, sample) * sigma_of(a, sample)));
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
    pack_run(at<T>(a.noise, 0, sample, row), n, z);
    pack_run(at<T>(a.diag, point, sample, row), n, d);
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
    T* to = a.rank == 0 ? nullptr : const_cast<T*>(at<T>(a.grad_factor, point, sample, row));
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
void low_rank_backward(const LossArgs& a, int threads) {
  if (is_small(a)) {
    for_small(a, threads, [&](int64_t first, int64_t n) { small_backward<T>(a, first, n); });
    return;
  }
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

// The entry-wise losses: a fixed-order sum of chunks of entry(sample, i).
template <class T, class Entry>
void sum_entries(const LossArgs& a, int threads, const Entry& entry) {
  const int64_t chunks = a.size > kEntryChunk ? ceil_div(a.size, kEntryChunk) : 1;
  Scratch<double> parts(a.batch * chunks);
  const int64_t grain = ceil_div(kEntryChunk, a.size / chunks + 1);
  parallel_for(a.batch * chunks, 1, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % chunks * kEntryChunk;
      const int64_t last = first + kEntryChunk < a.size ? first + kEntryChunk : a.size;
      parts.get()[item] = entry(item / chunks, first, last);
    }
  });
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += parts.get()[sample * chunks + chunk];
    static_cast<T*>(a.loss)[sample] = T(total);
  }
}

// Float sums of 256 entries, added in double.
template <class T, class Term>
inline double sum_range(int64_t first, int64_t last, const Term& term) {
  constexpr int64_t kRun = 256;
  double total = 0.0;
  for (int64_t begin = first; begin < last; begin += kRun) {
    const int64_t end = begin + kRun < last ? begin + kRun : last;
    T sum = T(0);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += term(i);
    total += double(sum);
  }
  return total;
}

template <class T>
void entry_loss(const LossArgs& a, int threads) {
  sum_entries<T>(a, threads, [&](int64_t sample, int64_t first, int64_t last) {
    const T sigma = T(sigma_of(a, sample));
    const T inverse = T(1) / sigma, precision = inverse * inverse;
    const T* s = at<T>(a.score, 0, sample, 0);
    const T* z = at<T>(a.noise, 0, sample, 0);
    if (a.kind == kDsm) {
      return sum_range<T>(first, last, [&](int64_t i) { return dsm_entry(s[i], z[i], inverse); });
    }
    if (a.kind == kDsmVr) {
      const T* clean = at<T>(a.score, 1, sample, 0);
      return sum_range<T>(first, last,
                          [&](int64_t i) { return dsm_vr_entry(s[i], clean[i], z[i], inverse); });
    }
    const T* d = at<T>(a.diag, 0, sample, 0);
    if (a.kind == kD2smDiag) {
      return sum_range<T>(first, last,
                          [&](int64_t i) { return diagonal_entry(s[i], d[i], z[i], precision); });
    }
    const bool clean = a.score_points == 3;
    const T* sm = at<T>(a.score, 1, sample, 0);
    const T* s0 = clean ? at<T>(a.score, 2, sample, 0) : s;
    const T* dm = at<T>(a.diag, 1, sample, 0);
    const T* d0 = at<T>(a.diag, 2, sample, 0);
    return sum_range<T>(first, last, [&](int64_t i) {
      return diagonal_vr_entry(s[i], sm[i], s0[i], d[i], dm[i], d0[i], z[i], precision, clean);
    });
  });
}

template <class T>
void entry_backward(const LossArgs& a, int threads) {
  const int64_t points = points_of(a.kind);
  const bool first_order = a.kind == kDsm || a.kind == kDsmVr;
  const int64_t grain = ceil_div(kEntryChunk, a.size + 1);
  parallel_for(points * a.batch, 1, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t point = item / a.batch, sample = item % a.batch;
      const T g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
      const T inverse = T(1) / T(sigma_of(a, sample)), precision = inverse * inverse;
      const bool scored = point < a.score_points;
      const T* s = at<T>(a.score, scored ? point : 0, sample, 0);
      const T* z = at<T>(a.noise, 0, sample, 0);
      T* grad_score = static_cast<T*>(a.grad_score) + item * a.size;
      if (first_order) {
#pragma GCC ivdep
        for (int64_t i = 0; i < a.size; ++i)
          grad_score[i] = dsm_grad(point, s[i], z[i], inverse, g);
        continue;
      }
      const Coefficients<T> c = coefficients<T>(a.kind, point);
      const T* d = at<T>(a.diag, point, sample, 0);
      T* grad_diag = static_cast<T*>(a.grad_diag) + item * a.size;
      if (scored) {
#pragma GCC ivdep
        for (int64_t i = 0; i < a.size; ++i) {
          grad_diag[i] = diagonal_grad(c, s[i], d[i], z[i], precision, g);
          grad_score[i] = T(2) * s[i] * grad_diag[i];
        }
      } else {  // the clean point has a = 0: its score does not enter
#pragma GCC ivdep
        for (int64_t i = 0; i < a.size; ++i) {
          grad_diag[i] = diagonal_grad(c, T(0), d[i], z[i], precision, g);
        }
      }
    }
  });
}

}  // namespace

int64_t loss_cpu(const LossArgs& a, int dtype, int threads) {
  for (int64_t sample = 0; sample < (a.sigmas != nullptr ? a.batch : 0); ++sample) {
    if (!(a.sigmas[sample] > 0.0 && a.sigmas[sample] <= 1.7976931348623157e308)) return sample + 1;
  }
  const bool low_rank = a.kind == kD2sm || a.kind == kD2smVr;
  if (dtype == kFloat32)
    low_rank ? low_rank_loss<float>(a, threads) : entry_loss<float>(a, threads);
  if (dtype == kFloat64)
    low_rank ? low_rank_loss<double>(a, threads) : entry_loss<double>(a, threads);
  return 0;
}

void loss_backward_cpu(const LossArgs& a, int dtype, int threads) {
  const bool low_rank = a.kind == kD2sm || a.kind == kD2smVr;
  if (dtype == kFloat32) {
    low_rank ? low_rank_backward<float>(a, threads) : entry_backward<float>(a, threads);
  }
  if (dtype == kFloat64) {
    low_rank ? low_rank_backward<double>(a, threads) : entry_backward<double>(a, threads);
  }
}

}  // namespace HOS_ISA
}  // namespace hos
