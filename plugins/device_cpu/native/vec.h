// Sixteen floats at a time, whatever the processor's vectors are: one of 16, two of 8 or four of 4.
//
// The kernels are written once on `Vec` and compiled once for each instruction set, with OPSIN_ISA naming the
// namespace. Every function works lane by lane in the same order on all of them; only whether a multiplication
// and an addition are rounded together differs (they are where the processor has fused multiply-add).
#pragma once

#include <stdint.h>
#include <string.h>

#include "dispatch.h"

#if OPSIN_X86
#pragma GCC diagnostic push  // GCC 12's own header: results that are overwritten begin undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif OPSIN_ARM
#include <arm_neon.h>
#endif

#define OPSIN_UNROLL _Pragma("GCC unroll 16")
#define OPSIN_ALWAYS_INLINE static inline __attribute__((always_inline))

namespace opsin::OPSIN_ISA {

constexpr int kLanes = 16;

struct bfloat16 {
  uint16_t bits;
};

// ---- What differs: 512, 256 and 128 bits ------------------------------------------------------------------

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
OPSIN_ALWAYS_INLINE Vec splat(float x) { return {_mm512_set1_ps(x)}; }
OPSIN_ALWAYS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
OPSIN_ALWAYS_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
OPSIN_ALWAYS_INLINE Vec load(const bfloat16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
OPSIN_ALWAYS_INLINE void store(bfloat16* p, Vec x) {  // to nearest, ties to even; NaN stays NaN
  __m512i bits = _mm512_castps_si512(x.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
OPSIN_ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
OPSIN_ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
OPSIN_ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
OPSIN_ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
OPSIN_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
OPSIN_ALWAYS_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// The second where either is NaN.
OPSIN_ALWAYS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
OPSIN_ALWAYS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
OPSIN_ALWAYS_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
OPSIN_ALWAYS_INLINE Vec copysign(Vec a, Vec sign) {
  __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a.v),
                                              _mm512_and_si512(_mm512_castps_si512(sign.v), bit)))};
}
OPSIN_ALWAYS_INLINE Vec nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n.
OPSIN_ALWAYS_INLINE Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// The first `count` lanes of a, and `fill` in the others.
OPSIN_ALWAYS_INLINE Vec first(Vec a, int count, float fill) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << count) - 1u), a.v)};
}

#elif defined(__AVX2__)

struct Vec {
  __m256 a, b;
};
OPSIN_ALWAYS_INLINE Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OPSIN_ALWAYS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OPSIN_ALWAYS_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
OPSIN_ALWAYS_INLINE __m256 widened(const bfloat16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
OPSIN_ALWAYS_INLINE Vec load(const bfloat16* p) { return {widened(p), widened(p + 8)}; }
OPSIN_ALWAYS_INLINE void store_narrowed(bfloat16* p, __m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
  rounded = _mm256_srli_epi32(rounded, 16);
  __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
OPSIN_ALWAYS_INLINE void store(bfloat16* p, Vec x) {
  store_narrowed(p, x.a);
  store_narrowed(p + 8, x.b);
}
OPSIN_ALWAYS_INLINE Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
OPSIN_ALWAYS_INLINE Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
OPSIN_ALWAYS_INLINE Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
OPSIN_ALWAYS_INLINE Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
OPSIN_ALWAYS_INLINE Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
OPSIN_ALWAYS_INLINE Vec fnma(Vec x, Vec y, Vec z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
OPSIN_ALWAYS_INLINE Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
OPSIN_ALWAYS_INLINE Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
OPSIN_ALWAYS_INLINE Vec abs(Vec x) {
  __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, x.a), _mm256_andnot_ps(bit, x.b)};
}
OPSIN_ALWAYS_INLINE Vec copysign(Vec x, Vec sign) {
  __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(x.a, _mm256_and_ps(bit, sign.a)), _mm256_or_ps(x.b, _mm256_and_ps(bit, sign.b))};
}
OPSIN_ALWAYS_INLINE Vec nearest(Vec x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
OPSIN_ALWAYS_INLINE __m256 power_of_two(__m256 n) {
  __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(whole, 23));
}
OPSIN_ALWAYS_INLINE Vec scale_by_power(Vec x, Vec n) {  // -126 <= n <= 127
  return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
OPSIN_ALWAYS_INLINE Vec first(Vec x, int count, float fill) {
  __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), limit = _mm256_set1_epi32(count);
  __m256 keep_a = _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, lanes));
  __m256 keep_b =
      _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, _mm256_add_epi32(lanes, _mm256_set1_epi32(8))));
  __m256 other = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(other, x.a, keep_a), _mm256_blendv_ps(other, x.b, keep_b)};
}

#else  // four lanes in the compiler's own vectors: SSE2, NEON, whatever there is

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));
typedef uint32_t uint4 __attribute__((vector_size(16)));

struct Vec {
  float4 v[4];
};
#define OPSIN_EACH(expression)       \
  Vec out;                           \
  OPSIN_UNROLL for (int i = 0; i < 4; i++) out.v[i] = (expression); \
  return out

