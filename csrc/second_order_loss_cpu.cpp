// Score matching losses on the CPU. A sample of the second-order losses is read once in forward, in
// tiles that stay in the inner caches: U of all points is packed, the Gram matrices and the column
// dot products accumulate in registers. Backward reads U once more and writes its gradient once,
// from the saved Gram matrices. Sums run in a fixed order that the number of threads does not
// change: chunks of a sample are added one after another.

#include "kernels.h"
#include "panel.h"
#include "parallel.h"
#include "second_order_loss.h"

HOS_DECLARE_KERNELS(HOS_ISA)

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int64_t kChunk = 1024;          // rows of a sample summed in one go
constexpr int64_t kEntryChunk = 8192;     // the same for the entry-wise losses
constexpr int64_t kGrainFlops = 1 << 17;  // work below which no second thread wakes

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
inline const T* at(const View& view, int64_t point, int64_t sample, int64_t row) {
  return static_cast<const T*>(view.data) + point * view.point + sample * view.batch +
         row * view.row;
}

inline double sigma_of(const LossArgs& a, int64_t sample) {
  return a.sigmas != nullptr ? a.sigmas[sample] : a.sigma;
}

// Sizes of a second-order problem and the signature w = [sign, 1, 0 ...] of its columns.
template <class T>
struct Problem {
  explicit Problem(const LossArgs& args)
      : a(args),
        points(points_of(args.kind)),
        columns(args.rank + 1),
        stride(padded(columns)),
        gram_points(points == 3 ? 2 : 1),
        tile(stride <= 64 ? 64 : 32),
        weight(stride) {
    for (int64_t k = 0; k < stride; ++k) {
      T w = k < columns ? T(1) : T(0);
      if (a.sign != nullptr && k < a.rank) w = static_cast<const T*>(a.sign)[k];
      weight.get()[k] = w;
    }
  }
  // V of `n` rows from `row` on, as a panel.
  void pack_tile(int64_t point, int64_t sample, int64_t row, int64_t n, T* panel) const {
    const T* u = a.rank > 0 ? at<T>(a.factor, point, sample, row) : nullptr;
    pack(u, a.rank > 0 ? a.factor.row : 0, a.factor.column, n, a.size - row, a.rank, panel, stride);
    if (point < a.score_points) {
      const T* s = at<T>(a.score, point, sample, row);
      for (int64_t i = 0; i < n; ++i) panel[i * stride + a.rank] = s[i];
    }
  }
  const LossArgs& a;
  int64_t points, columns, stride, gram_points, tile;
  Scratch<T> weight;
};

// Sums over rows of one sample, in memory order: Gram matrices, then one row each of the inner
// products, the projections g = V^T z (difference to the clean point for + and -), and sum d V^2.
template <class T>
struct Sums {
  Sums(const Problem<T>& p, T* data) : gram_size(p.stride * p.stride) {
    gram = data;
    inner = gram + p.gram_points * gram_size;
    for (int point = 0; point < 3; ++point) project[point] = inner + (1 + point) * p.stride;
    norm = inner + 4 * p.stride;
    scalar = inner + 5 * p.stride;
  }
  static int64_t size(const Problem<T>& p) {
    return p.gram_points * p.stride * p.stride + 6 * p.stride;
  }
  int64_t gram_size;
  T *gram, *inner, *project[3], *norm,
      *scalar;  // scalar: sum of A d^2, of the diagonal's inner part
};

// Inner products, projections and weighted norms of a tile, for the plain loss (one panel).
template <class T>
inline void add_dots(const T* v, const T* d, const T* z, int64_t n, const Problem<T>& p,
                     Sums<T>& sums) {
  using V = Vector<T>;
  for (int64_t k = 0; k < p.columns; k += Simd<T>::width) {
    V project = load(sums.project[0] + k), norm = load(sums.norm + k);
    for (int64_t i = 0; i < n; ++i) {
      const V x = load(v + i * p.stride + k);
      project += x * z[i];
      norm += x * x * d[i];
    }
    store(sums.project[0] + k, project);
    store(sums.norm + k, norm);
  }
}

