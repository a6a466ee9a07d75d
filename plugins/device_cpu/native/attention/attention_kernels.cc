// Attention over tiles of keys with an online softmax, compiled once for each instruction set.
//
// Tiles and their results follow Milakov & Gimelshein 2018 (section 3.1) and Dao 2023 (algorithm 1): each tile has
// its own largest score, sum of weights and weighted values, and results are merged tile after tile. Within a
// tile everything is added in the order of the keys, and no sum goes across lanes before the end. So a query has
// the same result, bit for bit, in a step of its own and among others.

#include "attention/attention.h"
#include "vec.h"

namespace opsin::OPSIN_ISA {
namespace {

// Rows x blocks of scores, and rows x vectors of values, that fit in the registers with what they are made of.
#if defined(__AVX512F__)
constexpr int kRows = 6, kScoreBlocks = 4, kValueVecs = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6, kScoreBlocks = 1, kValueVecs = 1;
#else
constexpr int kRows = 2, kScoreBlocks = 1, kValueVecs = 1;
#endif

constexpr float kLowest = -__builtin_inff();

OPSIN_ALWAYS_INLINE int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Keys and values of one tile, block by block.
template <class T>
struct Tile {
  const T* keys[kTile / kBlock];
  const T* values[kTile / kBlock];
};

// Queries that are computed together and what is known about each of their rows so far.
struct Rows {
  int64_t count;
  int64_t width;      // head size, rounded up to whole vectors
  float* queries;     // micro-tile after micro-tile, [head size][rows of it]
  float* largest;     // (count,) scores
  float* weights;     // (count, kLanes): sums of weights
  float* values;      // (count, width): weighted values
  int64_t* visible;   // (count,): how many keys, from the start of the sequence