OPSIN_ALWAYS_INLINE Vec splat(float x) { OPSIN_EACH((float4{x, x, x, x})); }
OPSIN_ALWAYS_INLINE float4 load4(const float* p) {
  float4 x;
  memcpy(&x, p, sizeof x);
  return x;
}
OPSIN_ALWAYS_INLINE Vec load(const float* p) { OPSIN_EACH(load4(p + 4 * i)); }
OPSIN_ALWAYS_INLINE void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }
OPSIN_ALWAYS_INLINE float4 widened(const bfloat16* p) {
  return (float4)(uint4{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
OPSIN_ALWAYS_INLINE Vec load(const bfloat16* p) { OPSIN_EACH(widened(p + 4 * i)); }
OPSIN_ALWAYS_INLINE void store(bfloat16* p, Vec x) {
  for (int i = 0; i < 4; i++) {
    uint4 bits = (uint4)x.v[i];
    uint4 rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
    uint4 nan = (uint4)(x.v[i] != x.v[i]);
    rounded = (nan & 0x7fc0u) | (~nan & rounded);
    for (int j = 0; j < 4; j++) p[4 * i + j].bits = static_cast<uint16_t>(rounded[j]);
  }
}
OPSIN_ALWAYS_INLINE Vec operator+(Vec a, Vec b) { OPSIN_EACH(a.v[i] + b.v[i]); }
OPSIN_ALWAYS_INLINE Vec operator-(Vec a, Vec b) { OPSIN_EACH(a.v[i] - b.v[i]); }
OPSIN_ALWAYS_INLINE Vec operator*(Vec a, Vec b) { OPSIN_EACH(a.v[i] * b.v[i]); }
OPSIN_ALWAYS_INLINE Vec operator/(Vec a, Vec b) { OPSIN_EACH(a.v[i] / b.v[i]); }
#if OPSIN_ARM
OPSIN_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) {
  OPSIN_EACH((float4)vfmaq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]));
}
OPSIN_ALWAYS_INLINE Vec fnma(Vec a, Vec b, Vec c) {
  OPSIN_EACH((float4)vfmsq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]));
}
#else
OPSIN_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { OPSIN_EACH(a.v[i] * b.v[i] + c.v[i]); }
OPSIN_ALWAYS_INLINE Vec fnma(Vec a, Vec b, Vec c) { OPSIN_EACH(c.v[i] - a.v[i] * b.v[i]); }
#endif
OPSIN_ALWAYS_INLINE float4 choose(int4 condition, float4 yes, float4 no) {
  return (float4)((condition & (int4)yes) | (~condition & (int4)no));
}
OPSIN_ALWAYS_INLINE Vec max(Vec a, Vec b) { OPSIN_EACH(choose(a.v[i] > b.v[i], a.v[i], b.v[i])); }
OPSIN_ALWAYS_INLINE Vec min(Vec a, Vec b) { OPSIN_EACH(choose(a.v[i] < b.v[i], a.v[i], b.v[i])); }
OPSIN_ALWAYS_INLINE Vec abs(Vec a) { OPSIN_EACH((float4)((int4)a.v[i] & 0x7fffffff)); }
OPSIN_ALWAYS_INLINE Vec copysign(Vec a, Vec sign) {
  OPSIN_EACH((float4)((int4)a.v[i] | ((int4)sign.v[i] & INT32_MIN)));
}
// To the nearest whole number by adding and taking away 1.5 * 2^23, for |a| < 2^22.
OPSIN_ALWAYS_INLINE float4 nearest4(float4 a) {
  const float4 big = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
  float4 shifted = a + big;
  return shifted - big;
}
OPSIN_ALWAYS_INLINE Vec nearest(Vec a) { OPSIN_EACH(nearest4(a.v[i])); }
OPSIN_ALWAYS_INLINE float4 power_of_two(float4 n) {
  return (float4)((__builtin_convertvector(n, int4) + 127) << 23);
}
OPSIN_ALWAYS_INLINE Vec scale_by_power(Vec a, Vec n) { OPSIN_EACH(a.v[i] * power_of_two(n.v[i])); }
OPSIN_ALWAYS_INLINE Vec first(Vec a, int count, float fill) {
  const float4 other = {fill, fill, fill, fill};
  OPSIN_EACH(choose((int4{4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3} < count), a.v[i], other));
}
#undef OPSIN_EACH

#endif

// ---- What follows from it ---------------------------------------------------------------------------------

OPSIN_ALWAYS_INLINE Vec zero() { return splat(0.0f); }

// Lanes are added in pairs a half apart, so that the order is the same everywhere.
OPSIN_ALWAYS_INLINE float sum(Vec x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}
OPSIN_ALWAYS_INLINE float largest(Vec x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// `count` < 16 elements; the other lanes are 0, and nothing behind them is read or written.
template <class T>
OPSIN_ALWAYS_INLINE Vec load_part(const T* p, int count) {
  T lanes[kLanes];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, p, sizeof(T) * count);
  return load(lanes);
}
template <class T>
OPSIN_ALWAYS_INLINE void store_part(T* p, Vec x, int count) {
  T lanes[kLanes];
  store(lanes, x);
  memcpy(p, lanes, sizeof(T) * count);
}

// e^x. Relative error below 2e-7; NaN stays NaN; below -87 it may be 0 or any number under 2e-38.
// e^x = 2^n e^r with n whole and |r| <= ln(2) / 2; e^r = 1 + r + r^2 p(r), p fitted at Chebyshev's points.
OPSIN_ALWAYS_INLINE Vec exp(Vec x) {
  x = min(splat(88.0f), max(splat(-87.0f), x));
  Vec n = nearest(x * splat(1.44269504f));
  Vec r = fnma(n, splat(0.693359375f), x);  // ln 2 in two parts: the first has few bits, n times it is exact
  r = fnma(n, splat(-2.12194440e-4f), r);
  Vec p = splat(1.393365249e-3f);
  p = fma(p, r, splat(8.363181545e-3f));
  p = fma(p, r, splat(4.166646490e-2f));
  p = fma(p, r, splat(1.666657697e-1f));
  p = fma(p, r, splat(5.000000013e-1f));
  return scale_by_power(fma(p, r * r, r) + splat(1.0f), n);
}

}  // namespace opsin::OPSIN_ISA
