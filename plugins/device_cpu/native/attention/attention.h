// What attention is asked, by the C functions of attention.cc, of the code for one instruction set.
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace opsin {

// Keys and values of one block lie together, one key/value head after another. A head's part:
//   keys   [D][kBlock]  so that 16 keys are one vector, and scores need no sum across lanes
//   values [kBlock][D]
constexpr int kBlock = 16;

// Scores are made for so many keys at a time, counted from the start of the sequence whatever the step's limits
// are: a query's result does not depend on what else is computed in its step, or on how its prompt was cut.
constexpr int kTile = 256;

constexpr int kMaxHeadSize = 1024;

enum Type : int32_t { kFloat32 = 0, kBfloat16 = 1 };

// Rows of heads: element (row, head, i) is at base[row * stride + head * head_size + i].
template <class P>
struct HeadRows {
  P base;
  int64_t stride;
};
typedef HeadRows<const void*> Input;
typedef HeadRows<void*> Output;

struct Geometry {
  int32_t heads, kv_heads, head_size;
  float scale;
  Type type;
};

// Query heads of a key/value head.
static inline __attribute__((always_inline)) int64_t group_of(const Geometry& geometry) {
  return geometry.heads / geometry.kv_heads;
}

// Elements of a block for one key/value head.
static inline __attribute__((always_inline)) int64_t head_part(const Geometry& geometry) {
  return 2LL * kBlock * geometry.head_size;
}

// One sequence of a step.
struct Sequence {
  int64_t first;          // its first query in the flat batch
  int64_t queries;        // how many
  int64_t context;        // tokens in the cache, those of this step included
  const int64_t* blocks;  // where they are
  const int64_t* slots;   // of its queries: block * kBlock + offset
};

// Rotary tables, float32 (T, width); width 0: nothing is rotated.
struct Rotation {
  const float *cos, *sin;
  int32_t width;
};

// Some queries of one sequence over the cache, for one key/value head.
struct PagedTask {
  Sequence sequence;
  int32_t kv_head;
  int64_t query, count;             // of the sequence's queries
  int64_t first_tile, tiles;        // a part of the context; all of it if partial is null
  float* partial;                   // results of each tile, to be merged later: see partial_floats
};

// Segments of a flat batch, for one head: whole short ones, or some queries of a long one.
struct DenseTask {
  int64_t segments;                 // how many
  const int64_t *q_lens, *k_lens;   // of them
  int64_t q_first, k_first;         // rows where the first begins
  int64_t query, count;             // of a single segment; count 0: all queries of all
  int32_t head;
};

// What the code for one instruction set provides.
struct AttentionTable {
  // Floats of workspace for tasks of so many queries.
  int64_t (*paged_workspace)(const Geometry&, int64_t queries);
  int64_t (*dense_workspace)(const Geometry&, int64_t queries);
  void (*paged)(const Geometry&, const PagedTask&, Input q, const void* cache, Output out, float* workspace);
  // Adds up a task's partial results, tile after tile.
  void (*merge)(const Geometry&, const PagedTask&, Output out, float* workspace);
  void (*dense)(const Geometry&, const DenseTask&, Input q, Input k, Input v, Output out, float* workspace);
  // Queries (first, count) of the batch: for key/value head `kv_head` (all if negative), rotates q in place and
  // stores k, rotated, and v in the cache.
  void (*store)(const Geometry&, int64_t first, int64_t count, int32_t kv_head, const int64_t* slots,
                Rotation rotation, Output q, Input k, Input v, void* cache);
  // Rotates the heads of rows (first, count) of x in place.
  void (*rotate)(const Geometry&, int64_t first, int64_t count, Rotation rotation, Output x);
};

// Floats of one tile's result for one row: largest score, 16 partial sums of weights, weighted values.
static inline __attribute__((always_inline)) int64_t partial_floats(const Geometry& geometry) {
  return kBlock + kBlock + (geometry.head_size + kBlock - 1) / kBlock * kBlock;
}

OPSIN_TABLES(AttentionTable, attention_table)

}  // namespace opsin
