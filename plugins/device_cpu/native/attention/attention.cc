// Attention as C functions: checks what it is given, cuts it into tasks and lets the pool run them.

#include "attention/attention.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "pool.h"

namespace opsin {
namespace {

constexpr int64_t kTaskRows = 192;      // rows (query x head) of one task: with a tile of keys they fit the L2 cache
constexpr int64_t kLeastRows = 24;      // fewer are not worth reading the keys once more
constexpr int64_t kSmall = 1 << 17;     // multiplications up to which other threads are not worth waking
constexpr int64_t kSmallStore = 1 << 15;  // the same for elements to be stored

constexpr int kBadPlan = 1, kBadGeometry = 2, kTooFewBlocks = 3, kNoMemory = 4;

// Grows and is kept, for each calling thread.
class Workspace {
 public:
  float* take(int64_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
      size_ = memory_ ? floats : 0;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};
thread_local Workspace workspace, partials;

int64_t round_up(int64_t n) { return (n + 15) / 16 * 16; }

// How a step's attention is given: whole numbers, made once per step.
//   header  sequences, tokens, blocks the cache must have, whether sequences read what others write in this step
//   for each sequence  first query, queries, context, where its blocks begin in this array
//   slots of the tokens; blocks
struct Plan {
  const int64_t* numbers;
  enum { kSequences, kTokens, kBlocks, kShared, kHeader };