// The same for the variance-reduced loss: differences D+- = V+- - V0 first, then
// <D+, D+> + <D-, D-> + 2 <V0, D+ + D-> column by column.
template <class T>
inline void add_dots(const T* plus, const T* minus, const T* clean, const T* dp, const T* dm,
                     const T* z, int64_t n, const Problem<T>& p, Sums<T>& sums) {
  using V = Vector<T>;
  for (int64_t k = 0; k < p.columns; k += Simd<T>::width) {
    V inner = load(sums.inner + k), norm = load(sums.norm + k);
    V up = load(sums.project[0] + k), down = load(sums.project[1] + k);
    V base = load(sums.project[2] + k);
    for (int64_t i = 0; i < n; ++i) {
      const V a = load(plus + i * p.stride + k), b = load(minus + i * p.stride + k);
      const V c = load(clean + i * p.stride + k);
      const V da = a - c, db = b - c;
      inner += difference_entry(a, b, c);
      norm += a * a * dp[i] + b * b * dm[i];
      up += da * z[i];
      down += db * z[i];
      base += c * z[i];
    }
    store(sums.inner + k, inner);
    store(sums.norm + k, norm);
    store(sums.project[0] + k, up);
    store(sums.project[1] + k, down);
    store(sums.project[2] + k, base);
  }
}

