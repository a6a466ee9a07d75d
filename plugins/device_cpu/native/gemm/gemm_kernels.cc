#include "gemm/gemm_dot.h"
#include "gemm/vmath.h"

namespace opsin::OPSIN_ISA {
namespace {

// Rows whose sums fit into the registers beside a panel's weights.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif OPSIN_ARM || defined(__AVX2__)
constexpr int kTileRows = 3;
#else
constexpr int kTileRows = 1;
#endif
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
constexpr int kDotRows = 12;
#else
constexpr int kDotRows = kTileRows;
#endif

// Where a sum that starts at input k ends: at the end of its group or block.
OPSIN_INLINE int64_t sum_end(const Weight& w, int64_t k) {
  const int64_t block = min_of((k / kBlock + 1) * kBlock, w.k);
  return w.group >= w.k ? block : min_of((k / w.group + 1) * w.group, block);
}

// Adds bias and applies the activation, for a tile of results that is still in the cache.
__attribute__((noinline)) void finish(float* y, int64_t stride, int64_t rows, const float* bias, Act act) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int c = 0; c < kVectors; ++c) {
      vf v = load<vf>(y + m * stride + c * kLanes);
      if (bias != nullptr) v += load<vf>(bias + c * kLanes);
      store(y + m * stride + c * kLanes, activate(v, act));
    }
  }
}

// One panel's scales and zero points for one group.
struct Group {
  vf scale[kVectors];
  vf zero[kVectors] = {};
};

OPSIN_INLINE void load_group(const Weight& w, int64_t panel, int64_t group, Group* out) {
  const int64_t at = (panel * w.groups + group) * kPanel;
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) {
    out->scale[c] = load_scale(w.scales, w.scale_kind, at + c * kLanes);
    if (w.zeros != nullptr) out->zero[c] = from_bfloat16(load<vh>(w.zeros + at + c * kLanes));
  }
}

// ---- Activations as they are -----------------------------------------------------------------------------------

// y[m] += scale * (x[m, k .. end) @ panel - zero * sum of those x), or = where `first`.
template <class D, int M>
__attribute__((noinline)) void tile(const D& decoder, const Weight& w, int64_t panel, const uint8_t* from,
                                    int64_t k, int64_t end, const Rows& rows, int64_t row, float* y,
                                    int64_t stride) {
  constexpr int kAhead = 2048;  // bytes; the processor's own prefetching leaves gaps at the ends of pages
  vf sum[M][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[m][c] = vf{};
  }
  const float* x = rows.x + row * w.k;
  const int64_t pitch = w.k;
  constexpr int64_t kBytes = sizeof(typename D::Words);
  int64_t at = k;
  for (; at + D::kStep <= end; at += D::kStep, from += kBytes) {
    if (M <= 4) {
      for (int64_t line = 0; line < kBytes; line += 64) __builtin_prefetch(from + kAhead + line);
    }
    const typename D::Words words = decoder.words(from);
#pragma GCC unroll 4
    for (int i = 0; i < D::kStep; ++i) {
      vf v[kVectors];
      decoder.values(words, i, v);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const vf b = splat(x[m * pitch + at + i]);
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) sum[m][c] = fma(b, v[c], sum[m][c]);
      }
    }
  }
  if (D::kStep > 1 && at < end) {
    const typename D::Words words = decoder.words(from);
    for (int i = 0; at + i < end; ++i) {
      vf v[kVectors];
      switch (i) {  // shifts by constants
        case 0:
          decoder.values(words, 0, v);
          break;
        case 1:
          decoder.values(words, 1, v);
          break;
        default:
          decoder.values(words, 2, v);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) sum[m][c] = fma(splat(x[m * pitch + at + i]), v[c], sum[m][c]);
      }
    }
  }
  const bool first = k == 0;
  if (w.scale_kind == kNoScales) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) {
        float* to = y + m * stride + c * kLanes;
        store(to, first ? sum[m][c] : load<vf>(to) + sum[m][c]);
      }
    }
    return;
  }
  Group group;
  const int64_t index = w.groups == 1 ? 0 : k / w.group;
  load_group(w, panel, index, &group);
  // The zero point counts once per group: with the sum that ends it.
  const bool zeros = w.zeros != nullptr && (end == w.k || end % w.group == 0);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const vf total = splat(zeros ? -rows.sums[(row + m) * w.groups + index] : 0.0f);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      float* to = y + m * stride + c * kLanes;
      const vf centred = zeros ? fma(total, group.zero[c], sum[m][c]) : sum[m][c];
      store(to, first ? group.scale[c] * centred : fma(group.scale[c], centred, load<vf>(to)));
    }
  }
}

