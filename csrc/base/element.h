// Element types: storage in float16/bfloat16/float32/float64, arithmetic in float or double.
#pragma once

#include "base/common.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace hos {
inline namespace HOS_ISA {

#if defined(__CUDACC__)
using half_t = __half;
using bfloat_t = __nv_bfloat16;
HOS_HD float widen(__half x) { return __half2float(x); }
HOS_HD float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
HOS_HD void narrow(float x, __half* out) { *out = __float2half_rn(x); }
HOS_HD void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
#else
struct half_t {
  _Float16 value;
};
struct bfloat_t {
  uint16_t bits;
};
HOS_HD float widen(half_t x) { return float(x.value); }
HOS_HD float widen(bfloat_t x) { return as_float(uint32_t(x.bits) << 16); }
HOS_HD void narrow(float x, half_t* out) { out->value = _Float16(x); }
// Round to nearest even; a NaN stays a quiet NaN.
HOS_HD void narrow(float x, bfloat_t* out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(x != x ? 0x7FC0u : rounded);
}
#endif

HOS_HD float widen(float x) { return x; }
HOS_HD double widen(double x) { return x; }
HOS_HD void narrow(float x, float* out) { *out = x; }
HOS_HD void narrow(double x, double* out) { *out = x; }

template <class T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};

}  // namespace HOS_ISA
}  // namespace hos
