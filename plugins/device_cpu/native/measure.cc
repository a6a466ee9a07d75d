#include "measure.h"

#include <atomic>

#include "pool.h"

// Reads `bytes` with all workers, in as many parts as there are workers.
OPSIN_EXPORT int32_t opsin_measure_read(const void* from, int64_t bytes) {
  const int64_t parts = opsin_num_workers(), each = bytes / parts;
  std::atomic<int32_t> all{0};
  opsin::parallel_for(parts, [&](int64_t part, int) {
    all ^= OPSIN_PICK(measure_table)->read(static_cast<const char*>(from) + part * each, each);
  });
  return all;
}

// Multiplies and adds in float32 with all workers; returns how many operations.
OPSIN_EXPORT int64_t opsin_measure_multiply(int64_t rounds) {
  std::atomic<int64_t> all{0};
  opsin::parallel_for(opsin_num_workers(),
                      [&](int64_t, int) { all += OPSIN_PICK(measure_table)->multiply(rounds); });
  return all;
}
