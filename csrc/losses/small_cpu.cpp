// Losses of low rank on the CPU for samples of a few entries, `kLanes` of them side by side: lane s
// of every array is a sample of its own, so that no sum crosses lanes. Backward takes the Gram
// matrices anew; nothing is saved.

#include "losses/engines.h"
#include "losses/low_rank.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int kLanes = 16, kSmallRows = 16, kSmallColumns = 8, kSmallEntries = 64;

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
    for (int64_t k = 0; k < columns; ++k) w[k] = weight_of<T>(a.sign, a.rank, k);
    for (int s = 0; s < kLanes; ++s) {
      sample[s] = first + (s < n ? s : n - 1);
      precision[s] = precision_of(a, sample[s]);
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
void loss_of_lanes(const LossArgs& a, int64_t first, int64_t n) {
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
void backward_of_lanes(const LossArgs& a, int64_t first, int64_t n) {
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
          scatter(out, const_cast<T*>(place<T>(to, point, first, i)) + k * to.column, to.batch);
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
void run_loss(const LossArgs& a, int threads) {
  for_small(a, threads, [&](int64_t first, int64_t n) {
    points_of(a.kind) == 3 ? loss_of_lanes<T, true>(a, first, n)
                           : loss_of_lanes<T, false>(a, first, n);
  });
}

template <class T>
void run_backward(const LossArgs& a, int threads) {
  for_small(a, threads, [&](int64_t first, int64_t n) { backward_of_lanes<T>(a, first, n); });
}

}  // namespace

bool is_small(int64_t size, int64_t rank) {
  return size <= kSmallRows && rank < kSmallColumns && size * (rank + 1) <= kSmallEntries;
}

void small_loss(const LossArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat32) run_loss<float>(a, queue.threads());
  if (dtype == kFloat64) run_loss<double>(a, queue.threads());
}

void small_backward(const LossArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat32) run_backward<float>(a, queue.threads());
  if (dtype == kFloat64) run_backward<double>(a, queue.threads());
}

}  // namespace HOS_ISA
}  // namespace hos
