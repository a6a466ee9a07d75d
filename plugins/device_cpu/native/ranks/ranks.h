// Sums and concatenations over processes that share memory: docs/decisions/0014-sums-over-ranks.md.
//
// The memory holds, for each rank, a line with the number of the last exchange it has posted, and two slots that
// exchanges use in turn. A rank posts (copies its part into its slot, then raises its number), waits until all
// numbers are there, and reads all slots. Two slots suffice: who posts exchange k + 2 has seen everyone post
// k + 1, and everyone had finished reading k by then.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace opsin {

constexpr int64_t kRankSlotBytes = int64_t{4} << 20;

enum RankDtype : int32_t { kRankFloat32 = 0, kRankBFloat16 = 1 };

}  // namespace opsin