template <class D, int M>
OPSIN_INLINE void tiles(int count, const D& decoder, const Weight& w, int64_t panel, const uint8_t* from, int64_t k,
                        int64_t end, const Rows& rows, int64_t row, float* y, int64_t stride) {
  if (count == M) return tile<D, M>(decoder, w, panel, from, k, end, rows, row, y, stride);
  if constexpr (M > 1) tiles<D, M - 1>(count, decoder, w, panel, from, k, end, rows, row, y, stride);
}

template <class D>
__attribute__((noinline)) void decode(const D& decoder, const uint8_t* from, int64_t count, float* to) {
  for (int64_t k = 0; k < count; k += D::kStep, from += sizeof(typename D::Words)) {
    const typename D::Words words = decoder.words(from);
#pragma GCC unroll 4
    for (int i = 0; i < D::kStep; ++i) {
      vf v[kVectors];
      decoder.values(words, i, v);
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) store(to + (k + i) * kPanel + c * kLanes, v[c]);
    }
  }
}

// Where a panel's results go: to y, or beside it where the panel is only partly there.
struct Target {
  float* y;
  int64_t stride;
};

OPSIN_INLINE Target target(const Task& task, int64_t panel) {
  const Weight& w = *task.weight;
  if ((panel + 1) * kPanel <= w.n) return {task.y + task.first_row * w.n + panel * kPanel, w.n};
  return {task.scratch + int64_t{kTaskPanels} * kBlock * kPanel, kPanel};
}

OPSIN_INLINE void complete(const Task& task, int64_t panel, int64_t row, int64_t rows, float* y, int64_t stride) {
  const Weight& w = *task.weight;
  float bias[kPanel] = {};
  const int64_t left = w.n - panel * kPanel;
  const float* added = nullptr;
  if (task.bias != nullptr) {
    added = task.bias + panel * kPanel;
    if (left < kPanel) {
      memcpy(bias, added, left * sizeof(float));
      added = bias;
    }
  }
  if (added != nullptr || task.act != kNoAct) finish(y, stride, rows, added, task.act);
  if (left < kPanel) {
    for (int64_t m = 0; m < rows; ++m) {
      memcpy(task.y + (row + m) * w.n + panel * kPanel, y + m * stride, left * sizeof(float));
    }
  }
}