// Adds rows [begin, end) of a sample to `sums`; `panels` holds one panel of a tile for each point.
template <class T>
void add_rows(const Problem<T>& p, int64_t sample, int64_t begin, int64_t end, T* panels,
              Sums<T>& sums) {
  const LossArgs& a = p.a;
  const int64_t panel_size = p.tile * p.stride;
  for (int64_t row = begin; row < end; row += p.tile) {
    const int64_t n = end - row < p.tile ? end - row : p.tile;
    const T* z = at<T>(a.noise, 0, sample, row);
    for (int64_t point = 0; point < p.points; ++point) {
      T* panel = panels + point * panel_size;
      p.pack_tile(point, sample, row, n, panel);
      if (point < p.gram_points) {
        add_gram(panel, p.stride, n, p.columns, sums.gram + point * sums.gram_size);
      }
    }
    const T* d = at<T>(a.diag, 0, sample, row);
    T square = T(0), inner = T(0);
    if (p.points == 1) {
      add_dots(panels, d, z, n, p, sums);
#pragma omp simd reduction(+ : square, inner)
      for (int64_t i = 0; i < n; ++i) {
        square += d[i] * d[i];
        inner += d[i] * (T(1) - z[i] * z[i]);
      }
    } else {
      const T* dm = at<T>(a.diag, 1, sample, row);
      const T* d0 = at<T>(a.diag, 2, sample, row);
      add_dots(panels, panels + panel_size, panels + 2 * panel_size, d, dm, z, n, p, sums);
#pragma omp simd reduction(+ : square, inner)
      for (int64_t i = 0; i < n; ++i) {
        square += d[i] * d[i] + dm[i] * dm[i];
        inner += ((d[i] - d0[i]) + (dm[i] - d0[i])) * (T(1) - z[i] * z[i]);
      }
    }
    sums.scalar[0] += square;
    sums.scalar[1] += inner;
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
    const T* gram = sums.gram + point * sums.gram_size;
    for (int64_t k = 0; k < p.columns; ++k) {
      const T* row = gram + k * p.stride;
      T off = T(0);
#pragma omp simd reduction(+ : off)
      for (int64_t l = k + 1; l < p.columns; ++l) off += w[l] * row[l] * row[l];
      norm += double(w[k]) * (double(w[k]) * row[k] * row[k] + 2.0 * off);
      for (int64_t l = k; l < p.columns; ++l) {
        saved[k * p.columns + l] = saved[l * p.columns + k] = row[l];
      }
    }
    saved += p.columns * p.columns;
  }
  for (int64_t k = 0; k < p.columns; ++k) {
    norm += 2.0 * w[k] * double(sums.norm[k]);
    const double up = sums.project[0][k];
    if (!reduced) {
      inner += column_inner(w[k], sums.gram[k * p.stride + k], up, 0.0, 0.0);
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
void clear(T* data, int64_t n) {
  for (int64_t k = 0; k < n; ++k) data[k] = T(0);
}

inline int64_t grain_of(const LossArgs& a, int64_t rows) {
  const int64_t flops = points_of(a.kind) * rows * (a.rank + 4) * (a.rank + 4) + 1;
  return ceil_div(kGrainFlops, flops);
}

template <class T>
void low_rank_loss(const LossArgs& a, int threads) {
  const Problem<T> p(a);
  const int64_t size = Sums<T>::size(p);
  const int64_t chunks = a.size > kChunk ? ceil_div(a.size, kChunk) : 1;
  const auto chunk_sums = [&](int64_t sample, int64_t chunk, T* panels, T* data) {
    clear(data, size);
    Sums<T> sums(p, data);
    const int64_t end = (chunk + 1) * kChunk < a.size ? (chunk + 1) * kChunk : a.size;
    add_rows(p, sample, chunk * kChunk, end, panels, sums);
  };
  if (a.batch >= threads || chunks == 1) {  // a sample to a thread
    parallel_for(a.batch, 1, grain_of(a, a.size), threads, [&](int64_t begin, int64_t end) {
      Scratch<T> panels(p.points * p.tile * p.stride), total(size), part(size);
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
    Scratch<T> panels(p.points * p.tile * p.stride);
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

// Gradients of rows [begin, end) of one sample at one point. `matrix` is scratch for stride + 2
// rows of `stride`, `panels` for two panels of a tile.
template <class T>
void rows_backward(const Problem<T>& p, int64_t point, int64_t sample, int64_t begin, int64_t end,
                   T* matrix, T* panels) {
  using V = Vector<T>;
  const LossArgs& a = p.a;
  const int64_t stride = p.stride;
  const T* w = p.weight.get();
  const T g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
  const T precision = T(1.0 / (sigma_of(a, sample) * sigma_of(a, sample)));
  const Coefficients<T> c = coefficients<T>(a.kind, point);
  const T* saved = static_cast<const T*>(a.saved) + sample * saved_size(a.kind, a.rank);
  const T* gram = saved + point * p.columns * p.columns;
  const T* project = saved + p.gram_points * p.columns * p.columns + point * p.columns;
  const bool full = point < p.gram_points;
  T *by_noise = matrix + stride * stride, *by_diag = by_noise + stride;
  clear(by_noise, 2 * stride);
  for (int64_t k = 0; k < p.columns; ++k) {
    by_noise[k] = noise_weight(c, project[k], w[k], precision, g);
    by_diag[k] =
        full ? diag_weight(c, w[k], g) : gram_weight(c, T(0), w[k], w[k], true, precision, g);
  }
  if (full) {
    clear(matrix, p.columns * stride);
    for (int64_t l = 0; l < p.columns; ++l) {
      for (int64_t k = 0; k < p.columns; ++k) {
        matrix[l * stride + k] =
            gram_weight(c, gram[l * p.columns + k], w[l], w[k], l == k, precision, g);
      }
    }
  }
  T* panel = panels;
  T* out = panels + p.tile * stride;
  for (int64_t row = begin; row < end; row += p.tile) {
    const int64_t n = end - row < p.tile ? end - row : p.tile;
    p.pack_tile(point, sample, row, n, panel);
    const int64_t whole = ceil_div(n, kTileRows) * kTileRows;
    clear(panel + n * stride, (whole - n) * stride);
    const T* d = at<T>(a.diag, point, sample, row);
    const T* z = at<T>(a.noise, 0, sample, row);
    const int64_t flat = (point * a.batch + sample) * a.size + row;
    T* grad_diag = static_cast<T*>(a.grad_diag) + flat;
    for (int64_t i = 0; i < n; ++i) {
      const T scale = full ? d[i] : T(1);  // the clean point has no Gram matrix: V itself enters
      V row_norm = {};
      for (int64_t k = 0; k < p.columns; k += Simd<T>::width) {
        const V v = load(panel + i * stride + k);
        const V weighted = load(by_diag + k) * v;
        store(out + i * stride + k, z[i] * load(by_noise + k) + scale * weighted);
        if (full) row_norm += load(w + k) * v * v;
      }
      grad_diag[i] = diag_grad(c, d[i], full ? sum_lanes<T>(row_norm) : T(0), z[i], precision, g);
    }
    if (full) add_product(panel, stride, n, p.columns, matrix, stride, p.columns, out, stride);
    if (a.rank > 0) {
      T* to = static_cast<T*>(const_cast<void*>(a.grad_factor.data)) + point * a.grad_factor.point +
              sample * a.grad_factor.batch + row * a.grad_factor.row;
      unpack(out, stride, n, end - row, a.rank, to, a.grad_factor.row, a.grad_factor.column);
    }
    if (point < a.score_points) {
      T* grad_score = static_cast<T*>(a.grad_score) + flat;
      for (int64_t i = 0; i < n; ++i) grad_score[i] = out[i * stride + a.rank];
    }
  }
}

template <class T>
void low_rank_backward(const LossArgs& a, int threads) {
  const Problem<T> p(a);
  const int64_t chunks = a.size > kChunk ? ceil_div(a.size, kChunk) : 1;
  if (a.rank > 0) {
    advise_huge_pages(const_cast<void*>(a.grad_factor.data),
                      p.points * a.batch * a.size * a.rank * int64_t(sizeof(T)));
  }
  parallel_for(
      a.batch * chunks, 1, grain_of(a, a.size / chunks), threads, [&](int64_t begin, int64_t end) {
        Scratch<T> matrix((p.stride + 2) * p.stride), panels(2 * (p.tile + kTileRows) * p.stride);
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
