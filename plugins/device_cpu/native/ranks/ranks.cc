#include "ranks.h"

#include <atomic>
#include <cstring>
#include <ctime>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <sched.h>

namespace opsin {
namespace {

struct alignas(64) Line {
  std::atomic<uint32_t> posted;
  std::atomic<uint32_t> sleepers;
};
static_assert(sizeof(Line) == 64 && std::atomic<uint32_t>::is_always_lock_free);

Line* line_of(void* area, int32_t rank) { return static_cast<Line*>(area) + rank; }

char* slot_of(void* area, int32_t world, int32_t rank, uint32_t exchange) {
  const int64_t at = int64_t{64} * world + (int64_t{rank} * 2 + exchange % 2) * kRankSlotBytes;
  return static_cast<char*>(area) + at;
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Not FUTEX_PRIVATE_FLAG: the word is shared between processes.
void sleep_on(std::atomic<uint32_t>& word, uint32_t seen, int64_t nanoseconds) {
#ifdef __linux__
  const timespec time{nanoseconds / 1000000000, nanoseconds % 1000000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &time, nullptr, 0);
#else
  (void)word, (void)seen, (void)nanoseconds;
  sched_yield();
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#ifdef __linux__
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

void post(void* area, int32_t rank, uint32_t exchange) {
  Line* line = line_of(area, rank);
  line->posted.store(exchange, std::memory_order_seq_cst);
  if (line->sleepers.load(std::memory_order_seq_cst) != 0) wake_all(line->posted);
}

// Whether all ranks have posted the exchange, after at most `milliseconds`.
bool all_posted(void* area, int32_t world, uint32_t exchange, int32_t spins, int32_t milliseconds) {
  const int64_t until = now_ns() + int64_t{milliseconds} * 1000000;
  for (int32_t rank = 0; rank < world; ++rank) {
    Line* line = line_of(area, rank);
    const auto there = [&](uint32_t posted) { return static_cast<int32_t>(posted - exchange) >= 0; };
    for (int32_t spin = 0; spin < spins && !there(line->posted.load(std::memory_order_acquire)); ++spin)
      pause_briefly();
    while (true) {
      if (there(line->posted.load(std::memory_order_acquire))) break;
      const int64_t left = until - now_ns();
      if (left <= 0) return false;
      line->sleepers.fetch_add(1, std::memory_order_seq_cst);
      const uint32_t posted = line->posted.load(std::memory_order_seq_cst);
      if (!there(posted)) sleep_on(line->posted, posted, left);
      line->sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
  }
  return true;
}

float widened(float x) { return x; }

struct BFloat16 {
  uint16_t bits;
};

float widened(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

void narrowed(float x, float& out) { out = x; }
void narrowed(float x, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);  // to the nearest, ties to even
  out.bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded >> 16);
}

// In the order of the ranks on every rank, so that all come to the same bits.
template <typename T>
void sum_slots(void* area, int32_t world, uint32_t exchange, int64_t count, T* out) {
  constexpr int64_t kBlock = 1024;
  float sums[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t n = count - first < kBlock ? count - first : kBlock;
    for (int32_t rank = 0; rank < world; ++rank) {
      const T* part = reinterpret_cast<const T*>(slot_of(area, world, rank, exchange)) + first;
      if (rank == 0)
        for (int64_t i = 0; i < n; ++i) sums[i] = widened(part[i]);
      else
        for (int64_t i = 0; i < n; ++i) sums[i] += widened(part[i]);
    }
    for (int64_t i = 0; i < n; ++i) narrowed(sums[i], out[first + i]);
  }
}

}  // namespace
}  // namespace opsin

using namespace opsin;

OPSIN_EXPORT int64_t opsin_ranks_bytes(int32_t world) { return world * (64 + 2 * kRankSlotBytes); }

OPSIN_EXPORT int64_t opsin_ranks_slot_bytes() { return kRankSlotBytes; }

// Writes the sum of x over all ranks to x. 0: done; 1: not all are there yet, to be called again with `posted`
// set; -1: refused.
OPSIN_EXPORT int32_t opsin_ranks_sum(void* area, int32_t world, int32_t rank, uint32_t exchange, int32_t dtype,
                                     void* x, int64_t count, int32_t posted, int32_t spins, int32_t milliseconds) {
  const int64_t width = dtype == kRankFloat32 ? 4 : 2;
  if (world < 1 || rank < 0 || rank >= world || count < 0 || count * width > kRankSlotBytes || dtype < 0 ||
      dtype > kRankBFloat16)
    return -1;
  if (!posted) {
    std::memcpy(slot_of(area, world, rank, exchange), x, count * width);
    post(area, rank, exchange);
  }
  if (!all_posted(area, world, exchange, spins, milliseconds)) return 1;
  if (dtype == kRankFloat32) sum_slots(area, world, exchange, count, static_cast<float*>(x));
  if (dtype == kRankBFloat16) sum_slots(area, world, exchange, count, static_cast<BFloat16*>(x));
  return 0;
}

// Writes the rows of all ranks' matrices side by side to out: rows x (sum of widths) bytes. As opsin_ranks_sum.
OPSIN_EXPORT int32_t opsin_ranks_gather(void* area, int32_t world, int32_t rank, uint32_t exchange, const void* x,
                                        int64_t rows, const int64_t* widths, void* out, int32_t posted,
                                        int32_t spins, int32_t milliseconds) {
  if (world < 1 || rank < 0 || rank >= world || rows < 0) return -1;
  int64_t whole = 0;
  for (int32_t other = 0; other < world; ++other) {
    if (widths[other] < 0 || rows * widths[other] > kRankSlotBytes) return -1;
    whole += widths[other];
  }
  if (!posted) {
    std::memcpy(slot_of(area, world, rank, exchange), x, rows * widths[rank]);
    post(area, rank, exchange);
  }
  if (!all_posted(area, world, exchange, spins, milliseconds)) return 1;
  char* at = static_cast<char*>(out);
  for (int32_t other = 0; other < world; ++other) {
    const char* part = slot_of(area, world, other, exchange);
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(at + row * whole, part + row * widths[other], widths[other]);
    at += widths[other];
  }
  return 0;
}

// The first rank that has not posted the exchange, -1 if all have.
OPSIN_EXPORT int32_t opsin_ranks_missing(void* area, int32_t world, uint32_t exchange) {
  for (int32_t rank = 0; rank < world; ++rank)
    if (static_cast<int32_t>(line_of(area, rank)->posted.load(std::memory_order_acquire) - exchange) < 0) return rank;
  return -1;
}
