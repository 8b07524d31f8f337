// What the launchers asked for, for tests/ops/test_launches.py and bench/gpu_launches.py: by ctypes, from the emulator.
#include <dlfcn.h>

#include "cuda_runtime.h"

#define SHAPLEYCAM_EXPORTED extern "C" __attribute__((visibility("default")))

// From now on launches are only logged (1), or run again (0); the log is emptied.
SHAPLEYCAM_EXPORTED void cuda_on_cpu_dry(int dry) {
  cuda_on_cpu::state().dry = dry != 0;
  cuda_on_cpu::state().log.clear();
}

// A launch as six numbers: where the kernel's code is in this library, the grid's x, y and z, threads, dynamic shared memory in
// bytes. Returns how many launches there are; at most `room` are written.
SHAPLEYCAM_EXPORTED int64_t cuda_on_cpu_launches(int64_t* to, int64_t room) {
  const auto& log = cuda_on_cpu::state().log;
  Dl_info here = {};
  dladdr(reinterpret_cast<const void*>(&cuda_on_cpu_launches), &here);
  for (size_t i = 0; i < log.size() && static_cast<int64_t>(i) < room; ++i) {
    const cuda_on_cpu::Launch& l = log[i];
    const int64_t at = static_cast<const char*>(l.kernel) - static_cast<const char*>(here.dli_fbase);
    const int64_t row[6] = {at, l.grid.x, l.grid.y, l.grid.z, l.threads, static_cast<int64_t>(l.shared)};
    memcpy(to + 6 * i, row, sizeof(row));
  }
  return static_cast<int64_t>(log.size());
}
