// How fast this machine reads memory and multiplies: the floors that kernels are measured against.
#pragma once

#include "dispatch.h"

#include <stdint.h>

namespace opsin {

struct MeasureTable {
  // Reads all of it; the result is of no use.
  int32_t (*read)(const void* from, int64_t bytes);
  // Floating-point operations done by so many rounds.
  int64_t (*multiply)(int64_t rounds);
};

OPSIN_TABLES(MeasureTable, measure_table)

}  // namespace opsin
