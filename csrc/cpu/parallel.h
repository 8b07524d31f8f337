// Runs tasks on the caller's number of threads. There is no pool: a library inside somebody's process has no business with
// threads that outlive a call, and a call worth sharing out is worth starting them.
#pragma once

#include <stdint.h>

#include <thread>

namespace shapleycam {

// Starting a thread was seen to cost 100 to 200 microseconds on a virtual machine, in which one core reads 4 to 8 MiB.
constexpr int64_t kBytesPerThread = 8 << 20;
constexpr int kMostThreads = 64;

template <typename Body>
inline void run_range(Body& body, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) body(i);
}

template <typename Body>
inline void parallel(int64_t count, int64_t bytes, int32_t threads, Body body) {
  int64_t workers = threads < kMostThreads ? threads : kMostThreads;
  if (workers > bytes / kBytesPerThread) workers = bytes / kBytesPerThread;
  if (workers > count) workers = count;
  if (workers <= 1) {
    run_range(body, 0, count);
    return;
  }
  std::thread others[kMostThreads];
  int64_t started = 1;
  for (; started < workers; ++started) {
    const int64_t from = count * started / workers, to = count * (started + 1) / workers;
    try {
      others[started] = std::thread([&body, from, to] { run_range(body, from, to); });
    } catch (...) {
      break;  // the system gives no more threads: the caller's does what is left
    }
  }
  run_range(body, 0, count / workers);
  for (int64_t i = 1; i < started; ++i) others[i].join();
  if (started < workers) run_range(body, count * started / workers, count);
}

}  // namespace shapleycam
