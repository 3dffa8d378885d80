// What every kernel shares, host and device: element types, and small mathematics (phi1, its
// derivative, and the elementary functions below them). float versions are branch-free polynomials
// of our own, so that loops over them vectorise and the CPU runs the arithmetic that the GPU runs;
// double calls the standard library. All products that feed a sum go through mul_add: with
// contraction off, a value does not depend on where in a vector (or in its scalar remainder) an
// element falls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HOS_HD __host__ __device__ __forceinline__
#else
#define HOS_HD inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once for each instruction set, the CUDA kernels once more, each time
// in a namespace of its own: baseline, x86_v3, x86_v4, cuda.
#if !defined(HOS_ISA)
#define HOS_ISA shared
#endif

namespace hos {

// The element types of the kernels, their names in torch, and their bytes.
enum DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };
inline constexpr const char* kDTypeNames[] = {"float32", "float64", "float16", "bfloat16"};
inline constexpr int64_t kDTypeBytes[] = {4, 8, 2, 2};

inline namespace HOS_ISA {

HOS_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a noise level or a step size must be: NaN and inf are not.
HOS_HD bool is_positive(double value) { return value > 0.0 && value <= 1.7976931348623157e308; }

HOS_HD float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

HOS_HD double mul_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

HOS_HD float square_root(float x) { return sqrtf(x); }
HOS_HD double square_root(double x) { return sqrt(x); }

HOS_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

HOS_HD uint32_t as_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// exp(y) - 1: y = n ln 2 + r, |r| <= ln(2)/2, minimax polynomial in r (error 3e-10). Relative error
// below 1.5 ulp, also near 0; inf above 88.73; NaN passes through.
HOS_HD float exp_minus_one(float y) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float t = y > 89.0f ? 89.0f : (y < -30.0f ? -30.0f : y);
  const float shifted = mul_add(t, 1.442695041f, magic);
  const float n = shifted - magic;
  float r = mul_add(n, -0.693359375f, t);
  r = mul_add(n, 2.12194440e-4f, r);
  float p = mul_add(1.996239469e-4f, r, 1.394330915e-3f);
  p = mul_add(p, r, 8.333219583e-3f);
  p = mul_add(p, r, 4.166632573e-2f);
  p = mul_add(p, r, 1.66666669e-1f);
  p = mul_add(p, r, 5.0e-1f);
  const float small = mul_add(p * r, r, r);
  // 2^n in two factors: n = 128 is reached before the overflow at 88.73.
  const uint32_t k = as_bits(shifted) - as_bits(magic) + 254u;  // n + 2 * 127
  const uint32_t half = k >> 1;
  const float s1 = as_float(half << 23);
  const float s2 = as_float((k - half) << 23);
  return mul_add(small * s1, s2, mul_add(s1, s2, -1.0f));
}

HOS_HD double exp_minus_one(double y) { return expm1(y); }

// phi1(y) = (exp(y) - 1) / y given e = exp(y) - 1; 1 at 0. 1.6 ulp (math: phi1 > 0 everywhere).
template <class T>
HOS_HD T phi1(T y, T e) {
  const T quotient = e / (y == T(0) ? T(1) : y);
  return y == T(0) ? T(1) : quotient;
}

// phi1'(y) given e and p = phi1(y): (exp(y) - p) / y cancels below |y| = 1, where the Taylor series
// sum y^k / (k! (k + 2)) takes over.
HOS_HD float phi1_prime(float y, float e, float p) {
  const float t = y > 1.0f ? 1.0f : (y < -1.0f ? -1.0f : y);
  float s = mul_add(1.9270853e-9f, t, 2.2964433e-8f);
  s = mul_add(s, t, 2.5052108e-7f);
  s = mul_add(s, t, 2.4801587e-6f);
  s = mul_add(s, t, 2.2045855e-5f);
  s = mul_add(s, t, 1.7361111e-4f);
  s = mul_add(s, t, 1.1904762e-3f);
  s = mul_add(s, t, 6.9444444e-3f);
  s = mul_add(s, t, 3.3333333e-2f);
  s = mul_add(s, t, 1.25e-1f);
  s = mul_add(s, t, 3.3333333e-1f);
  s = mul_add(s, t, 5.0e-1f);
  const bool near = y <= 1.0f && y >= -1.0f;
  const float far = ((e + 1.0f) - p) / (near ? 1.0f : y);
  return near ? s : far;
}

HOS_HD double phi1_prime(double y, double e, double p) {
  if (y <= 1.0 && y >= -1.0) {
    double s = 0.0;
    double c = 1.0 / 121645100408832000.0 / 21.0;  // 1 / (19! 21)
    for (int k = 19; k >= 0; --k) {
      s = mul_add(s, y, c);
      c *= k == 0 ? 1.0 : double(k) * (k + 2) / (k + 1);
    }
    return s;
  }
  return ((e + 1.0) - p) / y;
}

}  // namespace HOS_ISA
}  // namespace hos
