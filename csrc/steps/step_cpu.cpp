// Langevin and Ozaki steps on the CPU: one pass over x, score, diag and out, normals made in
// registers and a 256-byte buffer. Compute-bound. Compiled with contraction off (see common.h).

#include <algorithm>
#include <type_traits>

#include "base/element.h"
#include "base/parallel.h"
#include "noise/blocks.h"
#include "steps/step.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

template <class T>
inline const T* row_of(const void* base, int64_t stride, int64_t row) {
  return static_cast<const T*>(base) + row * stride;
}

template <class T>
inline T* row_of(void* base, int64_t stride, int64_t row) {
  return static_cast<T*>(base) + row * stride;
}

// Visits flat elements [begin, end) in stretches that stay in one row and one block of noise:
// visit(row, column, count, z). A given noise is widened into the same buffer.
template <class T, class Visit>
inline void walk(const StepArgs& a, int64_t begin, int64_t end, const Visit& visit) {
  using A = typename Acc<T>::type;
  NoiseWalk<A> noise(NoiseKey{a.seed, a.tag, a.start});
  alignas(64) A given[kBlock];
  int64_t row = begin / a.size;
  int64_t column = begin % a.size;
  for (int64_t flat = begin; flat < end;) {
    int64_t count = std::min(a.size - column, end - flat);
    const A* z = given;
    if (a.noise == nullptr) {
      z = noise.at(a.start + uint64_t(flat), &count);
    } else {
      count = std::min<int64_t>(count, kBlock);
      const T* source = row_of<T>(a.noise, a.noise_row, row) + column;
      for (int64_t j = 0; j < count; ++j) given[j] = widen(source[j]);
    }
    visit(row, column, count, z);
    flat += count;
    column += count;
    if (column == a.size) {
      column = 0;
      ++row;
    }
  }
}

// body(constant) with the curvature as a compile-time constant, so that its loop vectorises.
template <class Body>
inline void with_curvature(int curvature, const Body& body) {
  if (curvature == kClamp) {
    body(std::integral_constant<int, kClamp>());
  } else if (curvature == kAbs) {
    body(std::integral_constant<int, kAbs>());
  } else {
    body(std::integral_constant<int, kRaw>());
  }
}

template <class A>
inline A step_size_of(const StepArgs& a, int64_t row) {
  return A(a.step_sizes != nullptr ? a.step_sizes[row] : a.step_size);
}

// Rows that follow one another without a gap, under one step size, are one long row.
StepArgs joined(const StepArgs& a) {
  const auto dense = [&](const void* p, int64_t stride) {
    return p == nullptr || stride == a.size;
  };
  if (a.step_sizes != nullptr || !dense(a.x, a.x_row) || !dense(a.score, a.score_row) ||
      !dense(a.diag, a.diag_row) || !dense(a.noise, a.noise_row) || !dense(a.out, a.out_row) ||
      !dense(a.grad, a.grad_row)) {
    return a;
  }
  StepArgs one = a;
  one.size = a.rows * a.size;
  one.rows = one.size > 0 ? 1 : 0;
  return one;
}

template <class T>
void run_step(const StepArgs& a, int threads) {
  using A = typename Acc<T>::type;
  if (a.out_row == a.size) advise_huge_pages(a.out, a.rows * a.size * int64_t(sizeof(T)));
  parallel_for(a.rows * a.size, kBlock, kNoiseGrain, threads, [&](int64_t begin, int64_t end) {
    walk<T>(a, begin, end, [&](int64_t row, int64_t column, int64_t count, const A* z) {
      const T* x = row_of<T>(a.x, a.x_row, row) + column;
      const T* s = row_of<T>(a.score, a.score_row, row) + column;
      T* out = row_of<T>(a.out, a.out_row, row) + column;
      const A h = step_size_of<A>(a, row);
      if (a.diag == nullptr) {
        const A spread = square_root(A(2) * h);
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          narrow(langevin_element(widen(x[j]), widen(s[j]), h, spread, z[j]), out + j);
        }
        return;
      }
      const T* d = row_of<T>(a.diag, a.diag_row, row) + column;
      with_curvature(a.curvature, [&](auto curvature) {
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          narrow(ozaki_element(widen(x[j]), widen(s[j]), widen(d[j]), h, z[j], curvature), out + j);
        }
      });
    });
  });
}

template <class T>
void run_backward(const StepArgs& a, int threads) {
  using A = typename Acc<T>::type;
  parallel_for(a.rows * a.size, kBlock, kNoiseGrain, threads, [&](int64_t begin, int64_t end) {
    walk<T>(a, begin, end, [&](int64_t row, int64_t column, int64_t count, const A* z) {
      const T* g = row_of<T>(a.grad, a.grad_row, row) + column;
      const A h = step_size_of<A>(a, row);
      const int64_t flat = row * a.size + column;  // gradients are written densely
      const auto put = [&](void* base, int64_t j, A value) {
        if (base != nullptr) narrow(value, static_cast<T*>(base) + flat + j);
      };
      if (a.diag == nullptr) {
        for (int64_t j = 0; j < count; ++j) {
          const StepGrad<A> grad = langevin_element_vjp(h, A(widen(g[j])));
          put(a.grad_score, j, grad.score);
          put(a.grad_noise, j, grad.noise);
        }
        return;
      }
      const T* s = row_of<T>(a.score, a.score_row, row) + column;
      const T* d = row_of<T>(a.diag, a.diag_row, row) + column;
      alignas(64) A by_score[kBlock], by_diag[kBlock], by_noise[kBlock];
      with_curvature(a.curvature, [&](auto curvature) {
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) {
          const StepGrad<A> grad =
              ozaki_element_vjp(widen(s[j]), widen(d[j]), h, z[j], curvature, widen(g[j]));
          by_score[j] = grad.score;
          by_diag[j] = grad.diag;
          by_noise[j] = grad.noise;
        }
      });
      for (int64_t j = 0; j < count; ++j) {
        put(a.grad_score, j, by_score[j]);
        put(a.grad_diag, j, by_diag[j]);
        put(a.grad_noise, j, by_noise[j]);
      }
    });
  });
}

}  // namespace

int64_t step(const StepArgs& args, int dtype, Queue queue) {
  if (args.step_sizes != nullptr) {
    for (int64_t row = 0; row < args.rows; ++row) {
      if (!is_positive(args.step_sizes[row])) return row + 1;
    }
  }
  const StepArgs a = joined(args);
  const int threads = queue.threads();
  if (dtype == kFloat32) run_step<float>(a, threads);
  if (dtype == kFloat64) run_step<double>(a, threads);
  if (dtype == kFloat16) run_step<half_t>(a, threads);
  if (dtype == kBFloat16) run_step<bfloat_t>(a, threads);
  return 0;
}

void step_backward(const StepArgs& args, int dtype, Queue queue) {
  const StepArgs a = joined(args);
  const int threads = queue.threads();
  if (dtype == kFloat32) run_backward<float>(a, threads);
  if (dtype == kFloat64) run_backward<double>(a, threads);
  if (dtype == kFloat16) run_backward<half_t>(a, threads);
  if (dtype == kBFloat16) run_backward<bfloat_t>(a, threads);
}

}  // namespace HOS_ISA
}  // namespace hos
