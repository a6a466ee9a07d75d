// Integer products: sums of four unsigned bytes (weights) times four signed ones (activations), in int32.
#pragma once

#include "gemm/gemm_decode.h"

namespace opsin::OPSIN_ISA {

#if defined(__AVX512VNNI__)

constexpr int kCodeBytes = 4;  // of four rounded activations
constexpr bool kSignedWeights = false;
struct Dot {
  __m512i w;
  explicit inline __attribute__((always_inline)) Dot(vu v) : w((__m512i)v) {}
  inline __attribute__((always_inline)) vi add(vi sum, const int8_t* x) const {
    int32_t four;
    memcpy(&four, x, 4);
    const __m512i all = _mm512_set1_epi32(four);
    // GCC 12 moves the sums to memory around the intrinsic; not around this.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(all));
    return sum;
  }
};

#elif defined(__AVX2__)

// pmaddwd: pairs of 16-bit products, which cannot overflow. Activations are stored as 16-bit (x0, x2), (x1, x3).
constexpr int kCodeBytes = 8;
constexpr bool kSignedWeights = false;
struct Dot {
#if defined(__AVX512BW__)
  __m512i even, odd;
  explicit inline __attribute__((always_inline)) Dot(vu v)
      : even((__m512i)(v & 0x00ff00ffu)), odd(_mm512_srli_epi16((__m512i)v, 8)) {}
  inline __attribute__((always_inline)) vi add(vi sum, const int8_t* x) const {
    int32_t pairs[2];
    memcpy(pairs, x, 8);
    sum += (vi)_mm512_madd_epi16(even, _mm512_set1_epi32(pairs[0]));
    return sum + (vi)_mm512_madd_epi16(odd, _mm512_set1_epi32(pairs[1]));
  }
#else
  __m256i even, odd;
  explicit inline __attribute__((always_inline)) Dot(vu v)
      : even((__m256i)(v & 0x00ff00ffu)), odd(_mm256_srli_epi16((__m256i)v, 8)) {}
  inline __attribute__((always_inline)) vi add(vi sum, const int8_t* x) const {
    int32_t pairs[2];
    memcpy(pairs, x, 8);
    sum += (vi)_mm256_madd_epi16(even, _mm256_set1_epi32(pairs[0]));
    return sum + (vi)_mm256_madd_epi16(odd, _mm256_set1_epi32(pairs[1]));
  }
#endif
};

#elif defined(__ARM_FEATURE_DOTPROD)

constexpr int kCodeBytes = 4;
constexpr bool kSignedWeights = true;  // sdot takes two signed operands: codes come as code - 128
struct Dot {
  int8x16_t w;
  explicit inline __attribute__((always_inline)) Dot(vu v) : w((int8x16_t)v) {}
  inline __attribute__((always_inline)) vi add(vi sum, const int8_t* x) const {
    int32_t four;
    memcpy(&four, x, 4);
    return (vi)vdotq_s32((int32x4_t)sum, w, vreinterpretq_s8_s32(vdupq_n_s32(four)));
  }
};

#else

constexpr int kCodeBytes = 4;
constexpr bool kSignedWeights = false;
struct Dot {
  vu w;
  explicit inline __attribute__((always_inline)) Dot(vu v) : w(v) {}
  inline __attribute__((always_inline)) vi add(vi sum, const int8_t* x) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum += (vi)(w >> (8 * i) & 255u) * splat(int32_t{x[i]});
    return sum;
  }
};

#endif

// Words of four inputs for integer products; kMiddle is what a weight of zero is stored as.
struct Bytes8 {
  static constexpr int32_t kMiddle = kSignedWeights ? 0 : 128;
  OPSIN_INLINE const uint8_t* at(const uint8_t* panel, int64_t step) { return panel + step * 128; }
  OPSIN_INLINE void words(const uint8_t* from, vu* out) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      out[i] = load<vu>(from + i * sizeof(vu));
      if (kSignedWeights) out[i] ^= 0x80808080u;
    }
  }
};

struct Bytes4 {
  static constexpr int32_t kMiddle = 8;
  OPSIN_INLINE const uint8_t* at(const uint8_t* panel, int64_t step) { return panel + step * 64; }
  OPSIN_INLINE void words(const uint8_t* from, vu* out) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      const vu both = load<vu>(from + i * sizeof(vu));
      out[i] = both & 0x0f0f0f0fu;
      out[kHalf + i] = both >> 4 & 0x0f0f0f0fu;
    }
  }
};

}  // namespace opsin::OPSIN_ISA
