// The CPU half of the C ABI: checks, splits the work into tasks, and runs them on the caller's number of threads.
#include <stdlib.h>
#include <string.h>

#include "../checks.h"
#include "../pooling.h"
#include "parallel.h"
#include "task.h"

namespace shapleycam {

namespace {

const Kernels& choose() {
#if defined(SHAPLEYCAM_X86_VARIANTS)
  const char* wish = getenv("SHAPLEYCAM_CPU_VARIANT");
  const auto wished = [wish](const char* name) { return wish != nullptr && strcmp(wish, name) == 0; };
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !wished("baseline")) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return wide && !wished("avx2") ? avx512_kernels() : avx2_kernels();
  }
#endif
  return baseline_kernels();
}

// How many pieces an image's channels are cut into. It depends on extents and layout alone, so that results do not depend on
// the number of threads: enough pieces for eight workers, at least 64 channels in each, at most as many as the layout allows.
int64_t pieces_of(int64_t n, int64_t c, int64_t most_channels) {
  const int64_t least = (c + most_channels - 1) / most_channels;
  const int64_t wanted = n >= 8 ? 1 : (8 + n - 1) / (n > 0 ? n : 1);
  const int64_t most = c / 64 > 1 ? c / 64 : 1;
  const int64_t pieces = wanted < most ? wanted : most;
  return pieces > least ? pieces : least;
}

struct Split {
  int64_t pieces, size;
  int64_t first(int64_t piece) const { return piece * size; }
  int64_t count(int64_t piece, int64_t c) const {
    const int64_t rest = c - first(piece);
    return rest < size ? rest : size;
  }
};

Split split_of(int64_t n, int64_t c, bool last) {
  const int64_t pieces = pieces_of(n, c, last ? kBlock : kMostAdded), size = (c + pieces - 1) / pieces;
  return {(c + size - 1) / size, size};
}

