// Runs csrc/cuda on a CPU, for tests on machines without a GPU: enough of CUDA's language for those files and no more.
//
// Every thread of a block is a fibre; the blocks of a launch run one after the other. A fibre runs until it meets a barrier or
// a shuffle, and the order in which they run changes from launch to launch, so that a missing barrier shows as a changing
// result. A barrier that not all threads reach, and a shuffle that not all lanes reach, end the program.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block at a time: what is shared in a block may be static.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint2 {
  unsigned x, y;
};

struct uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };

namespace cuda_on_cpu {

struct Fibre {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  uint64_t block_barriers = 0, warp_barriers = 0;
  bool done = false;
};

// What a launcher asked for: what tests compare, and bench/gpu_model.py reckons with.
struct Launch {
  const void* kernel;
  dim3 grid;
  unsigned threads;
  size_t shared;
};

struct State {
  std::mutex mutex;
  std::vector<Launch> log;
  bool dry = false;  // only the log is kept: nothing runs, and pointers may lead nowhere
  std::mt19937 source;
  ucontext_t scheduler;
  std::vector<Fibre> fibres;
  std::function<void()> body;
  // Exactly as large as asked for, so that AddressSanitizer sees one element more.
  std::unique_ptr<unsigned char[]> shared;
  uint64_t exchanged[1024];
  unsigned current = 0;
  dim3 thread, block, grid, threads;
  cudaError_t error = cudaSuccess;
};

inline State& state() {
  static State one;
  return one;
}

inline void* dynamic_shared() { return state().shared.get(); }

constexpr size_t kStack = 1 << 17;

inline void yield() {
  State& s = state();
  const unsigned me = s.current;
  swapcontext(&s.fibres[me].context, &s.scheduler);
  s.current = me;
  s.thread = dim3(me);
}

inline void entry() {
  State& s = state();
  s.body();
  s.fibres[s.current].done = true;
  swapcontext(&s.fibres[s.current].context, &s.scheduler);
}

// Goes on when every thread of [first, last) that is not done has come as far; `count` says how far that is.
inline void wait_for(unsigned first, unsigned last, uint64_t Fibre::* count) {
  State& s = state();
  const uint64_t mine = ++(s.fibres[s.current].*count);
  for (;;) {
    bool all = true;
    for (unsigned i = first; i < last; ++i) all = all && (s.fibres[i].*count >= mine);
    if (all) return;
    yield();
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, unsigned threads, size_t shared, Arguments... arguments) {
  State& s = state();
  const std::lock_guard<std::mutex> guard(s.mutex);
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads == 0 || threads > 1024 || shared > (48 << 10)) {
    s.error = cudaErrorInvalidConfiguration;
    return;
  }
  if (s.dry) {
    s.log.push_back({reinterpret_cast<const void*>(kernel), grid, threads, shared});
    return;
  }
  s.grid = grid;
  s.threads = dim3(threads);
  s.body = [&] { kernel(arguments...); };
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      s.block = dim3(x, y);
      s.shared.reset(new unsigned char[shared]);
      memset(s.shared.get(), 0xFF, shared);  // NaN
      s.fibres.resize(threads);
      for (Fibre& fibre : s.fibres) {
        fibre.done = false;
        fibre.block_barriers = fibre.warp_barriers = 0;
        if (!fibre.stack) fibre.stack.reset(new unsigned char[kStack]);
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStack;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, entry, 0);
      }
      std::shuffle(order.begin(), order.end(), s.source);
      for (bool alive = true; alive;) {
        alive = false;
        uint64_t before = 0, after = 0;
        for (const Fibre& fibre : s.fibres) before += fibre.done + fibre.block_barriers + fibre.warp_barriers;
        for (unsigned i : order) {
          if (s.fibres[i].done) continue;
          alive = true;
          s.current = i;
          s.thread = dim3(i);
          swapcontext(&s.scheduler, &s.fibres[i].context);
        }
        for (const Fibre& fibre : s.fibres) after += fibre.done + fibre.block_barriers + fibre.warp_barriers;
        if (alive && before == after) {
          fprintf(stderr, "cuda_on_cpu: a barrier or a shuffle that not all threads reach\n");
          abort();
        }
      }
    }
  }
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::state().thread)
#define blockIdx (cuda_on_cpu::state().block)
#define gridDim (cuda_on_cpu::state().grid)

inline void __syncthreads() {
  cuda_on_cpu::State& s = cuda_on_cpu::state();
  cuda_on_cpu::wait_for(0, s.threads.x, &cuda_on_cpu::Fibre::block_barriers);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  cuda_on_cpu::State& s = cuda_on_cpu::state();
  if (mask != 0xffffffffu || lane_mask < 0 || lane_mask > 31) abort();
  const unsigned first = s.current / 32 * 32, last = std::min(first + 32, s.threads.x);
  memcpy(&s.exchanged[s.current], &value, sizeof(value));
  cuda_on_cpu::wait_for(first, last, &cuda_on_cpu::Fibre::warp_barriers);
  T other;
  memcpy(&other, &s.exchanged[s.current ^ static_cast<unsigned>(lane_mask)], sizeof(other));
  cuda_on_cpu::wait_for(first, last, &cuda_on_cpu::Fibre::warp_barriers);
  return other;
}

template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    fprintf(stderr, "cuda_on_cpu: a load of %zu bytes that is not aligned\n", sizeof(T));
    abort();
  }
  return *p;
}

template <typename T>
void __stwb(T* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    fprintf(stderr, "cuda_on_cpu: a store of %zu bytes that is not aligned\n", sizeof(T));
    abort();
  }
  memcpy(p, &value, sizeof(value));
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::state().error, cudaSuccess); }

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
using std::exp;
using std::nan;
using std::rint;
