// Langevin and Ozaki steps on CUDA, the noise drawn within. Bytes moved for an element: x, score,
// diag in, out back (16 in float32); the noise none. About 110 instructions an element, more than
// half of them for the noise: on recent GPUs they take nearly as long as the bytes, and in 16-bit
// storage longer, so that wider accesses than a counter's four elements would gain nothing.

#include "noise/quads.cuh"
#include "steps/step.h"

namespace hos {
inline namespace HOS_ISA {

namespace {

// The step size of lane k.
template <class A>
__device__ __forceinline__ A step_size_of(const StepArgs& a, const Quad& q, int k) {
  if (a.step_sizes == nullptr) return A(a.step_size);
  int64_t row = q.row, column;
  if (!q.whole) q.place(k, &row, &column);
  return A(a.step_sizes[row]);
}

// The noise of a step: given, or drawn here.
template <class T, class A>
__device__ void noise_of(const StepArgs& a, const NoiseKey& key, const Quad& q, uint64_t counter,
                         A* z) {
  if (a.noise != nullptr) {
    load<T>(a.noise, a.noise_row, q, z);
  } else {
    draw(key, counter, false, z);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) step_kernel(StepArgs a, bool whole) {
  using A = typename Acc<T>::type;
  const NoiseKey key = read_key(NoiseKey{a.seed, a.tag, a.start}, a.seed_pointer, a.offset_pointer);
  for_quads(key.start, a.rows * a.size, a.size, whole, [&](const Quad& q, uint64_t counter) {
    A x[4], s[4], d[4] = {}, z[4], out[4];
    load<T>(a.x, a.x_row, q, x);
    load<T>(a.score, a.score_row, q, s);
    if (a.diag != nullptr) load<T>(a.diag, a.diag_row, q, d);
    noise_of<T>(a, key, q, counter, z);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const A h = step_size_of<A>(a, q, k);
      out[k] = a.diag == nullptr ? langevin_element(x[k], s[k], h, square_root(A(2) * h), z[k])
                                 : ozaki_element(x[k], s[k], d[k], h, z[k], a.curvature);
    }
    store<T>(out, q, a.out, a.out_row);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) step_backward_kernel(StepArgs a, bool whole) {
  using A = typename Acc<T>::type;
  const NoiseKey key = read_key(NoiseKey{a.seed, a.tag, a.start}, a.seed_pointer, a.offset_pointer);
  for_quads(key.start, a.rows * a.size, a.size, whole, [&](const Quad& q, uint64_t counter) {
    A grad[4], s[4] = {}, d[4] = {}, z[4] = {}, score[4], diag[4], noise[4];
    load<T>(a.grad, a.grad_row, q, grad);
    if (a.diag != nullptr) {
      load<T>(a.score, a.score_row, q, s);
      load<T>(a.diag, a.diag_row, q, d);
      noise_of<T>(a, key, q, counter, z);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const A h = step_size_of<A>(a, q, k);
      const StepGrad<A> g = a.diag == nullptr
                                ? langevin_element_vjp(h, grad[k])
                                : ozaki_element_vjp(s[k], d[k], h, z[k], a.curvature, grad[k]);
      score[k] = g.score;
      diag[k] = g.diag;
      noise[k] = g.noise;
    }
    if (a.grad_score != nullptr) store<T>(score, q, a.grad_score, a.size);
    if (a.grad_diag != nullptr) store<T>(diag, q, a.grad_diag, a.size);
    if (a.grad_noise != nullptr) store<T>(noise, q, a.grad_noise, a.size);
  });
}

// One kernel for each DType, in its order.
constexpr decltype(&step_kernel<float>) kStep[] = {step_kernel<float>, step_kernel<double>,
                                                   step_kernel<half_t>, step_kernel<bfloat_t>};
constexpr decltype(&step_kernel<float>) kStepBackward[] = {
    step_backward_kernel<float>, step_backward_kernel<double>, step_backward_kernel<half_t>,
    step_backward_kernel<bfloat_t>};

// Whether a counter's elements lie in one row and every array can move them at once.
bool whole_quads(const StepArgs& a, int dtype) {
  bool whole = a.start % 4 == 0 && (a.rows == 1 || a.size % 4 == 0);
  const auto has = [&](const void* base, int64_t stride) {
    whole = whole && aligned(base, dtype) && (a.rows == 1 || base == nullptr || stride % 4 == 0);
  };
  has(a.x, a.x_row);
  has(a.score, a.score_row);
  has(a.diag, a.diag_row);
  has(a.noise, a.noise_row);
  has(a.grad, a.grad_row);
  has(a.out, a.out_row);
  has(a.grad_score, a.size);
  has(a.grad_diag, a.size);
  has(a.grad_noise, a.size);
  return whole;
}

// Dense rows with one step size as a single row: no division to find an element's place.
StepArgs flattened(StepArgs a) {
  const auto dense = [&](const void* base, int64_t stride) {
    return base == nullptr || stride == a.size;
  };
  if (a.step_sizes == nullptr && dense(a.x, a.x_row) && dense(a.score, a.score_row) &&
      dense(a.diag, a.diag_row) && dense(a.noise, a.noise_row) && dense(a.grad, a.grad_row) &&
      dense(a.out, a.out_row)) {
    a.size *= a.rows;
    a.rows = 1;
  }
  return a;
}

void launch_steps(const char* name, decltype(&step_kernel<float>) kernel, const StepArgs& args,
                  int dtype, Queue queue) {
  StepArgs a = flattened(args);
  if (a.noise != nullptr) a.start = 0;  // counters matter to drawn noise alone
  launch(name, kernel, quad_blocks(a.rows * a.size), queue, a, whole_quads(a, dtype));
}

}  // namespace

int64_t step(const StepArgs& a, int dtype, Queue queue) {
  launch_steps("step", kStep[dtype], a, dtype, queue);
  return 0;
}

void step_backward(const StepArgs& a, int dtype, Queue queue) {
  launch_steps("step_backward", kStepBackward[dtype], a, dtype, queue);
}

}  // namespace HOS_ISA
}  // namespace hos
