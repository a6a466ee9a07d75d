#include "measure.h"
#include "simd.h"

namespace opsin::OPSIN_ISA {
namespace {

int32_t read(const void* from, int64_t bytes) {
  const char* p = static_cast<const char*>(from);
  constexpr int kStep = 256, kEach = sizeof(vi), kCount = kStep / kEach;
  vi sum[kCount] = {};
  for (int64_t at = 0; at + kStep <= bytes; at += kStep) {
    for (int line = 0; line < kStep; line += 64) __builtin_prefetch(p + at + 4096 + line);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) sum[i] ^= load<vi>(p + at + i * kEach);
  }
  int32_t all = 0;
  for (int i = 0; i < kCount; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) all ^= sum[i][lane];
  }
  return all;
}

int64_t multiply(int64_t rounds) {
  constexpr int kChains = 12;
  vf sums[kChains];
  const vf factor = splat(0.999f), addend = splat(0.001f);
  for (int i = 0; i < kChains; ++i) sums[i] = splat(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = fma(sums[i], factor, addend);
#if OPSIN_X86 && defined(__AVX2__)
      asm volatile("" : "+v"(sums[i]));  // keeps the compiler from doing the arithmetic itself
#else
      asm volatile("" ::: "memory");
#endif
    }
  }
  float all = 0;
  for (int i = 0; i < kChains; ++i) all += sums[i][0];
  return all == 0.5f ? 0 : rounds * kChains * kLanes * 2;
}

}  // namespace

extern const MeasureTable measure_table = {read, multiply};

}  // namespace opsin::OPSIN_ISA
