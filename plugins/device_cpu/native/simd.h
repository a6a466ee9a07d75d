// Vectors of one instruction set, for *_kernels.cc: GCC's vector extensions, and intrinsics where those fall short.
#pragma once

#include <stdint.h>
#include <string.h>

#include "dispatch.h"

#if OPSIN_X86
#include <immintrin.h>
#elif OPSIN_ARM
#include <arm_neon.h>
#endif

#define OPSIN_INLINE static inline __attribute__((always_inline))

namespace opsin::OPSIN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));

template <class V, class T>
OPSIN_INLINE V load(const T* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
OPSIN_INLINE void store(T* to, V v) {
  memcpy(to, &v, sizeof(V));
}

OPSIN_INLINE vf splat(float x) { return x - vf{}; }
OPSIN_INLINE vi splat(int32_t x) { return x + vi{}; }

// a * b + c with one rounding where the processor has such an instruction. Spelt out: left to the compiler
// (-ffp-contract=fast), it differs between kernels that must agree bit for bit.
OPSIN_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif OPSIN_ARM
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

OPSIN_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

template <class T>
constexpr OPSIN_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}

}  // namespace opsin::OPSIN_ISA