size_t partial_bytes(int64_t n, int64_t c, int64_t s, int64_t m) {
  if (n == 0 || check_extents(n, c, s, m) != SHAPLEYCAM_OK) return 0;
  const int64_t pieces = split_of(n, c, false).pieces;  // the more of both layouts, which is not known yet
  int64_t bytes = 0;
  if (pieces == 1) return 0;
  if (overflows(n * pieces, m, &bytes) || overflows(bytes, s * 8, &bytes)) return SIZE_MAX;
  return static_cast<size_t>(bytes);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace shapleycam

using namespace shapleycam;

extern "C" {

const char* shapleycam_status_text(int32_t status) {
  switch (status) {
    case SHAPLEYCAM_OK:
      return "ok";
    case SHAPLEYCAM_NULL_POINTER:
      return "a required pointer is null";
    case SHAPLEYCAM_BAD_SHAPE:
      return "a size is negative, C or S is zero, or the element count overflows";
    case SHAPLEYCAM_BAD_DTYPE:
      return "an unknown dtype, or an output that is not of the accumulation type";
    case SHAPLEYCAM_BAD_POOLING:
      return "an unknown pooling";
    case SHAPLEYCAM_SMALL_WORKSPACE:
      return "the workspace is smaller than needed";
    case SHAPLEYCAM_BAD_ALIGNMENT:
      return "a pointer is not aligned";
    case SHAPLEYCAM_UNSUPPORTED:
      return "this build does not implement the call";
    case SHAPLEYCAM_LAUNCH_FAILED:
      return "CUDA refused the launch";
    case SHAPLEYCAM_BAD_UTILITY:
      return "an unknown utility, or an order that is not 1 or 2";
    case SHAPLEYCAM_BAD_NODES:
      return "fewer than 1 or more than 32 nodes";
    default:
      return "unknown status";
  }
}

const char* shapleycam_cpu_variant(void) { return kernels().name; }

size_t shapleycam_weighted_reduce_workspace_cpu(int64_t n, int64_t c, int64_t s, int32_t) { return partial_bytes(n, c, s, 1); }

int32_t shapleycam_weighted_reduce_cpu(const shapleycam_view* activations, const shapleycam_view* gradient,
                                       const shapleycam_view* hvp, int64_t n, int64_t c, int64_t s, int32_t pooling, void* out,
                                       int32_t out_dtype, void* workspace, size_t workspace_size, int32_t threads) {
  SHAPLEYCAM_RETURN_IF(check_reduce(activations, gradient, hvp, n, c, s, pooling, out, out_dtype, workspace, workspace_size,
                                    partial_bytes(n, c, s, 1)));
  if (n == 0) return SHAPLEYCAM_OK;
  const bool wide = out_dtype == SHAPLEYCAM_FLOAT64;
  const int64_t element = wide ? 8 : 4;
  const Split split = split_of(n, c, channels_last(activations));
  char* parts = static_cast<char*>(split.pieces == 1 ? out : workspace);
  const Kernels& use = kernels();
  const shapleycam_view none = {nullptr, SHAPLEYCAM_FLOAT32, 0, 0, 0};
  const int64_t bytes = n * c * s * static_cast<int64_t>(element_size(activations->dtype)) * 2;
  parallel(n * split.pieces, bytes, threads, [&](int64_t i) {
    const int64_t image = i / split.pieces, piece = i % split.pieces;
    const ReduceTask task = {*activations,
                             *gradient,
                             hvp != nullptr ? *hvp : none,
                             image,
                             split.first(piece),
                             split.count(piece, c),
                             s,
                             pooling,
                             parts + i * s * element};
    (wide ? use.reduce_f64 : use.reduce_f32)(task);
  });
  if (split.pieces > 1) {
    for (int64_t image = 0; image < n; ++image) {
      (wide ? use.add_f64 : use.add_f32)(static_cast<char*>(out) + image * s * element,
                                         parts + image * split.pieces * s * element, s, split.pieces, s);
    }
  }
  return SHAPLEYCAM_OK;
}

size_t shapleycam_channel_weighted_sum_workspace_cpu(int64_t n, int64_t c, int64_t s, int64_t m) {
  return partial_bytes(n, c, s, m);
}

int32_t shapleycam_channel_weighted_sum_cpu(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c,
                                            int64_t s, int64_t m, void* out, int32_t out_dtype, void* workspace,
                                            size_t workspace_size, int32_t threads) {
  SHAPLEYCAM_RETURN_IF(
      check_sum(activations, alpha, n, c, s, m, out, out_dtype, workspace, workspace_size, partial_bytes(n, c, s, m)));
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  const bool wide = out_dtype == SHAPLEYCAM_FLOAT64;
  const int64_t element = wide ? 8 : 4;
  const Split split = split_of(n, c, channels_last(activations));
  char* parts = static_cast<char*>(split.pieces == 1 ? out : workspace);
  const Kernels& use = kernels();
  const int64_t bytes = n * c * s * static_cast<int64_t>(element_size(activations->dtype));
  parallel(n * split.pieces, bytes, threads, [&](int64_t i) {
    const int64_t image = i / split.pieces, first = split.first(i % split.pieces);
    const SumTask task = {*activations,
                          static_cast<const char*>(alpha) + (image * m * c + first) * element,
                          c,
                          image,
                          first,
                          split.count(i % split.pieces, c),
                          s,
                          m,
                          parts + i * m * s * element,
                          s};
    (wide ? use.sum_f64 : use.sum_f32)(task);
  });
  if (split.pieces > 1) {
    for (int64_t image = 0; image < n; ++image) {
      (wide ? use.add_f64 : use.add_f32)(static_cast<char*>(out) + image * m * s * element,
                                         parts + image * split.pieces * m * s * element, m * s, split.pieces, m * s);
    }
  }
  return SHAPLEYCAM_OK;
}

}  // extern "C"