template <class D>
void multiply_as(const Task& task) {
  const Weight& w = *task.weight;
  const D decoder(w);
  constexpr int kDirect = min_of(D::kDirectRows, kTileRows);
  const int64_t rows = task.end_row - task.first_row;
  if (rows <= kDirect) {
    for (int64_t panel = task.first_panel; panel < task.end_panel; ++panel) {
      const uint8_t* data = w.data + panel * w.panel_bytes;
      const Target to = target(task, panel);
      for (int64_t k = 0, end; k < w.k; k = end) {
        end = sum_end(w, k);
        tiles<D, kDirect>(static_cast<int>(rows), decoder, w, panel, decoder.at(data, k), k, end, task.rows,
                          task.first_row, to.y, to.stride);
      }
      complete(task, panel, task.first_row, rows, to.y, to.stride);
    }
    return;
  }
  const Decoded decoded{};
  for (int64_t first = 0; first < w.k; first += kBlock) {
    const int64_t last = min_of(first + kBlock, w.k);
    for (int64_t panel = task.first_panel; panel < task.end_panel; ++panel) {
      decode(decoder, decoder.at(w.data + panel * w.panel_bytes, first), last - first,
             task.scratch + (panel - task.first_panel) * kBlock * kPanel);
    }
    for (int64_t row = task.first_row; row < task.end_row; row += kTileRows) {
      const int count = static_cast<int>(min_of(int64_t{kTileRows}, task.end_row - row));
      for (int64_t panel = task.first_panel; panel < task.end_panel; ++panel) {
        const float* block = task.scratch + (panel - task.first_panel) * kBlock * kPanel;
        const Target to = target(task, panel);
        float* y = to.y + (row - task.first_row) * to.stride;
        for (int64_t k = first, end; k < last; k = end) {
          end = sum_end(w, k);
          tiles<Decoded, kTileRows>(count, decoded, w, panel,
                                    reinterpret_cast<const uint8_t*>(block + (k - first) * kPanel), k, end,
                                    task.rows, row, y, to.stride);
        }
        if (last == w.k) complete(task, panel, row, count, y, to.stride);
      }
    }
  }
}

void multiply(const Task& task) {
  switch (task.weight->kind) {
    case kBfloat16:
      return multiply_as<Bfloat16>(task);
    case kFloat16:
      return multiply_as<Float16>(task);
    case kInt8:
      return multiply_as<Int8>(task);
    case kInt4:
    case kTable4:
      return multiply_as<Int4>(task);
  }
}

void sum_row(const float* x, int64_t k, int64_t group, float* sums) {
  for (int64_t first = 0; first < k; first += group) {
    const int64_t end = min_of(first + group, k);
    vf lanes = vf{};
    int64_t at = first;
    for (; at + kLanes <= end; at += kLanes) lanes += load<vf>(x + at);
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    for (; at < end; ++at) sum += x[at];
    *sums++ = sum;
  }
}

// ---- Rounded activations ---------------------------------------------------------------------------------------

int64_t code_bytes(int64_t k) { return (k + 3) / 4 * kCodeBytes; }

