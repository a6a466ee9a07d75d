// Parallel work. See docs/decisions/0076-cpu-native-threads.md.
#pragma once

#include <stdint.h>

extern "C" {

// fn(task, worker, arg) once for each task in 0 .. tasks - 1, in any order, on up to opsin_num_workers() threads,
// the calling one among them. Returns when all are done. `worker` is below opsin_num_workers() and differs between
// threads that run at the same time. Called from within a task, or while another thread's work occupies the
// workers, everything runs on the calling thread, as worker 0.
void opsin_parallel_for(int64_t tasks, void (*fn)(int64_t task, int worker, void* arg), void* arg);

// How many threads work, the caller included; at least 1.
int opsin_num_workers();
}

namespace opsin {

// body(task, worker) for each task.
template <class Body>
void parallel_for(int64_t tasks, const Body& body) {
  opsin_parallel_for(
      tasks, [](int64_t task, int worker, void* arg) { (*static_cast<const Body*>(arg))(task, worker); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace opsin
