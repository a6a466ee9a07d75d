// The products' front: weights packed and freed, work shared out. Called through ctypes by native.py.
#include "gemm/gemm.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pool.h"

namespace opsin {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kMaxInputs = 65536;  // 255 * 127 * 65536 is just below 2**31: integer sums cannot overflow

// Room that a thread keeps from call to call.
class Room {
 public:
  ~Room() { free(data_); }
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (bytes > size_) {
      free(data_);
      data_ = aligned_alloc(64, bytes);
      size_ = data_ == nullptr ? 0 : bytes;
      if (data_ == nullptr) abort();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

thread_local Room scratch_room, code_room, scale_room, sum_room, byte_room;

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

float half_to_float(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
  const float sign = half >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return float_of(static_cast<uint32_t>(half & 0x8000) << 16 | 0x7f800000u | fraction << 13);
  if (exponent == 0) return sign * ldexpf(static_cast<float>(fraction), -24);
  return sign * ldexpf(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25);
}

// The half whose value x is; false where there is none.
bool exact_half(float x, uint16_t* out) {
  const uint32_t bits = bits_of(x);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
  const uint16_t sign = bits >> 16 & 0x8000;
  if ((bits & 0x7fffffff) == 0) return *out = sign, true;
  if (exponent < -14 || exponent > 15 || (bits & 0x1fff) != 0) return false;  // subnormal halves are not tried
  *out = static_cast<uint16_t>(sign | (exponent + 15) << 10 | (bits >> 13 & 1023));
  return true;
}

int64_t data_bytes(Kind kind, int64_t k) {
  switch (kind) {
    case kBfloat16:
    case kFloat16:
      return k * 64;
    case kInt8:
      return (k + 3) / 4 * 128;
    default:
      return (k + 3) / 4 * 64;
  }
}

// Large weights lie in pages of 2 MiB where the system has them: reading them misses the TLB less.
bool allocate(Weight* w, int64_t bytes) {
#if defined(__linux__)
  if (bytes >= kHugePage) {
    const int64_t mapped = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    char* at = static_cast<char*>(
        mmap(nullptr, mapped + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (at == MAP_FAILED) return false;
    const int64_t skip = (kHugePage - reinterpret_cast<uintptr_t>(at) % kHugePage) % kHugePage;
    if (skip > 0) munmap(at, skip);
    if (skip < kHugePage) munmap(at + skip + mapped, kHugePage - skip);
    madvise(at + skip, mapped, MADV_HUGEPAGE);
    w->data = reinterpret_cast<uint8_t*>(at + skip);
    w->mapped = mapped;
    return true;
  }
#endif
  w->data = static_cast<uint8_t*>(aligned_alloc(64, std::max<int64_t>((bytes + 63) / 64 * 64, 64)));
  return w->data != nullptr;
}

void release(Weight* w) {
#if defined(__linux__)
  if (w->mapped > 0) munmap(w->data, w->mapped);
#endif
  if (w->mapped == 0) free(w->data);
  free(w->scales);
  free(w->zeros);
  delete w;
}

void pack_halves(const Weight& w, const uint16_t* source, int64_t panel) {
  const int64_t rows = std::min<int64_t>(kPanel, w.n - panel * kPanel), k = w.k;
  const uint16_t* from = source + panel * kPanel * k;
  uint8_t* to = w.data + panel * w.panel_bytes;
  constexpr int64_t kTile = 64;  // inputs: 32 rows of 128 bytes and the 4 KB they become stay in the L1 cache
  for (int64_t first = 0; first < k; first += kTile) {
    const int64_t end = std::min(first + kTile, k);
    for (int64_t j = 0; j < 16; ++j) {
      const uint16_t *low = from + j * k, *high = from + (16 + j) * k;
      const bool has_low = j < rows, has_high = 16 + j < rows;
      if (w.kind == kBfloat16) {
        auto* words = reinterpret_cast<uint32_t*>(to);
        if (has_high) {
          for (int64_t i = first; i < end; ++i) words[i * 16 + j] = low[i] | static_cast<uint32_t>(high[i]) << 16;
        } else {
          for (int64_t i = first; i < end; ++i) words[i * 16 + j] = has_low ? low[i] : 0;
        }
      } else {
        auto* halves = reinterpret_cast<uint16_t*>(to);
        for (int64_t i = first; i < end; ++i) halves[i * 32 + j] = has_low ? low[i] : 0;
        for (int64_t i = first; i < end; ++i) halves[i * 32 + 16 + j] = has_high ? high[i] : 0;
      }
    }
  }
}

void pack_bytes(const Weight& w, const uint8_t* source, int64_t panel) {
  const int64_t rows = std::min<int64_t>(kPanel, w.n - panel * kPanel), steps = (w.k + 3) / 4;
  auto* to = reinterpret_cast<uint32_t*>(w.data + panel * w.panel_bytes);
  constexpr int64_t kTile = 32;
  for (int64_t first = 0; first < steps; first += kTile) {
    const int64_t end = std::min(first + kTile, steps), whole = std::min(end, w.k / 4);
    for (int64_t j = 0; j < kPanel; ++j) {
      const uint8_t* from = source + (panel * kPanel + j) * w.k;
      for (int64_t s = first; s < end; ++s) {
        uint32_t word = 0;
        if (j < rows) memcpy(&word, from + 4 * s, s < whole ? 4 : w.k % 4);
        to[s * 32 + j] = word ^ 0x80808080u;
      }
    }
  }
}

// Four codes in 16 bits -> the low halves of four bytes.
uint32_t spread(uint32_t codes) {
  codes = (codes | codes << 8) & 0x00ff00ffu;
  return (codes | codes << 4) & 0x0f0f0f0fu;
}

void pack_nibbles(const Weight& w, const uint8_t* source, int64_t panel) {
  const int64_t rows = std::min<int64_t>(kPanel, w.n - panel * kPanel), steps = (w.k + 3) / 4;
  const int64_t pitch = (w.k + 1) / 2;
  auto* to = reinterpret_cast<uint32_t*>(w.data + panel * w.panel_bytes);
  const auto word = [&](int64_t j, int64_t s) -> uint32_t {
    if (j >= rows) return 0x08080808u;
    uint16_t codes = 0x8888;
    memcpy(&codes, source + (panel * kPanel + j) * pitch + 2 * s, std::min<int64_t>(2, pitch - 2 * s));
    return spread(codes);
  };
  constexpr int64_t kTile = 32;
  for (int64_t first = 0; first < steps; first += kTile) {
    const int64_t end = std::min(first + kTile, steps);
    for (int64_t j = 0; j < 16; ++j) {
      for (int64_t s = first; s < end; ++s) to[s * 16 + j] = word(j, s) | word(16 + j, s) << 4;
    }
  }
}

bool pack_scales(Weight* w, const float* scales, const int16_t* zeros) {
  const int64_t count = w->n * w->groups, room = w->panels * w->groups * kPanel;
  bool bfloat16 = true, float16 = true;
  for (int64_t i = 0; i < count && (bfloat16 || float16); ++i) {
    uint16_t half;
    bfloat16 = bfloat16 && (bits_of(scales[i]) & 0xffff) == 0;
    float16 = float16 && exact_half(scales[i], &half);
  }
  w->scale_kind = bfloat16 ? kScaleBfloat16 : float16 ? kScaleFloat16 : kScaleFloat32;
  const int64_t size = w->scale_kind == kScaleFloat32 ? 4 : 2;
  w->scales = calloc(room, size);
  if (zeros != nullptr) w->zeros = static_cast<uint16_t*>(calloc(room, 2));
  if (w->scales == nullptr || (zeros != nullptr && w->zeros == nullptr)) return false;
  w->bytes += room * (size + (zeros == nullptr ? 0 : 2));
  for (int64_t row = 0; row < w->n; ++row) {
    for (int64_t group = 0; group < w->groups; ++group) {
      const float scale = scales[row * w->groups + group];
      const int64_t at = (row / kPanel * w->groups + group) * kPanel + row % kPanel;
      if (w->scale_kind == kScaleFloat32) {
        static_cast<float*>(w->scales)[at] = scale;
      } else if (bfloat16) {
        static_cast<uint16_t*>(w->scales)[at] = static_cast<uint16_t>(bits_of(scale) >> 16);
      } else {
        exact_half(scale, static_cast<uint16_t*>(w->scales) + at);
      }
      if (zeros != nullptr) {
        const int zero = zeros[row * w->groups + group] - (w->kind == kInt8 ? 0 : 8);
        w->zeros[at] = static_cast<uint16_t>(bits_of(static_cast<float>(zero)) >> 16);  // exact up to 256
      }
    }
  }
  return true;
}

float scale_at(const Weight& w, int64_t at) {
  switch (w.scale_kind) {
    case kScaleBfloat16:
      return float_of(static_cast<uint32_t>(static_cast<uint16_t*>(w.scales)[at]) << 16);
    case kScaleFloat16:
      return half_to_float(static_cast<uint16_t*>(w.scales)[at]);
    default:
      return static_cast<float*>(w.scales)[at];
  }
}

// Row n of the weight, as floats.
void unpack_row(const Weight& w, int64_t n, float* out) {
  const int64_t panel = n / kPanel, j = n % kPanel;
  const uint8_t* data = w.data + panel * w.panel_bytes;
  const auto* words = reinterpret_cast<const uint32_t*>(data);
  if (w.kind == kBfloat16) {
    const int shift = j < 16 ? 16 : 0;
    for (int64_t k = 0; k < w.k; ++k) out[k] = float_of(words[k * 16 + j % 16] << shift & 0xffff0000u);
    return;
  }
  if (w.kind == kFloat16) {
    const auto* halves = reinterpret_cast<const uint16_t*>(data);
    for (int64_t k = 0; k < w.k; ++k) out[k] = half_to_float(halves[k * 32 + j]);
    return;
  }
  for (int64_t k = 0; k < w.k; ++k) {
    float value;
    if (w.kind == kInt8) {
      value = static_cast<float>(static_cast<int>(words[k / 4 * 32 + j] >> (8 * (k % 4)) & 255) - 128);
    } else {
      value = w.table[words[k / 4 * 16 + j % 16] >> (8 * (k % 4) + (j < 16 ? 0 : 4)) & 15];
    }
    const int64_t at = (panel * w.groups + (w.groups == 1 ? 0 : k / w.group)) * kPanel + j;
    if (w.zeros != nullptr) value -= float_of(static_cast<uint32_t>(w.zeros[at]) << 16);
    out[k] = value * scale_at(w, at);
  }
}

}  // namespace
}  // namespace opsin

using namespace opsin;

// A weight in panels; null where sizes do not fit each other or memory is out.
//
// kind: 0 bfloat16, 1 float16 (source: uint16 [n][k]); 2 int8 (int8 [n][k]); 3 int4, 4 table4 (uint8 [n][ceil(k / 2)],
// low half first). group divides k, or equals it. scales float32 [n][k / group] and zeros int16 of that shape (or
// null) for kinds 2 to 4; table float32 [16] for kind 4.
OPSIN_EXPORT void* opsin_weight_pack(int32_t kind, int64_t n, int64_t k, int64_t group, const void* source,
                                     const float* scales, const int16_t* zeros, const float* table) {
  if (kind < kBfloat16 || kind > kTable4 || n < 1 || k < 1 || group < 1 || k % group != 0 || source == nullptr) {
    return nullptr;
  }
  const bool integers = kind >= kInt8;
  if (integers != (scales != nullptr) || (kind == kTable4) != (table != nullptr)) return nullptr;
  if (integers && (k > kMaxInputs || (group != k && group % 4 != 0))) return nullptr;
  if (zeros != nullptr && (kind == kTable4 || !integers)) return nullptr;
  auto* w = new (std::nothrow) Weight{};
  if (w == nullptr) return nullptr;
  w->kind = static_cast<Kind>(kind);
  w->n = n;
  w->k = k;
  w->group = group;
  w->groups = k / group;
  w->panels = (n + kPanel - 1) / kPanel;
  w->panel_bytes = data_bytes(w->kind, k);
  w->bytes = w->panels * w->panel_bytes;
  for (int i = 0; i < 16; ++i) w->table[i] = table == nullptr ? static_cast<float>(i - 8) : table[i];
  if (!allocate(w, w->bytes) || (integers && !pack_scales(w, scales, zeros))) {
    release(w);
    return nullptr;
  }
  parallel_for(w->panels, [&](int64_t panel, int) {
    if (!integers) return pack_halves(*w, static_cast<const uint16_t*>(source), panel);
    if (w->kind == kInt8) return pack_bytes(*w, static_cast<const uint8_t*>(source), panel);
    pack_nibbles(*w, static_cast<const uint8_t*>(source), panel);
  });
  return w;
}

OPSIN_EXPORT void opsin_weight_free(void* weight) {
  if (weight != nullptr) release(static_cast<Weight*>(weight));
}

// Bytes it takes.
OPSIN_EXPORT int64_t opsin_weight_bytes(const void* weight) { return static_cast<const Weight*>(weight)->bytes; }

// Rows `ids` of the weight as float32 [count][k]; returns 0, or 1 where an id is out of range (nothing is written).
OPSIN_EXPORT int32_t opsin_weight_rows(const void* weight, const int64_t* ids, int64_t count, float* out) {
  const auto& w = *static_cast<const Weight*>(weight);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= w.n) return 1;
  }
  parallel_for(count, [&](int64_t i, int) { unpack_row(w, ids[i], out + i * w.k); });
  return 0;
}

// y [rows][n] = act(x [rows][k] @ W.T + bias). rounded: activations are rounded to 8 bits first, a scale per row.
// Returns 0, or 1 where an argument is out of range.
OPSIN_EXPORT int32_t opsin_linear(const void* weight, const float* x, int64_t rows, const float* bias, int32_t act,
                                  int32_t rounded, float* y) {
  const auto* w = static_cast<const Weight*>(weight);
  if (w == nullptr || rows < 0 || act < kNoAct || act > kQuickGelu) return 1;
  if (rounded && w->kind != kInt8 && w->kind != kInt4) return 1;
  if (rows == 0) return 0;
  if (x == nullptr || y == nullptr) return 1;
  const GemmTable& table = *OPSIN_PICK(gemm_table);
  const int workers = rows * w->n * w->k < 200000 ? 1 : opsin_num_workers();
  const auto each = [&](int64_t tasks, const auto& body) {
    if (workers == 1 || tasks == 1) {
      for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    } else {
      parallel_for(tasks, body);
    }
  };

  Task whole{};
  whole.weight = w;
  whole.rows.x = x;
  whole.y = y;
  whole.bias = bias;
  whole.act = static_cast<Act>(act);
  // Rows are prepared by the caller alone where that takes less time than waking the others.
  const auto each_row = [&](const auto& body) {
    const int64_t parts = rows * w->k < 32768 ? 1 : std::min<int64_t>(rows, 4 * workers);
    each(parts, [&](int64_t part, int) {
      for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) body(row);
    });
  };
  if (rounded) {
    const int64_t stride = table.code_bytes(w->k);
    int8_t* codes = code_room.take<int8_t>(rows * stride);
    float* scales = scale_room.take<float>(rows);
    int32_t* sums = sum_room.take<int32_t>(rows * w->groups);
    each_row([&](int64_t row) {
      table.round_row(x + row * w->k, w->k, w->group, codes + row * stride, scales + row, sums + row * w->groups,
                      byte_room.take<int8_t>(w->k + 4));
    });
    whole.rows.codes = codes;
    whole.rows.stride = stride;
    whole.rows.scales = scales;
    whole.rows.code_sums = sums;
  } else if (w->zeros != nullptr) {
    float* sums = scale_room.take<float>(rows * w->groups);
    each_row([&](int64_t row) { table.sum_row(x + row * w->k, w->k, w->group, sums + row * w->groups); });
    whole.rows.sums = sums;
  }