void round_row(const float* x, int64_t k, int64_t group, int8_t* codes, float* scale, int32_t* sums, int8_t* bytes) {
  // As integers, the magnitudes of floats are in the same order, and infinity and NaN above all others.
  vi most = vi{};
  int32_t top = 0;
  int64_t at = 0;
  for (; at + kLanes <= k; at += kLanes) {
    const vi bits = load<vi>(x + at) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  for (int lane = 0; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
  for (; at < k; ++at) {
    int32_t bits;
    memcpy(&bits, x + at, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  float largest;
  memcpy(&largest, &top, 4);
  const bool finite = top < 0x7f800000;
  *scale = finite ? largest / 127 : __builtin_nanf("");
  // Numbers below 1e-35 would overflow the reciprocal: such a row is one of zeros.
  const float factor = finite && largest > 1e-35f ? 127 / largest : 0;
  const vf factors = splat(factor), magic = splat(12582912.0f);  // rounds to the nearest whole number
  typedef int8_t vb __attribute__((vector_size(kLanes)));
  int8_t* out = kCodeBytes == 4 ? codes : bytes;
  at = 0;
  if (factor == 0) {
    memset(out, 0, k);
    at = k;
  }
  for (; at + kLanes <= k; at += kLanes) {
    const vf product = load<vf>(x + at) * factors;
    const vi whole = (vi)(product + magic) - (vi)magic;
    store(out + at, __builtin_convertvector(whole, vb));
  }
  for (; at < k; ++at) {
    const float shifted = x[at] * factor + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    out[at] = static_cast<int8_t>(bits - 0x4b400000);
  }
  for (; at % 4 != 0; ++at) out[at] = 0;
  for (int64_t first = 0; first < k; first += group) {
    const int64_t end = min_of(first + group, k);
    int32_t sum = 0;
    for (int64_t i = first; i < end; ++i) sum += out[i];
    *sums++ = sum;
  }
  if (kCodeBytes == 8) {
    for (int64_t i = 0; i < k; i += 4) {
      const int16_t pairs[4] = {bytes[i], bytes[i + 2], bytes[i + 1], bytes[i + 3]};
      memcpy(codes + 2 * i, pairs, 8);
    }
  }
}

// y[m] += scale * (codes of row m's group @ panel's codes - zero * their sum), or = where `group` is the first; and
// times the row's scale where it is the last.
template <class B, int M>
__attribute__((noinline)) void dot_tile(const Weight& w, int64_t panel, int64_t index, const Rows& rows, int64_t row,
                                        float* y, int64_t stride) {
  constexpr int kAhead = 2048;
  const int64_t first = index * w.group, end = min_of(first + w.group, w.k);
  vi sum[M][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const vi start = splat(w.zeros == nullptr ? -B::kMiddle * rows.code_sums[(row + m) * w.groups + index] : 0);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[m][c] = start;
  }
  const int64_t steps = (end - first + 3) / 4;
  const uint8_t* from = B::at(w.data + panel * w.panel_bytes, first / 4);
  const int8_t* x = rows.codes + row * rows.stride + first / 4 * kCodeBytes;
  const int64_t bytes = B::at(nullptr, 1) - static_cast<const uint8_t*>(nullptr);
  for (int64_t step = 0; step < steps; ++step, from += bytes, x += kCodeBytes) {
    if (M <= 4) {
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + kAhead + line);
    }
    vu words[kVectors];
    B::words(from, words);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      const Dot dot(words[c]);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[m][c] = dot.add(sum[m][c], x + m * rows.stride);
    }
  }
  Group group;
  load_group(w, panel, index, &group);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const vf row_scale = splat(rows.scales[row + m]);
    const vf total =
        splat(w.zeros == nullptr ? 0.0f : -static_cast<float>(rows.code_sums[(row + m) * w.groups + index]));
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      vf v = to_float(sum[m][c]);
      if (w.zeros != nullptr) v = fma(total, group.zero[c] + splat(static_cast<float>(B::kMiddle)), v);
      float* to = y + m * stride + c * kLanes;
      v = index == 0 ? group.scale[c] * v : fma(group.scale[c], v, load<vf>(to));
      store(to, end == w.k ? v * row_scale : v);
    }
  }
}

template <class B, int M>
OPSIN_INLINE void dot_tiles(int count, const Weight& w, int64_t panel, int64_t index, const Rows& rows, int64_t row,
                            float* y, int64_t stride) {
  if (count == M) return dot_tile<B, M>(w, panel, index, rows, row, y, stride);
  if constexpr (M > 1) dot_tiles<B, M - 1>(count, w, panel, index, rows, row, y, stride);
}

template <class B>
void multiply_bytes(const Task& task) {
  const Weight& w = *task.weight;
  for (int64_t panel = task.first_panel; panel < task.end_panel; ++panel) {
    const Target to = target(task, panel);
    for (int64_t row = task.first_row; row < task.end_row; row += kDotRows) {
      const int count = static_cast<int>(min_of(int64_t{kDotRows}, task.end_row - row));
      float* y = to.y + (row - task.first_row) * to.stride;
      for (int64_t group = 0; group < w.groups; ++group) {
        dot_tiles<B, kDotRows>(count, w, panel, group, task.rows, row, y, to.stride);
      }
      complete(task, panel, row, count, y, to.stride);
    }
  }
}

void multiply_rounded(const Task& task) {
  if (task.weight->kind == kInt8) return multiply_bytes<Bytes8>(task);
  multiply_bytes<Bytes4>(task);
}

}  // namespace

extern const GemmTable gemm_table = {kTileRows, code_bytes, multiply, multiply_rounded, round_row, sum_row};

}  // namespace opsin::OPSIN_ISA