  static int64_t floats(int64_t count, int64_t head_size) {
    return count * (round_up(head_size) + head_size + kLanes) + 2 * round_up(count) + 2 * round_up(2 * count);
  }
  // The memory of one worker, cut up.
  Rows(int64_t count, int64_t head_size, float*& workspace) : count(count), width(round_up(head_size)) {
    auto take = [&workspace](int64_t floats) {
      float* taken = workspace;
      workspace += round_up(floats);
      return taken;
    };
    visible = reinterpret_cast<int64_t*>(take(2 * count));
    largest = take(count);
    weights = take(count * kLanes);
    values = take(count * width);
    queries = take(count * head_size);
  }
  void clear() {
    for (int64_t i = 0; i < count; i++) largest[i] = kLowest;
    memset(weights, 0, sizeof(float) * count * kLanes);
    memset(values, 0, sizeof(float) * count * width);
  }
  int64_t micro_tiles() const { return (count + kRows - 1) / kRows; }
  int64_t start(int64_t micro) const { return micro * count / micro_tiles(); }
};

// The same for one micro-tile's rows in one tile.
struct Part {
  float* largest;
  float* weights;
  float* values;
  int64_t stride;  // from row to row; in partial results all three lie together
};

// scores[m][j * 16 + i] = scale * sum over d of queries[d][m] * keys[j][d][i]
template <int M, int NB, class T>
OPSIN_ALWAYS_INLINE void make_scores(const float* queries, const T* const* keys, int head_size, Vec scale, float* scores) {
  Vec sums[M][NB];
  OPSIN_UNROLL for (int m = 0; m < M; m++)
    OPSIN_UNROLL for (int j = 0; j < NB; j++) sums[m][j] = zero();
  const T* key[NB];
  OPSIN_UNROLL for (int j = 0; j < NB; j++) key[j] = keys[j];
  for (int d = 0; d < head_size; d++) {
    Vec loaded[NB];
    OPSIN_UNROLL for (int j = 0; j < NB; j++) {
      loaded[j] = load(key[j]);
      key[j] += kBlock;
    }
    OPSIN_UNROLL for (int m = 0; m < M; m++) {
      Vec query = splat(queries[m]);
      OPSIN_UNROLL for (int j = 0; j < NB; j++) sums[m][j] = fma(query, loaded[j], sums[m][j]);
    }
    queries += M;
  }
  OPSIN_UNROLL for (int m = 0; m < M; m++)
    OPSIN_UNROLL for (int j = 0; j < NB; j++) store(scores + m * kTile + j * kBlock, sums[m][j] * scale);
}

// values[m] = values[m] * old[m] + fresh[m] * sum over keys of weights[m][key] * V[key], for NV vectors of columns
template <int M, int NV, class T>
OPSIN_ALWAYS_INLINE void add_values(const float* weights, const T* const* blocks, int num_keys, int head_size, int column,
                             const float* old, const float* fresh, float* values, int64_t stride) {
  Vec sums[M][NV];
  OPSIN_UNROLL for (int m = 0; m < M; m++)
    OPSIN_UNROLL for (int j = 0; j < NV; j++) sums[m][j] = zero();
  for (int done = 0; done < num_keys; done += kBlock) {
    const T* row = blocks[done / kBlock] + column;
    int keys = num_keys - done < kBlock ? num_keys - done : kBlock;
    const float* weight = weights + done;
    for (int key = 0; key < keys; key++) {
      Vec loaded[NV];
      OPSIN_UNROLL for (int j = 0; j < NV; j++) loaded[j] = load(row + j * kLanes);
      OPSIN_UNROLL for (int m = 0; m < M; m++) {
        Vec share = splat(weight[m * kTile + key]);
        OPSIN_UNROLL for (int j = 0; j < NV; j++) sums[m][j] = fma(share, loaded[j], sums[m][j]);
      }
      row += head_size;
    }
  }
  OPSIN_UNROLL for (int m = 0; m < M; m++) {
    float* to = values + m * stride + column;
    OPSIN_UNROLL for (int j = 0; j < NV; j++) {
      // Not times 0: partial results are written into memory that holds anything, even NaN of another request.
      Vec before = old[m] == 0.0f ? zero() : load(to + j * kLanes) * splat(old[m]);
      store(to + j * kLanes, fma(sums[m][j], splat(fresh[m]), before));
    }
  }
}

// e^score, 0 for keys that are not seen, in place. Returns the largest score; `weights` gets the sums.
OPSIN_ALWAYS_INLINE float make_weights(float* scores, int visible, int blocks, Vec& weights) {
  int whole = visible / kBlock, rest = visible % kBlock;
  Vec top = splat(kLowest);
  for (int j = 0; j < whole; j++) top = max(top, load(scores + j * kBlock));
  if (rest) {
    Vec part = first(load(scores + whole * kBlock), rest, kLowest);
    store(scores + whole * kBlock, part);
    top = max(top, part);
  }
  float highest = largest(top);
  Vec shift = splat(highest == kLowest ? 0.0f : highest);
  weights = zero();
  for (int j = 0; j < whole; j++) {
    Vec weight = exp(load(scores + j * kBlock) - shift);
    weights = weights + weight;
    store(scores + j * kBlock, weight);
  }
  if (rest) {
    Vec weight = first(exp(load(scores + whole * kBlock) - shift), rest, 0.0f);
    weights = weights + weight;
    store(scores + whole * kBlock, weight);
  }
  for (int j = whole + (rest > 0); j < blocks; j++) store(scores + j * kBlock, zero());
  return highest;
}

// Factors of what was there and of what is added, from their largest scores; `before` becomes the larger.
OPSIN_ALWAYS_INLINE void merge_factors(float& before, float added, float& old, float& fresh) {
  float highest = before > added ? before : added;
  alignas(64) float shares[kLanes] = {before - highest, added - highest};
  if (before == kLowest) shares[0] = 0.0f;  // nothing was there: its sums are 0
  store(shares, exp(load(shares)));
  before = highest;
  old = shares[0];
  fresh = shares[1];
}

template <int M, class T>
void micro_tile(const float* queries, const Tile<T>& tile, const int* visible, int num_keys, int head_size,
                float scale, float* largest, float* weights, float* values, int64_t width, float* partial,
                int64_t partial_stride) {
  alignas(64) float scores[M * kTile];
  int blocks = (num_keys + kBlock - 1) / kBlock, j = 0;
  for (; j + kScoreBlocks <= blocks; j += kScoreBlocks)
    make_scores<M, kScoreBlocks>(queries, tile.keys + j, head_size, splat(scale), scores + j * kBlock);
  if (kScoreBlocks > 2)
    for (; j + 2 <= blocks; j += 2)
      make_scores<M, 2>(queries, tile.keys + j, head_size, splat(scale), scores + j * kBlock);
  for (; j < blocks; j++) make_scores<M, 1>(queries, tile.keys + j, head_size, splat(scale), scores + j * kBlock);

  float old[M], fresh[M];
  for (int m = 0; m < M; m++) {
    Vec sums;
    float highest = make_weights(scores + m * kTile, visible[m], blocks, sums);
    if (partial != nullptr) {
      partial[m * partial_stride] = visible[m] > 0 ? highest : kLowest;
      store(partial + m * partial_stride + kLanes, sums);
      old[m] = 0.0f;
      fresh[m] = 1.0f;
      continue;
    }
    if (visible[m] == 0) {
      old[m] = 1.0f;
      fresh[m] = 0.0f;
      continue;
    }
    merge_factors(largest[m], highest, old[m], fresh[m]);
    Vec before = load(weights + m * kLanes) * splat(old[m]);
    store(weights + m * kLanes, fma(sums, splat(fresh[m]), before));
  }
  if (partial != nullptr) {
    values = partial + 2 * kLanes;
    width = partial_stride;
  }
  int column = 0, vecs = static_cast<int>(round_up(head_size)) / kLanes;
  int slices = (vecs + kValueVecs - 1) / kValueVecs;
  for (int slice = 0; slice < slices; slice++) {
    int count = vecs * (slice + 1) / slices - vecs * slice / slices;
    auto add = [&](auto add_some) {
      add_some(scores, tile.values, num_keys, head_size, column, old, fresh, values, width);
    };
    switch (count) {
      case 1: add(add_values<M, 1, T>); break;
#if defined(__AVX512F__)
      case 2: add(add_values<M, 2, T>); break;
      case 3: add(add_values<M, 3, T>); break;
      case 4: add(add_values<M, 4, T>); break;
#endif
    }
    column += count * kLanes;
  }
}

// All rows over one tile that begins at key `start`; into `partial`, row after row, unless that is null.
template <class T>
void attend_tile(const Geometry& geometry, Rows& rows, const Tile<T>& tile, int64_t start, float* partial) {
  int64_t partial_stride = partial_floats(geometry);
  for (int64_t micro = 0; micro < rows.micro_tiles(); micro++) {
    int64_t row = rows.start(micro), end = rows.start(micro + 1);
    int visible[kRows], num_keys = 0;
    for (int64_t i = row; i < end; i++) {
      int64_t seen = rows.visible[i] - start;
      visible[i - row] = static_cast<int>(seen < 0 ? 0 : seen > kTile ? kTile : seen);
      if (visible[i - row] > num_keys) num_keys = visible[i - row];
    }
    if (num_keys == 0 && partial == nullptr) continue;
    float* part = partial == nullptr ? nullptr : partial + row * partial_stride;
    auto run = [&](auto micro_kernel) {
      micro_kernel(rows.queries + row * geometry.head_size, tile, visible, num_keys, geometry.head_size,
                   geometry.scale, rows.largest + row, rows.weights + row * kLanes,
                   rows.values + row * rows.width, rows.width, part, partial_stride);
    };
    switch (end - row) {
      case 1: run(micro_tile<1, T>); break;
      case 2: run(micro_tile<2, T>); break;
#if defined(__AVX2__) || defined(__aarch64__)
      case 3: run(micro_tile<3, T>); break;
      case 4: run(micro_tile<4, T>); break;
      case 5: run(micro_tile<5, T>); break;
      case 6: run(micro_tile<6, T>); break;
#endif
    }
  }
}

OPSIN_ALWAYS_INLINE float widen(float x) { return x; }
OPSIN_ALWAYS_INLINE float widen(bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Row i's query, interleaved with the others of its micro-tile. `find` gives where a row's query lies.
template <class T, class Find>
void take_queries(const Geometry& geometry, Rows& rows, Find find) {
  for (int64_t micro = 0; micro < rows.micro_tiles(); micro++) {
    int64_t row = rows.start(micro), size = rows.start(micro + 1) - row;
    float* to = rows.queries + row * geometry.head_size;
    for (int64_t i = 0; i < size; i++) {
      const T* from = find(row + i);
      for (int d = 0; d < geometry.head_size; d++) to[d * size + i] = widen(from[d]);
    }
  }
}

template <class T>
void give_results(const Geometry& geometry, const Rows& rows, int64_t row, T* to) {
  Vec share = splat(1.0f / sum(load(rows.weights + row * kLanes)));
  const float* from = rows.values + row * rows.width;
  int d = 0;
  for (; d + kLanes <= geometry.head_size; d += kLanes) store(to + d, load(from + d) * share);
  if (d < geometry.head_size) store_part(to + d, load(from + d) * share, geometry.head_size - d);
}

// ---- Over the cache ---------------------------------------------------------------------------------------

template <class T>
void paged_of(const Geometry& geometry, const PagedTask& task, Input q, const void* cache, Output out,
              float* workspace) {
  const Sequence& sequence = task.sequence;
  int64_t group = group_of(geometry), size = geometry.head_size, past = sequence.context - sequence.queries;
  Rows rows(task.count * group, size, workspace);
  rows.clear();
  auto place = [&](int64_t row, int64_t stride) {  // of a row's head in the flat batch
    int64_t token = sequence.first + task.query + row / group;
    return token * stride + (task.kv_head * group + row % group) * size;
  };
  take_queries<T>(geometry, rows,
                  [&](int64_t row) { return static_cast<const T*>(q.base) + place(row, q.stride); });
  for (int64_t row = 0; row < rows.count; row++) rows.visible[row] = past + task.query + row / group + 1;

  int64_t context = past + task.query + task.count;  // what the last query sees
  int64_t tiles = task.partial != nullptr ? task.first_tile + task.tiles : (context + kTile - 1) / kTile;
  for (int64_t t = task.first_tile; t < tiles; t++) {
    int64_t start = t * kTile, keys = context - start < kTile ? context - start : kTile;
    Tile<T> tile;
    for (int64_t j = 0; j * kBlock < keys; j++) {
      int64_t block = sequence.blocks[start / kBlock + j];
      tile.keys[j] = static_cast<const T*>(cache) + (block * geometry.kv_heads + task.kv_head) * head_part(geometry);
      tile.values[j] = tile.keys[j] + kBlock * size;
    }
    float* partial = task.partial == nullptr
                         ? nullptr
                         : task.partial + (t - task.first_tile) * rows.count * partial_floats(geometry);
    attend_tile(geometry, rows, tile, start, partial);
  }
  if (task.partial != nullptr) return;
  for (int64_t row = 0; row < rows.count; row++)
    give_results(geometry, rows, row, static_cast<T*>(out.base) + place(row, out.stride));
}

template <class T>
void merge_of(const Geometry& geometry, const PagedTask& task, Output out, float* workspace) {
  int64_t group = group_of(geometry), size = geometry.head_size, stride = partial_floats(geometry);
  Rows rows(task.count * group, size, workspace);
  rows.clear();
  const float* partial = task.partial;
  for (int64_t t = 0; t < task.tiles; t++)
    for (int64_t row = 0; row < rows.count; row++, partial += stride) {
      if (partial[0] == kLowest && sum(load(partial + kLanes)) == 0.0f) continue;  // it saw none of the tile
      float old, fresh;
      merge_factors(rows.largest[row], partial[0], old, fresh);
      float* weights = rows.weights + row * kLanes;
      store(weights, fma(load(partial + kLanes), splat(fresh), load(weights) * splat(old)));
      float* values = rows.values + row * rows.width;
      for (int64_t d = 0; d < rows.width; d += kLanes)
        store(values + d, fma(load(partial + 2 * kLanes + d), splat(fresh), load(values + d) * splat(old)));
    }
  for (int64_t row = 0; row < rows.count; row++) {
    int64_t token = task.sequence.first + task.query + row / group;
    int64_t head = task.kv_head * group + row % group;
    give_results(geometry, rows, row, static_cast<T*>(out.base) + token * out.stride + head * size);
  }
}

// ---- Of a flat batch --------------------------------------------------------------------------------------

// Keys as [D][kBlock] and values as [kBlock][D], float32; keys behind the last are 0.
template <class T>
void pack_tile(const T* keys, int64_t k_stride, const T* values, int64_t v_stride, int64_t count, int head_size,
               float* packed_keys, float* packed_values) {
  for (int64_t first = 0; first < count; first += kBlock) {
    int64_t some = count - first < kBlock ? count - first : kBlock;
    float* to = packed_keys + first * head_size;
    if (some < kBlock) memset(to, 0, sizeof(float) * kBlock * head_size);
    for (int64_t i = 0; i < some; i++) {
      const T* key = keys + (first + i) * k_stride;
      for (int d = 0; d < head_size; d++) to[d * kBlock + i] = widen(key[d]);
    }
    float* rows = packed_values + first * head_size;
    for (int64_t i = 0; i < some; i++) {
      const T* value = values + (first + i) * v_stride;
      for (int d = 0; d < head_size; d++) rows[i * head_size + d] = widen(value[d]);
    }
  }
}

template <class T>
void dense_of(const Geometry& geometry, const DenseTask& task, Input q, Input k, Input v, Output out,
              float* workspace) {
  int64_t size = geometry.head_size, q_at = task.q_first, k_at = task.k_first;
  float* packed_keys = workspace;
  float* packed_values = packed_keys + kTile * size;
  workspace = packed_values + kTile * size + kLanes;  // a last row's last vector may reach beyond it
  for (int64_t s = 0; s < task.segments; s++) {
    int64_t first = q_at, count = task.q_lens[s], num_keys = task.k_lens[s];
    if (task.count > 0) {
      first += task.query;
      count = task.count;
    }
    float* rest = workspace;
    Rows rows(count, size, rest);
    rows.clear();
    take_queries<T>(geometry, rows, [&](int64_t row) {
      return static_cast<const T*>(q.base) + (first + row) * q.stride + task.head * size;
    });
    for (int64_t row = 0; row < count; row++) rows.visible[row] = num_keys;
    Tile<float> tile;
    for (int j = 0; j < kTile / kBlock; j++) {
      tile.keys[j] = packed_keys + j * kBlock * size;
      tile.values[j] = packed_values + j * kBlock * size;
    }
    for (int64_t start = 0; start < num_keys; start += kTile) {
      int64_t keys = num_keys - start < kTile ? num_keys - start : kTile;
      pack_tile(static_cast<const T*>(k.base) + (k_at + start) * k.stride + task.head * size, k.stride,
                static_cast<const T*>(v.base) + (k_at + start) * v.stride + task.head * size, v.stride, keys,
                geometry.head_size, packed_keys, packed_values);
      attend_tile(geometry, rows, tile, start, nullptr);
    }
    for (int64_t row = 0; row < count; row++)
      give_results(geometry, rows, row,
                   static_cast<T*>(out.base) + (first + row) * out.stride + task.head * size);
    q_at += task.q_lens[s];
    k_at += task.k_lens[s];
  }
}

// ---- Rotation and storing ---------------------------------------------------------------------------------

// Element d of a head and element d + width / 2 turn together (Su et al. 2021, section 3.4.2).
template <class T, class U>
OPSIN_ALWAYS_INLINE void rotate_head(const T* from, const float* cos, const float* sin, int width, U* to) {
  int half = width / 2, d = 0;
  auto turn = [&](auto take, auto take_table, auto give) {
    Vec a = take(from + d), b = take(from + half + d);
    give(to + d, fnma(b, take_table(sin + d), a * take_table(cos + d)));
    give(to + half + d, fma(a, take_table(sin + half + d), b * take_table(cos + half + d)));
  };
  for (; d + kLanes <= half; d += kLanes)
    turn([](auto* p) { return load(p); }, [](auto* p) { return load(p); }, [](auto* p, Vec x) { store(p, x); });
  if (int rest = half - d)
    turn([rest](auto* p) { return load_part(p, rest); }, [rest](auto* p) { return load_part(p, rest); },
         [rest](auto* p, Vec x) { store_part(p, x, rest); });
}

template <class T>
void rotate_of(const Geometry& geometry, int64_t first, int64_t count, Rotation rotation, Output x) {
  for (int64_t row = first; row < first + count; row++)
    for (int64_t n = 0; n < geometry.heads; n++) {
      T* head = static_cast<T*>(x.base) + row * x.stride + n * geometry.head_size;
      rotate_head(head, rotation.cos + row * rotation.width, rotation.sin + row * rotation.width, rotation.width, head);
    }
}

template <class T>
void store_of(const Geometry& geometry, int64_t first, int64_t count, int32_t kv_head, const int64_t* slots,
              Rotation rotation, Output q, Input k, Input v, void* cache) {
  int64_t size = geometry.head_size, group = group_of(geometry);
  int64_t head = kv_head < 0 ? 0 : kv_head, end = kv_head < 0 ? geometry.kv_heads : kv_head + 1;
  alignas(64) T turned[kMaxHeadSize + kLanes];
  for (int64_t token = first; token < first + count; token++) {
    const float* cos = rotation.cos + token * rotation.width;
    const float* sin = rotation.sin + token * rotation.width;
    if (rotation.width > 0)
      for (int64_t n = head * group; n < end * group; n++) {
        T* query = static_cast<T*>(q.base) + token * q.stride + n * size;
        rotate_head(query, cos, sin, rotation.width, query);
      }
    int64_t block = slots[token] / kBlock, offset = slots[token] % kBlock;
    for (int64_t n = head; n < end; n++) {
      const T* key = static_cast<const T*>(k.base) + token * k.stride + n * size;
      const T* value = static_cast<const T*>(v.base) + token * v.stride + n * size;
      if (rotation.width > 0) {
        rotate_head(key, cos, sin, rotation.width, turned);
        memcpy(turned + rotation.width, key + rotation.width, sizeof(T) * (size - rotation.width));
        key = turned;
      }
      T* keys = static_cast<T*>(cache) + (block * geometry.kv_heads + n) * head_part(geometry);
      for (int64_t d = 0; d < size; d++) keys[d * kBlock + offset] = key[d];
      memcpy(keys + kBlock * size + offset * size, value, sizeof(T) * size);
    }
  }
}

// ---- By element type --------------------------------------------------------------------------------------

int64_t paged_workspace(const Geometry& geometry, int64_t queries) {
  return Rows::floats(queries * group_of(geometry), geometry.head_size) + 5 * kLanes;
}
int64_t dense_workspace(const Geometry& geometry, int64_t queries) {
  return Rows::floats(queries, geometry.head_size) + 2LL * kTile * geometry.head_size + 6 * kLanes;
}
void paged(const Geometry& geometry, const PagedTask& task, Input q, const void* cache, Output out, float* workspace) {
  auto run = geometry.type == kFloat32 ? paged_of<float> : paged_of<bfloat16>;
  run(geometry, task, q, cache, out, workspace);
}
void merge(const Geometry& geometry, const PagedTask& task, Output out, float* workspace) {
  auto run = geometry.type == kFloat32 ? merge_of<float> : merge_of<bfloat16>;
  run(geometry, task, out, workspace);
}
void dense(const Geometry& geometry, const DenseTask& task, Input q, Input k, Input v, Output out, float* workspace) {
  auto run = geometry.type == kFloat32 ? dense_of<float> : dense_of<bfloat16>;
  run(geometry, task, q, k, v, out, workspace);
}
void store_kv(const Geometry& geometry, int64_t first, int64_t count, int32_t kv_head, const int64_t* slots,
              Rotation rotation, Output q, Input k, Input v, void* cache) {
  auto run = geometry.type == kFloat32 ? store_of<float> : store_of<bfloat16>;
  run(geometry, first, count, kv_head, slots, rotation, q, k, v, cache);
}

void rotate(const Geometry& geometry, int64_t first, int64_t count, Rotation rotation, Output x) {
  auto run = geometry.type == kFloat32 ? rotate_of<float> : rotate_of<bfloat16>;
  run(geometry, first, count, rotation, x);
}

}  // namespace

const AttentionTable attention_table = {paged_workspace, dense_workspace, paged, merge, dense, store_kv, rotate};

}  // namespace opsin::OPSIN_ISA
