// Threads of our own that sleep while there is nothing to do, or those of the OpenMP library that torch uses.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "dispatch.h"

namespace {

using Fn = void (*)(int64_t, int, void*);

void relax() {
#if OPSIN_X86
  __builtin_ia32_pause();
#elif OPSIN_ARM
  asm volatile("yield");
#endif
}

struct Job {
  int64_t tasks;
  Fn fn;
  void* arg;
};

thread_local bool inside = false;  // this thread is running a task

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int worker = 1; worker < threads; ++worker) std::thread([this, worker] { work(worker); }).detach();
  }

  int threads() const { return threads_; }

  void run(const Job& job) {
    job_ = job;
    next_.store(0, std::memory_order_relaxed);
    // Opens the door: workers that see the new turn may come in. Late ones find it closed and go back to sleep,
    // so nobody waits for a thread that the system has not scheduled.
    const uint32_t turn = turn_.load(std::memory_order_relaxed) + 1;
    door_.store(kOpen, std::memory_order_relaxed);
    turn_.store(turn, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) turn_.notify_all();
    take(0);
    uint32_t in = door_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    for (int spins = 0; in != 0; in = door_.load(std::memory_order_acquire)) {
      if (++spins < kTailSpins) {
        relax();
      } else {
        door_.wait(in, std::memory_order_acquire);
      }
    }
  }

  std::mutex mutex;  // one caller at a time
  std::atomic<int> spins{2000};

 private:
  static constexpr uint32_t kOpen = 1u << 31;
  static constexpr int kTailSpins = 20000;

  void take(int worker) {
    inside = true;
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < job_.tasks;) {
      job_.fn(task, worker, job_.arg);
    }
    inside = false;
  }

  [[noreturn]] void work(int worker) {
    uint32_t seen = 0;
    while (true) {
      const int limit = spins.load(std::memory_order_relaxed);
      for (int i = 0; i < limit && turn_.load(std::memory_order_relaxed) == seen; ++i) relax();
      if (turn_.load(std::memory_order_acquire) == seen) {
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        turn_.wait(seen, std::memory_order_seq_cst);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
      }
      seen = turn_.load(std::memory_order_acquire);
      uint32_t door = door_.load(std::memory_order_acquire);
      bool entered = false;
      while ((door & kOpen) != 0 && !entered) {
        entered = door_.compare_exchange_weak(door, door + 1, std::memory_order_acq_rel);
      }
      if (!entered) continue;
      take(worker);
      if (door_.fetch_sub(1, std::memory_order_acq_rel) == 1) door_.notify_one();
    }
  }

  const int threads_;
  Job job_{};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
  alignas(64) std::atomic<uint32_t> door_{0};  // kOpen, and how many workers are inside
  alignas(64) std::atomic<int> sleeping_{0};
};

std::atomic<Pool*> pool{nullptr};
std::mutex making;

// A child process has none of its parent's threads. What it inherits is never freed: a thread that was inside
// may have held it.
void forget_after_fork() {
  pool.store(nullptr);
  new (&making) std::mutex;
}

int wanted = 1;
int spin_limit = 2000;

Pool* the_pool() {
  Pool* made = pool.load(std::memory_order_acquire);
  if (made != nullptr && made->threads() == wanted) return made;
  std::lock_guard<std::mutex> lock(making);
  made = pool.load(std::memory_order_acquire);
  if (made == nullptr || made->threads() != wanted) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
    static_cast<void>(registered);
    made = new Pool(wanted);  // a smaller or larger one before it sleeps from now on
    made->spins = spin_limit;
    pool.store(made, std::memory_order_release);
  }
  return made;
}

// GNU OpenMP: GOMP_parallel(fn, data, threads, flags) runs fn(data) on a team (libgomp/parallel.c).
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

struct Team {
  Job job;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
};

void join_team(void* data) {
  auto& team = *static_cast<Team*>(data);
  const int worker = team.workers.fetch_add(1, std::memory_order_relaxed);
  inside = true;
  for (int64_t task; (task = team.next.fetch_add(1, std::memory_order_relaxed)) < team.job.tasks;) {
    team.job.fn(task, worker, team.job.arg);
  }
  inside = false;
}

void alone(const Job& job) {
  const bool outer = inside;
  inside = true;
  for (int64_t task = 0; task < job.tasks; ++task) job.fn(task, 0, job.arg);
  inside = outer;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void opsin_parallel_for(int64_t tasks, Fn fn, void* arg) {
  const Job job{tasks, fn, arg};
  if (tasks <= 1 || wanted <= 1 || inside) return alone(job);
  if (gomp_parallel != nullptr) {
    Team team{job, {}, {}};
    gomp_parallel(join_team, &team, static_cast<unsigned>(wanted), 0);
    return;
  }
  Pool* made = the_pool();
  std::unique_lock<std::mutex> lock(made->mutex, std::try_to_lock);
  if (!lock.owns_lock()) return alone(job);
  made->run(job);
}

__attribute__((visibility("default"))) int opsin_num_workers() { return wanted; }

// How many threads work from now on; not while work is under way.
__attribute__((visibility("default"))) void opsin_set_workers(int threads) { wanted = threads < 1 ? 1 : threads; }

// How many rounds an idle worker looks for work before it sleeps.
__attribute__((visibility("default"))) void opsin_set_spins(int rounds) {
  spin_limit = rounds;
  if (Pool* made = pool.load()) made->spins = rounds;
}

// Use the OpenMP library whose GOMP_parallel this is; null: threads of our own.
__attribute__((visibility("default"))) void opsin_set_gomp(void* function) {
  gomp_parallel = reinterpret_cast<GompParallel>(function);
}
}
