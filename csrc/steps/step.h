// One element of a Langevin-type step and its vjp, host and device, in MALA time (step_size h):
//   Langevin  x + h s + sqrt(2 h) z                                   Eq. 19 with h = eps / 2
//   Ozaki     x + h phi1(y) s + sqrt(2 h phi1(2 y)) z,  y = h d       Eq. 20, diagonal Hessian
// with phi1(2 y) = phi1(y) (1 + (e^y - 1) / 2): one exponential and one division serve both.
#pragma once

#include "base/common.h"
#include "base/queue.h"

namespace hos {

// What a step does to the diagonal of the Hessian before it uses it.
enum Curvature : int { kClamp, kAbs, kRaw };
inline constexpr const char* kCurvatureNames[] = {"clamp", "abs", "raw"};

// Sizes, strides (in elements) and pointers of a step. Rows are contiguous; a null pointer means:
// diag, a Langevin step; noise, drawn here.
struct StepArgs {
  int64_t rows, size;  // samples, elements a sample
  const void *x, *score, *diag, *noise, *grad;
  int64_t x_row, score_row, diag_row, noise_row, grad_row;
  void *out, *grad_score, *grad_diag, *grad_noise;
  int64_t out_row;
  const double* step_sizes;  // one a row, or null
  double step_size;
  int curvature;
  uint64_t seed, tag, start;
  const uint64_t *seed_pointer, *offset_pointer;  // device values that replace seed, add to tag
};

inline namespace HOS_ISA {

// The kernels. `step` returns 0, or 1 + the row whose step size is not a positive finite number; on
// CUDA always 0, for looking would wait.
int64_t step(const StepArgs&, int dtype, Queue);
void step_backward(const StepArgs&, int dtype, Queue);

template <class T>
HOS_HD T treat_curvature(T d, int curvature) {
  if (curvature == kClamp) return d > T(0) ? T(0) : d;
  if (curvature == kAbs) return d > T(0) ? -d : d;
  return d;
}

// Derivative of treat_curvature; at 0 that of "raw" for clamp, 0 for abs.
template <class T>
HOS_HD T treat_curvature_prime(T d, int curvature) {
  if (curvature == kClamp) return d > T(0) ? T(0) : T(1);
  if (curvature == kAbs) return d > T(0) ? T(-1) : (d < T(0) ? T(1) : T(0));
  return T(1);
}

template <class T>
HOS_HD T langevin_element(T x, T s, T h, T spread, T z) {
  return mul_add(spread, z, mul_add(h, s, x));
}

template <class T>
HOS_HD T ozaki_element(T x, T s, T d, T h, T z, int curvature) {
  const T y = h * treat_curvature(d, curvature);
  const T e = exp_minus_one(y);
  const T p = phi1(y, e);
  const T q = p * mul_add(T(0.5), e, T(1));
  return mul_add(square_root(T(2) * h * q), z, mul_add(h * p, s, x));
}

template <class T>
struct StepGrad {
  T score, diag, noise;  // the gradient of x is the incoming one
};

template <class T>
HOS_HD StepGrad<T> langevin_element_vjp(T h, T grad) {
  return {grad * h, T(0), grad * square_root(T(2) * h)};
}

// d/dd [h phi1(y) s] = h^2 phi1'(y) s; d/dd sqrt(2 h phi1(2 y)) = 2 h^2 phi1'(2 y) / that root,
// 2 phi1'(2 y) = phi1'(y) (1 + (e^y - 1) / 2) + phi1(y) e^y / 2: no term cancels.
template <class T>
HOS_HD StepGrad<T> ozaki_element_vjp(T s, T d, T h, T z, int curvature, T grad) {
  const T y = h * treat_curvature(d, curvature);
  const T e = exp_minus_one(y);
  const T p = phi1(y, e);
  const T half = mul_add(T(0.5), e, T(1));
  const T spread = square_root(T(2) * h * (p * half));
  const T prime = phi1_prime(y, e, p);
  const T prime2 = mul_add(prime, half, T(0.5) * p * (e + T(1)));
  const T noise_part = spread > T(0) ? h * h * prime2 / (spread > T(0) ? spread : T(1)) : T(0);
  const T slope = mul_add(h * h * prime, s, noise_part * z);
  return {grad * h * p, grad * slope * treat_curvature_prime(d, curvature), grad * spread};
}

}  // namespace HOS_ISA
}  // namespace hos
