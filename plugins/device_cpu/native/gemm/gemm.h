// Products of activations with weights of 16, 8 and 4 bits. Layout, blocking and numbers:
// docs/decisions/0077-cpu-native-products.md.
//
// A weight (N outputs, K inputs) is cut into panels of 32 outputs, the last one filled up with zeros. Within a
// panel the outputs of one input (or four) lie together, so that a product reads it from front to back once:
//
//   bfloat16   [K][16] words: output j in the low half, output 16 + j in the high half
//   float16    [K][32] halves
//   int8       [K / 4][32] words: four inputs of one output, each code + 128
//   int4       [K / 4][16] words: a byte per input, output j in its low and 16 + j in its high half
//
// Every result is a fixed sequence of operations on its own row, whatever the number of rows.
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace opsin {

constexpr int kPanel = 32;    // outputs
constexpr int kBlock = 256;   // inputs that are summed in registers before the sum is added to the result
constexpr int kTaskPanels = 4;

enum Kind : int32_t { kBfloat16, kFloat16, kInt8, kInt4, kTable4 };
enum ScaleKind : int32_t { kNoScales, kScaleBfloat16, kScaleFloat16, kScaleFloat32 };
enum Act : int32_t { kNoAct, kSilu, kGelu, kGeluTanh, kQuickGelu };

struct Weight {
  Kind kind;
  int64_t n, k, group, groups, panels;
  int64_t panel_bytes;
  uint8_t* data;
  ScaleKind scale_kind;
  void* scales;     // [panels][groups][kPanel], of scale_kind
  uint16_t* zeros;  // the same shape, bfloat16: zero point less the middle (0 for int8, 8 for int4); or null
  float table[16];  // what the codes of 4 bits stand for, int4: -8 to 7
  int64_t mapped;   // bytes of `data` that were mapped, 0 if allocated
  int64_t bytes;
};

// A batch of rows, as they are or rounded.
struct Rows {
  const float* x;        // [rows][k]
  const float* sums;     // [rows][groups] of x, where there are zero points
  const int8_t* codes;   // rounded: [rows][stride bytes], in the order that this instruction set wants
  int64_t stride;
  const float* scales;   // [rows]
  const int32_t* code_sums;  // [rows][groups]
};

struct Task {
  const Weight* weight;
  Rows rows;
  float* y;  // [rows][n]
  const float* bias;  // [n] or null
  Act act;
  int64_t first_panel, end_panel, first_row, end_row;
  float* scratch;  // kScratch floats of this thread
};

constexpr int64_t kEdgeRows = 256;  // rows of a task are at most this many
constexpr int64_t kScratch = int64_t{kTaskPanels} * kBlock * kPanel + kEdgeRows * kPanel;

struct GemmTable {
  // Rows of a register tile; tasks are cut at multiples of it.
  int tile_rows;
  // Bytes of a rounded row.
  int64_t (*code_bytes)(int64_t k);
  void (*multiply)(const Task& task);          // with activations as they are
  void (*multiply_rounded)(const Task& task);  // with rounded activations
  // Rounds one row to 8 bits. `sums` has one place per group. `bytes` is room for k numbers.
  void (*round_row)(const float* x, int64_t k, int64_t group, int8_t* codes, float* scale, int32_t* sums,
                    int8_t* bytes);
  void (*sum_row)(const float* x, int64_t k, int64_t group, float* sums);
};

OPSIN_TABLES(GemmTable, gemm_table)

}  // namespace opsin
