// Activation functions on vectors. Errors are a few units in the last place of float32.
#pragma once

#include "gemm/gemm.h"
#include "simd.h"

namespace opsin::OPSIN_ISA {

OPSIN_INLINE vf select(vi mask, vf yes, vf no) {
  return (vf)(((vi)yes & mask) | ((vi)no & ~mask));
}

// e**x by argument reduction to [-ln 2 / 2, ln 2 / 2] and a Taylor polynomial of degree 7 (its next term is below
// 6e-9). Below -87 the result is that of -87, about 1.6e-38; above 88 that of 88. NaN stays NaN.
OPSIN_INLINE vf exp_of(vf x) {
  const vf low = splat(-87.0f), high = splat(88.0f);
  x = select(x < low, low, x);
  x = select(x > high, high, x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2**23: rounds to a whole number
  const vf whole = fma(x, splat(1.44269504f), magic);
  const vi n = (vi)whole - (vi)magic;
  const vf count = whole - magic;
  vf r = fma(count, splat(-0.693359375f), x);
  r = fma(count, splat(2.12194440e-4f), r);
  vf p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return p * (vf)((n + splat(int32_t{127})) << 23);
}

OPSIN_INLINE vf sigmoid_times(vf x, float factor) { return x / (splat(1.0f) + exp_of(x * splat(-factor))); }

// x * (1 + erf(x / sqrt 2)) / 2, with erfc from Abramowitz & Stegun 7.1.26 (absolute error 1.5e-7).
OPSIN_INLINE vf gelu(vf x) {
  const vf z = (vf)((vi)x & splat(int32_t{0x7fffffff})) * splat(0.70710678f);
  const vf t = splat(1.0f) / fma(z, splat(0.3275911f), splat(1.0f));
  vf p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const vf tail = p * t * exp_of(-z * z) * splat(0.5f);  // half of erfc(z)
  return x * select(x < splat(0.0f), tail, splat(1.0f) - tail);
}

// x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))) / 2 = x * sigmoid(twice that argument).
OPSIN_INLINE vf gelu_tanh(vf x) {
  const vf u = x * fma(x * x, splat(0.044715f * 1.59576912f), splat(1.59576912f));
  return x / (splat(1.0f) + exp_of(-u));
}

OPSIN_INLINE vf activate(vf x, Act act) {
  switch (act) {
    case kSilu:
      return sigmoid_times(x, 1.0f);
    case kQuickGelu:
      return sigmoid_times(x, 1.702f);
    case kGelu:
      return gelu(x);
    case kGeluTanh:
      return gelu_tanh(x);
    default:
      return x;
  }
}

}  // namespace opsin::OPSIN_ISA
