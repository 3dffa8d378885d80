// Stateless randomness: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, host and device.
// key = seed (64 bit), counter = (element / 4 : 64 bit, offset : 56 bit, stream : 8 bit); lane =
// element % 4. One counter gives four normals or four uniforms, in every dtype from the same words.
#pragma once

#include "base/common.h"

namespace hos {

// What identifies a stretch of noise.
struct NoiseKey {
  uint64_t seed;
  uint64_t tag;    // offset | stream << 56
  uint64_t start;  // global index of the first element
};

inline namespace HOS_ISA {

struct Words {
  uint32_t w[4];
};

template <class T>
struct Pair {
  T a, b;
};

// 32 x 32 -> 64 bit product with the low half of a lane.
struct WideProduct {
  HOS_HD uint64_t operator()(uint64_t c, uint32_t m) const { return uint64_t(m) * uint32_t(c); }
};

// Ten rounds on words held in the low halves of 64-bit lanes (one counter, or a vector of them);
// the high halves carry rubbish that no product reads. This is how the multiplier wants them.
template <class Lane, class Product>
HOS_HD void philox_rounds(Lane c[4], uint64_t seed, const Product& product) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const Lane p0 = product(c[0], 0xD2511F53u);
    const Lane p1 = product(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ uint64_t(k0);
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ uint64_t(k1);
    c[3] = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

HOS_HD Words philox(uint64_t counter, uint64_t tag, uint64_t seed) {
  uint64_t c[4] = {counter, counter >> 32, tag, tag >> 32};
  philox_rounds(c, seed, WideProduct());
  return {{uint32_t(c[0]), uint32_t(c[1]), uint32_t(c[2]), uint32_t(c[3])}};
}

// (k + 1/2) / 2^32, rounded once: the halves of k are exact in float.
HOS_HD float unit_float(uint32_t k) {
  const float high = float(int32_t(k >> 16));
  const float low = float(int32_t(k & 0xFFFFu)) + 0.5f;
  return mul_add(high, 0x1p-16f, low * 0x1p-32f);
}

HOS_HD double unit_double(uint32_t k) { return (double(k) + 0.5) * 0x1p-32; }

// -log of (k + 1/2) / 2^32. The distance of u to 1 is taken from the complement of k, so that radii
// near 0 keep their relative accuracy.
HOS_HD float minus_log_unit(uint32_t k) {
  const float u = unit_float(k);
  const uint32_t bits = as_bits(u) - 0x3F3504F3u;  // exponent and fraction relative to sqrt(1/2)
  const int32_t exponent = int32_t(bits) >> 23;
  const float m = as_float((bits & 0x007FFFFFu) + 0x3F3504F3u);
  const float f = exponent == 0 ? -unit_float(~k) : m - 1.0f;
  float p = mul_add(6.757579449e-2f, f, -1.169433662e-1f);
  p = mul_add(p, f, 1.189350921e-1f);
  p = mul_add(p, f, -1.240308329e-1f);
  p = mul_add(p, f, 1.421855478e-1f);
  p = mul_add(p, f, -1.66680904e-1f);
  p = mul_add(p, f, 2.000216705e-1f);
  p = mul_add(p, f, -2.500000871e-1f);
  p = mul_add(p, f, 3.333331197e-1f);
  const float square = f * f;
  const float tail = mul_add(p * f, square, -0.5f * square);
  const float n = float(exponent);
  return -mul_add(n, 0.693359375f, f + mul_add(n, -2.12194440e-4f, tail));
}

// cos and sin of 2 pi (k + 1/2) / 2^32: the quadrant comes off in integers, exactly.
HOS_HD Pair<float> cos_sin_turn(uint32_t k) {
  const uint32_t shifted = k + 0x20000000u;
  const int32_t quadrant = int32_t(shifted >> 30);
  const float t = (float(int32_t(shifted & 0x3FFFFFFFu) - 0x20000000) + 0.5f) * 1.462918079e-9f;
  const float u = t * t;
  float s = mul_add(-1.951665581e-4f, u, 8.332173543e-3f);
  s = mul_add(s, u, -1.666665487e-1f);
  s = mul_add(s * u, t, t);
  float c = mul_add(2.44377301e-5f, u, -1.388736145e-3f);
  c = mul_add(c, u, 4.166664675e-2f);
  c = mul_add(c * u, u, mul_add(u, -0.5f, 1.0f));
  const bool swap = (quadrant & 1) != 0;
  const float cosine = swap ? s : c;
  const float sine = swap ? c : s;
  const uint32_t flip_cosine = uint32_t((quadrant + 1) & 2) << 30;
  const uint32_t flip_sine = uint32_t(quadrant & 2) << 30;
  return {as_float(as_bits(cosine) ^ flip_cosine), as_float(as_bits(sine) ^ flip_sine)};
}

// Two standard normals from two words (Box-Muller).
HOS_HD Pair<float> box_muller(uint32_t k0, uint32_t k1, float) {
  const float radius = square_root(2.0f * minus_log_unit(k0));
  const Pair<float> turn = cos_sin_turn(k1);
  return {radius * turn.a, radius * turn.b};
}

HOS_HD Pair<double> box_muller(uint32_t k0, uint32_t k1, double) {
  const double radius = sqrt(-2.0 * log(unit_double(k0)));
  const double angle = unit_double(k1) * 6.283185307179586;
  return {radius * cos(angle), radius * sin(angle)};
}

HOS_HD float to_unit(uint32_t k, float) { return unit_float(k); }
HOS_HD double to_unit(uint32_t k, double) { return unit_double(k); }

}  // namespace HOS_ISA
}  // namespace hos
