// Entry-wise losses on the CPU, those without a factor: one pass over a sample. Chunks of it are
// summed in a fixed order that the number of threads does not change.

#include "base/parallel.h"
#include "losses/engines.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

constexpr int64_t kEntryChunk = 8192;  // rows of a sample summed in one go

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
void run_loss(const LossArgs& a, int threads) {
  sum_entries<T>(a, threads, [&](int64_t sample, int64_t first, int64_t last) {
    const T sigma = T(sigma_of(a, sample));
    const T inverse = T(1) / sigma, precision = inverse * inverse;
    const T* s = place<T>(a.score, 0, sample, 0);
    const T* z = place<T>(a.noise, 0, sample, 0);
    if (a.kind == kDsm) {
      return sum_range<T>(first, last, [&](int64_t i) { return dsm_entry(s[i], z[i], inverse); });
    }
    if (a.kind == kDsmVr) {
      const T* clean = place<T>(a.score, 1, sample, 0);
      return sum_range<T>(first, last,
                          [&](int64_t i) { return dsm_vr_entry(s[i], clean[i], z[i], inverse); });
    }
    const T* d = place<T>(a.diag, 0, sample, 0);
    if (a.kind == kD2smDiag) {
      return sum_range<T>(first, last,
                          [&](int64_t i) { return diagonal_entry(s[i], d[i], z[i], precision); });
    }
    const bool clean = a.score_points == 3;
    const T* sm = place<T>(a.score, 1, sample, 0);
    const T* s0 = clean ? place<T>(a.score, 2, sample, 0) : s;
    const T* dm = place<T>(a.diag, 1, sample, 0);
    const T* d0 = place<T>(a.diag, 2, sample, 0);
    return sum_range<T>(first, last, [&](int64_t i) {
      return diagonal_vr_entry(s[i], sm[i], s0[i], d[i], dm[i], d0[i], z[i], precision, clean);
    });
  });
}

template <class T>
void run_backward(const LossArgs& a, int threads) {
  const int64_t points = points_of(a.kind);
  const bool first_order = !has_diag(a.kind);
  const int64_t grain = ceil_div(kEntryChunk, a.size + 1);
  parallel_for(points * a.batch, 1, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t point = item / a.batch, sample = item % a.batch;
      const T g = static_cast<const T*>(a.grad)[sample * a.grad_stride];
      const T inverse = T(1) / T(sigma_of(a, sample)), precision = inverse * inverse;
      const bool scored = point < a.score_points;
      const T* s = place<T>(a.score, scored ? point : 0, sample, 0);
      const T* z = place<T>(a.noise, 0, sample, 0);
      T* grad_score = static_cast<T*>(a.grad_score) + item * a.size;
      if (first_order) {
#pragma GCC ivdep
        for (int64_t i = 0; i < a.size; ++i)
          grad_score[i] = dsm_grad(point, s[i], z[i], inverse, g);
        continue;
      }
      const Coefficients<T> c = coefficients<T>(a.kind, point);
      const T* d = place<T>(a.diag, point, sample, 0);
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

void entrywise_loss(const LossArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat32) run_loss<float>(a, queue.threads());
  if (dtype == kFloat64) run_loss<double>(a, queue.threads());
}

void entrywise_backward(const LossArgs& a, int dtype, Queue queue) {
  if (dtype == kFloat32) run_backward<float>(a, queue.threads());
  if (dtype == kFloat64) run_backward<double>(a, queue.threads());
}

int64_t entrywise_scratch(int64_t, int64_t) { return 0; }

}  // namespace HOS_ISA
}  // namespace hos
