// Runs tasks on the caller's number of threads.
//
// Where the process has an OpenMP runtime, its pool is used. PyTorch brings one, and its threads spin for a while after every
// operator: others beside them would compete for the cores. Elsewhere threads are started for the call, since a library inside
// somebody's process has no business with threads that outlive it.
#pragma once

#include <dlfcn.h>
#include <stdint.h>

#include <atomic>
#include <initializer_list>
#include <thread>

namespace shapleycam {

// What a thread has to have to do. Waking one of a pool was seen to cost 5 to 50 microseconds, starting one 100 to 200; a core
// reads 4 to 8 MiB in the latter.
constexpr int64_t kBytesPerWoken = 256 << 10;
constexpr int64_t kBytesPerStarted = 8 << 20;
constexpr int kMostStarted = 64;

// GNU's entry to a parallel region, which the LLVM and Intel runtimes have too: (body, argument, threads, flags).
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The process's own, wherever it is: some of PyTorch's packages (those for Arm) load theirs out of sight of the global lookup.
inline OpenMP find_openmp() {
  void* entry = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  for (const char* name : {"libgomp.so.1", "libomp.so", "libomp.so.5", "libiomp5.so"}) {
    if (entry != nullptr) break;
    void* loaded = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);  // kept: its threads outlive every call
    if (loaded != nullptr) entry = dlsym(loaded, "GOMP_parallel");
  }
  return reinterpret_cast<OpenMP>(entry);
}

inline OpenMP openmp() {
  static const OpenMP found = find_openmp();
  return found;
}

// Tasks are handed out in small batches, so that a thread that the system holds up does not hold up the rest.
template <typename Body>
struct Tasks {
  const Body& body;
  int64_t count, batch;
  std::atomic<int64_t> next{0};

  static void work(void* self) noexcept {
    Tasks& tasks = *static_cast<Tasks*>(self);
    for (;;) {
      const int64_t from = tasks.next.fetch_add(tasks.batch, std::memory_order_relaxed);
      if (from >= tasks.count) return;
      const int64_t to = from + tasks.batch < tasks.count ? from + tasks.batch : tasks.count;
      for (int64_t i = from; i < to; ++i) tasks.body(i);
    }
  }
};

// body(i) for i in [0, count), in any order; `bytes` says how much memory all of them move.
template <typename Body>
inline void parallel(int64_t count, int64_t bytes, int32_t threads, const Body& body) {
  const OpenMP pool = threads > 1 ? openmp() : nullptr;
  int64_t workers = bytes / (pool != nullptr ? kBytesPerWoken : kBytesPerStarted);
  if (workers > threads) workers = threads;
  if (workers > count) workers = count;
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  Tasks<Body> tasks{body, count, (count - 1) / (workers * 32) + 1};
  if (pool != nullptr) {
    // Always the whole team: a smaller one would end the pool's other threads, and the next larger one start them again.
    pool(Tasks<Body>::work, &tasks, static_cast<unsigned>(threads), 0);
    return;
  }
  std::thread others[kMostStarted];
  int64_t started = 0;
  try {
    for (; started + 1 < workers && started < kMostStarted; ++started) {
      others[started] = std::thread(Tasks<Body>::work, &tasks);
    }
  } catch (...) {  // the system gives no more threads: those that there are do everything
  }
  Tasks<Body>::work(&tasks);
  for (int64_t i = 0; i < started; ++i) others[i].join();
}

}  // namespace shapleycam