  // Few rows: several contiguous stretches of panels for each worker. Many: blocks of rows times a few panels.
  const int64_t unit = table.tile_rows, blocks = (rows + kEdgeRows - 1) / kEdgeRows;
  int64_t block = (rows + blocks - 1) / blocks;
  if (rows > 4 * unit) {
    const int64_t columns = (w->panels + kTaskPanels - 1) / kTaskPanels;
    if (columns * blocks < 4 * workers) block = std::max<int64_t>(block / 2, unit);
  }
  block = std::min((block + unit - 1) / unit * unit, kEdgeRows / unit * unit);
  const int64_t row_blocks = (rows + block - 1) / block;
  const int64_t few = std::min<int64_t>(w->panels, 8 * workers);
  const int64_t width = std::min<int64_t>(kTaskPanels, (w->panels + few - 1) / few);
  const bool many = rows > 4;
  const int64_t stretches = many ? (w->panels + width - 1) / width : few;
  each(stretches * row_blocks, [&](int64_t index, int) {
    const int64_t stretch = index % stretches, part = index / stretches;
    Task task = whole;
    task.first_panel = many ? stretch * width : w->panels * stretch / stretches;
    task.end_panel = many ? std::min(w->panels, (stretch + 1) * width) : w->panels * (stretch + 1) / stretches;
    task.first_row = part * block;
    task.end_row = std::min(rows, task.first_row + block);
    task.scratch = scratch_room.take<float>(kScratch);
    rounded ? table.multiply_rounded(task) : table.multiply(task);
  });
  return 0;
}
