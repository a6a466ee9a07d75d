// How each kind of stored weight becomes float32 vectors, or bytes for integer products.
#pragma once

#include "gemm/gemm.h"
#include "simd.h"

namespace opsin::OPSIN_ISA {

constexpr int kVectors = kPanel / kLanes;  // of one panel's outputs
constexpr int kHalf = kVectors / 2;

typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

OPSIN_INLINE vf from_bfloat16(vh v) { return (vf)(__builtin_convertvector(v, vu) << 16); }

OPSIN_INLINE vf from_float16(vh v) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)v);
#elif OPSIN_ARM
  return (vf)vcvt_f32_f16((float16x4_t)v);
#else
  const vu wide = __builtin_convertvector(v, vu);
  const vf scaled = (vf)((wide & 0x7fffu) << 13) * splat(5.192296858534828e33f);  // 2**112; also for subnormals
  const vu special = (vu)((wide & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (vf)((vu)scaled | special | (wide & 0x8000u) << 16);
#endif
}

OPSIN_INLINE vf load_scale(const void* scales, ScaleKind kind, int64_t at) {
  switch (kind) {
    case kScaleBfloat16:
      return from_bfloat16(load<vh>(static_cast<const uint16_t*>(scales) + at));
    case kScaleFloat16:
      return from_float16(load<vh>(static_cast<const uint16_t*>(scales) + at));
    default:
      return load<vf>(static_cast<const float*>(scales) + at);
  }
}

// Each decoder reads `kStep` inputs at a time into `Words` and gives the weights of one of them, `values`.

struct Bfloat16 {
  static constexpr int kStep = 1, kDirectRows = 14;
  struct Words {
    vu w[kHalf];
  };
  explicit Bfloat16(const Weight&) {}
  OPSIN_INLINE const uint8_t* at(const uint8_t* panel, int64_t k) { return panel + k * 64; }
  OPSIN_INLINE Words words(const uint8_t* from) {
    Words out;
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) out.w[i] = load<vu>(from + i * sizeof(vu));
    return out;
  }
  inline __attribute__((always_inline)) void values(const Words& in, int, vf* out) const {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      out[i] = (vf)(in.w[i] << 16);
      out[kHalf + i] = (vf)(in.w[i] & 0xffff0000u);
    }
  }
};

struct Float16 {
  static constexpr int kStep = 1, kDirectRows = 14;
  struct Words {
    vh w[kVectors];
  };
  explicit Float16(const Weight&) {}
  OPSIN_INLINE const uint8_t* at(const uint8_t* panel, int64_t k) { return panel + k * 64; }
  OPSIN_INLINE Words words(const uint8_t* from) {
    Words out;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) out.w[i] = load<vh>(from + i * sizeof(vh));
    return out;
  }
  inline __attribute__((always_inline)) void values(const Words& in, int, vf* out) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) out[i] = from_float16(in.w[i]);
  }
};

struct Int8 {
  static constexpr int kStep = 4, kDirectRows = 4;
  struct Words {
    vi w[kVectors];
  };
  explicit Int8(const Weight&) {}
  OPSIN_INLINE const uint8_t* at(const uint8_t* panel, int64_t k) { return panel + k / 4 * 128; }
  OPSIN_INLINE Words words(const uint8_t* from) {
    Words out;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      out.w[i] = load<vi>(from + i * sizeof(vi)) ^ static_cast<int32_t>(0x80808080);  // signed again
    }
    return out;
  }
  inline __attribute__((always_inline)) void values(const Words& in, int input, vf* out) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) out[i] = to_float(in.w[i] << (24 - 8 * input) >> 24);
  }
};

// int4 and table4.
struct Int4 {
  static constexpr int kStep = 4, kDirectRows = 4;
  struct Words {
    vu w[kHalf];
  };
  OPSIN_INLINE const uint8_t* at(const uint8_t* panel, int64_t k) { return panel + k / 4 * 64; }
  OPSIN_INLINE Words words(const uint8_t* from) {
    Words out;
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) out.w[i] = load<vu>(from + i * sizeof(vu));
    return out;
  }
#if defined(__AVX512F__)
  __m512 table;
  explicit Int4(const Weight& weight) : table(_mm512_loadu_ps(weight.table)) {}
  inline __attribute__((always_inline)) void values(const Words& in, int input, vf* out) const {
    // The permutation looks at the low four bits of each index only.
    out[0] = (vf)_mm512_permutexvar_ps((__m512i)(in.w[0] >> (8 * input)), table);
    out[1] = (vf)_mm512_permutexvar_ps((__m512i)(in.w[0] >> (8 * input + 4)), table);
  }
#else
  bool plain;
  const float* table;
  explicit Int4(const Weight& weight) : plain(weight.kind == kInt4), table(weight.table) {}
  inline __attribute__((always_inline)) vf value(vu index) const {
    if (plain) return to_float((vi)index - 8);
    vf out;
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes; ++lane) out[lane] = table[index[lane]];
    return out;
  }
  inline __attribute__((always_inline)) void values(const Words& in, int input, vf* out) const {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      out[i] = value(in.w[i] >> (8 * input) & 15u);
      out[kHalf + i] = value(in.w[i] >> (8 * input + 4) & 15u);
    }
  }
#endif
};

// A panel's block, decoded: [inputs][kPanel] float32.
struct Decoded {
  static constexpr int kStep = 1;
  struct Words {
    vf w[kVectors];
  };
  OPSIN_INLINE Words words(const uint8_t* from) {
    Words out;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) out.w[i] = load<vf>(from + i * sizeof(vf));
    return out;
  }
  inline __attribute__((always_inline)) void values(const Words& in, int, vf* out) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) out[i] = in.w[i];
  }
};

}  // namespace opsin::OPSIN_ISA