  int64_t sequences() const { return numbers[kSequences]; }
  int64_t tokens() const { return numbers[kTokens]; }
  const int64_t* slots() const { return numbers + kHeader + 4 * sequences(); }
  Sequence sequence(int64_t i) const {
    const int64_t* s = numbers + kHeader + 4 * i;
    return {s[0], s[1], s[2], numbers + s[3], slots() + s[0]};
  }
};

bool valid(const Geometry& g) {
  return g.heads > 0 && g.kv_heads > 0 && g.heads % g.kv_heads == 0 && g.head_size > 0 &&
         g.head_size <= kMaxHeadSize && (g.type == kFloat32 || g.type == kBfloat16);
}

template <class Body>
void run(int64_t tasks, bool alone, const Body& body) {
  if (alone || tasks <= 1) {
    for (int64_t i = 0; i < tasks; i++) body(i, 0);
  } else {
    parallel_for(tasks, body);
  }
}

int64_t tiles_of(int64_t context) { return (context + kTile - 1) / kTile; }

// The step's tasks for every key/value head.
struct PagedWork {
  std::vector<PagedTask> tasks;
  std::vector<PagedTask> split;    // tasks whose context is divided among several of `tasks`
  std::vector<Sequence> ahead;     // sequences whose keys must be stored before any task runs
  int64_t largest = 0;             // queries of a task
};

// Returns whether there was memory enough.
bool cut(const Geometry& g, const Plan& plan, int workers, PagedWork& work) {
  int64_t group = group_of(g), units = 0;
  for (int64_t i = 0; i < plan.sequences(); i++) {
    Sequence s = plan.sequence(i);
    units += g.kv_heads * tiles_of(s.context) * ((s.queries * group + 5) / 6);
  }
  int64_t most = std::max<int64_t>(1, kTaskRows / group);
  if (workers > 1)
    most = std::min(most, std::max((kLeastRows + group - 1) / group,
                                   plan.tokens() * g.kv_heads / (4 * workers)));
  work.tasks.clear();
  work.split.clear();
  work.ahead.clear();
  work.largest = 0;
  int64_t partial_rows = 0;
  for (int64_t i = 0; i < plan.sequences(); i++) {
    Sequence s = plan.sequence(i);
    int64_t parts = (s.queries + most - 1) / most, tiles = tiles_of(s.context);
    int64_t own = tiles * ((s.queries * group + 5) / 6), fair = std::max<int64_t>(4, units / workers);
    int64_t ranges = parts > 1 || workers == 1 ? 1 : std::min(tiles / 4, (own + fair - 1) / fair);
    if (parts > 1 || ranges > 1 || plan.numbers[Plan::kShared]) work.ahead.push_back(s);
    for (int64_t part = parts; part-- > 0;)  // the last queries see most: first, so that no thread ends late
      for (int32_t head = 0; head < g.kv_heads; head++) {
        int64_t first = s.queries * part / parts, count = s.queries * (part + 1) / parts - first;
        PagedTask task = {s, head, first, count, 0, tiles, nullptr};
        work.largest = std::max(work.largest, count);
        if (ranges <= 1) {
          work.tasks.push_back(task);
          continue;
        }
        work.split.push_back(task);
        partial_rows += tiles * count * group;
      }
  }
  if (work.split.empty()) return true;
  float* partial = partials.take(partial_rows * partial_floats(g));
  if (partial == nullptr) return false;
  for (PagedTask& whole : work.split) {
    whole.partial = partial;
    int64_t own = whole.tiles * ((whole.count * group + 5) / 6), fair = std::max<int64_t>(4, units / workers);
    int64_t ranges = std::min(whole.tiles / 4, (own + fair - 1) / fair);
    for (int64_t range = 0; range < ranges; range++) {
      PagedTask task = whole;
      task.first_tile = whole.tiles * range / ranges;
      task.tiles = whole.tiles * (range + 1) / ranges - task.first_tile;
      task.partial = partial + task.first_tile * whole.count * group * partial_floats(g);
      work.tasks.push_back(task);
    }
    partial += whole.tiles * whole.count * group * partial_floats(g);
  }
  return true;
}

struct DenseWork {
  std::vector<DenseTask> tasks;
  int64_t largest = 0;
};

void cut(const Geometry& g, int64_t segments, const int64_t* q_lens, const int64_t* k_lens, int64_t rows, int workers,
         DenseWork& work) {
  int64_t most = kTaskRows;
  if (workers > 1) most = std::min(most, std::max(kLeastRows, rows * g.heads / (4 * workers)));
  work.tasks.clear();
  work.largest = 0;
  DenseTask group = {0, q_lens, k_lens, 0, 0, 0, 0, 0};
  int64_t in_group = 0, q_at = 0, k_at = 0;
  auto close = [&](int64_t next) {
    if (group.segments > 0) work.tasks.push_back(group);
    group = {0, q_lens + next, k_lens + next, q_at, k_at, 0, 0, 0};
    in_group = 0;
  };
  for (int64_t i = 0; i < segments; i++) {
    if (q_lens[i] > most) {
      close(i);
      int64_t parts = (q_lens[i] + most - 1) / most;
      for (int64_t part = 0; part < parts; part++) {
        int64_t first = q_lens[i] * part / parts, count = q_lens[i] * (part + 1) / parts - first;
        work.tasks.push_back({1, q_lens + i, k_lens + i, q_at, k_at, first, count, 0});
        work.largest = std::max(work.largest, count);
      }
    } else {
      if (in_group + q_lens[i] > most) close(i);
      group.segments++;
      in_group += q_lens[i];
      work.largest = std::max(work.largest, q_lens[i]);
    }
    q_at += q_lens[i];
    k_at += k_lens[i];
    if (q_lens[i] > most) close(i + 1);
  }
  close(segments);
}

}  // namespace
}  // namespace opsin

using namespace opsin;

// Checks a plan of so many numbers and completes its header: blocks needed, whether anything is shared.
OPSIN_EXPORT int opsin_plan(int64_t* numbers, int64_t length) {
  Plan plan = {numbers};
  if (length < Plan::kHeader || plan.sequences() < 0 || plan.tokens() < 0) return kBadPlan;
  int64_t fixed = Plan::kHeader + 4 * plan.sequences() + plan.tokens();
  if (plan.sequences() > length || plan.tokens() > length || fixed > length) return kBadPlan;
  int64_t blocks = 0, at = 0;
  thread_local std::vector<std::pair<int64_t, int64_t>> written;  // block, sequence
  written.clear();
  for (int64_t i = 0; i < plan.sequences(); i++) {
    const int64_t* s = numbers + Plan::kHeader + 4 * i;
    if (s[0] != at || s[1] < 1 || s[1] > plan.tokens() - at || s[2] < s[1]) return kBadPlan;
    if (s[3] < fixed || s[2] > (length - s[3]) * kBlock) return kBadPlan;
    for (int64_t j = 0; j * kBlock < s[2]; j++) {
      int64_t block = numbers[s[3] + j];
      if (block < 0) return kBadPlan;
      blocks = std::max(blocks, block + 1);
    }
    for (int64_t j = at; j < at + s[1]; j++) {
      int64_t slot = plan.slots()[j];
      if (slot < 0) return kBadPlan;
      blocks = std::max(blocks, slot / kBlock + 1);
      if (written.empty() || written.back() != std::pair(slot / kBlock, i)) written.emplace_back(slot / kBlock, i);
    }
    at += s[1];
  }
  if (at != plan.tokens()) return kBadPlan;
  numbers[Plan::kBlocks] = blocks;
  numbers[Plan::kShared] = 0;
  if (plan.sequences() > 1) {
    std::sort(written.begin(), written.end());
    for (int64_t i = 0; i < plan.sequences(); i++) {
      Sequence s = plan.sequence(i);
      for (int64_t j = 0; j * kBlock < s.context; j++) {
        auto found = std::lower_bound(written.begin(), written.end(), std::pair(s.blocks[j], int64_t{0}));
        for (; found != written.end() && found->first == s.blocks[j]; ++found)
          if (found->second != i) numbers[Plan::kShared] = 1;
      }
    }
  }
  return 0;
}

// One layer's attention over the cache. If k is given, first rotates q (in place) and k, by tables of `width`
// columns if that is not 0, and stores k and v. If out is given, attends.
OPSIN_EXPORT int opsin_paged(const int64_t* numbers, void* q, int64_t q_stride, const void* k, int64_t k_stride,
                             const void* v, int64_t v_stride, const float* cos, const float* sin, int64_t width,
                             void* cache, int64_t num_blocks, void* out, int64_t heads, int64_t kv_heads,
                             int64_t head_size, float scale, int64_t type) {
  Geometry g = {static_cast<int32_t>(heads), static_cast<int32_t>(kv_heads), static_cast<int32_t>(head_size), scale,
                static_cast<Type>(type)};
  if (!valid(g) || width < 0 || width > head_size || width % 2) return kBadGeometry;
  Plan plan = {numbers};
  if (plan.numbers[Plan::kBlocks] > num_blocks) return kTooFewBlocks;
  if (plan.tokens() == 0) return 0;
  const AttentionTable* table = OPSIN_PICK(attention_table);
  Rotation rotation = {cos, sin, static_cast<int32_t>(width)};
  Output queries = {q, q_stride}, results = {out, heads * head_size};
  Input keys = {k, k_stride}, values = {v, v_stride};

  auto store_all = [&](int64_t first, int64_t count) {
    constexpr int64_t some = 16;
    int64_t elements = count * (heads + 2 * kv_heads) * head_size;
    if (elements <= kSmallStore) return table->store(g, first, count, -1, plan.slots(), rotation, queries, keys, values, cache);
    run((count + some - 1) / some, false, [&](int64_t task, int) {
      int64_t at = first + task * some;
      table->store(g, at, std::min(some, first + count - at), -1, plan.slots(), rotation, queries, keys, values, cache);
    });
  };
  if (out == nullptr) {
    if (k != nullptr) store_all(0, plan.tokens());
    return 0;
  }

  int64_t products = 0;
  for (int64_t i = 0; i < plan.sequences(); i++) {
    Sequence s = plan.sequence(i);
    products += 2 * heads * head_size * s.queries * s.context;
  }
  bool alone = products <= kSmall;
  int workers = alone ? 1 : opsin_num_workers();
  thread_local PagedWork work;
  if (!cut(g, plan, workers, work)) return kNoMemory;
  // A sequence that one task attends to for each of its heads is stored by that task, while it is in the cache.
  bool inside = k != nullptr && !alone && work.ahead.size() < static_cast<size_t>(plan.sequences());
  if (k != nullptr && !inside) store_all(0, plan.tokens());
  if (inside)
    for (const Sequence& s : work.ahead) store_all(s.first, s.queries);
  std::vector<PagedTask>& tasks = work.tasks;
  // A longer context than most goes first, so that no thread ends late.
  if (!alone && plan.sequences() > 1)
    std::stable_sort(tasks.begin(), tasks.end(), [](const PagedTask& a, const PagedTask& b) {
      return a.tiles * a.count > b.tiles * b.count;
    });
  int64_t each = round_up(table->paged_workspace(g, work.largest));
  float* memory = workspace.take(each * workers);
  if (memory == nullptr) return kNoMemory;
  const PagedTask* first = tasks.data();
  run(static_cast<int64_t>(tasks.size()), alone, [&](int64_t i, int worker) {
    const PagedTask& task = first[i];
    bool whole = task.partial == nullptr && task.count == task.sequence.queries;
    if (inside && whole && !plan.numbers[Plan::kShared])
      table->store(g, task.sequence.first, task.count, task.kv_head, plan.slots(), rotation, queries, keys, values, cache);
    table->paged(g, task, {q, q_stride}, cache, results, memory + worker * each);
  });
  if (!work.split.empty()) {
    const PagedTask* split = work.split.data();
    run(static_cast<int64_t>(work.split.size()), alone, [&](int64_t i, int worker) {
      table->merge(g, split[i], results, memory + worker * each);
    });
  }
  return 0;
}

// Attention within segments of a flat batch.
OPSIN_EXPORT int opsin_dense(const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v,
                             int64_t v_stride, void* out, int64_t segments, const int64_t* q_lens,
                             const int64_t* k_lens, int64_t q_rows, int64_t k_rows, int64_t heads, int64_t head_size,
                             float scale, int64_t type) {
  Geometry g = {static_cast<int32_t>(heads), static_cast<int32_t>(heads), static_cast<int32_t>(head_size), scale,
                static_cast<Type>(type)};
  if (!valid(g)) return kBadGeometry;
  int64_t sum_q = 0, sum_k = 0, products = 0;
  for (int64_t i = 0; i < segments; i++) {
    if (q_lens[i] < 0 || k_lens[i] < 1 || q_lens[i] > q_rows - sum_q || k_lens[i] > k_rows - sum_k) return kBadPlan;
    sum_q += q_lens[i];
    sum_k += k_lens[i];
    products += 2 * heads * head_size * q_lens[i] * k_lens[i];
  }
  if (sum_q != q_rows || sum_k != k_rows) return kBadPlan;
  const AttentionTable* table = OPSIN_PICK(attention_table);
  bool alone = products <= kSmall;
  int workers = alone ? 1 : opsin_num_workers();
  thread_local DenseWork work;
  cut(g, segments, q_lens, k_lens, q_rows, workers, work);
  int64_t each = round_up(table->dense_workspace(g, work.largest));
  float* memory = workspace.take(each * workers);
  if (memory == nullptr) return kNoMemory;
  const DenseTask* first = work.tasks.data();
  run(static_cast<int64_t>(work.tasks.size()) * heads, alone, [&](int64_t i, int worker) {
    DenseTask task = first[i / heads];
    task.head = static_cast<int32_t>(i % heads);
    table->dense(g, task, {q, q_stride}, {k, k_stride}, {v, v_stride}, {out, heads * head_size},
                 memory + worker * each);
  });
  return 0;
}

// Rotates `heads` heads of each row in place.
OPSIN_EXPORT int opsin_rotate(void* x, int64_t stride, int64_t rows, int64_t heads, int64_t head_size,
                              const float* cos, const float* sin, int64_t width, int64_t type) {
  Geometry g = {static_cast<int32_t>(heads), 1, static_cast<int32_t>(head_size), 1.0f, static_cast<Type>(type)};
  if (!valid(g) || width < 0 || width > head_size || width % 2) return kBadGeometry;
  const AttentionTable* table = OPSIN_PICK(attention_table);
  Rotation rotation = {cos, sin, static_cast<int32_t>(width)};
  int64_t some = std::max<int64_t>(1, kSmallStore / 2 / (heads * head_size));
  run((rows + some - 1) / some, rows * heads * head_size <= kSmallStore, [&](int64_t task, int) {
    table->rotate(g, task * some, std::min(some, rows - task * some), rotation, {x, stride});
  });
  return 0;
}
