// The argument checks that the CPU and the CUDA entry points share.
#pragma once

#include "include/shapleycam.h"

namespace shapleycam {

inline size_t element_size(int32_t dtype) {
  switch (dtype) {
    case SHAPLEYCAM_FLOAT32:
      return 4;
    case SHAPLEYCAM_FLOAT64:
      return 8;
    case SHAPLEYCAM_FLOAT16:
    case SHAPLEYCAM_BFLOAT16:
      return 2;
    case SHAPLEYCAM_UINT8:
      return 1;
    default:
      return 0;
  }
}

inline bool is_float(int32_t dtype) { return dtype >= SHAPLEYCAM_FLOAT32 && dtype <= SHAPLEYCAM_BFLOAT16; }

inline int32_t accumulation_dtype(int32_t dtype) {
  return dtype == SHAPLEYCAM_FLOAT64 ? SHAPLEYCAM_FLOAT64 : SHAPLEYCAM_FLOAT32;
}

inline bool overflows(int64_t a, int64_t b, int64_t* product) { return __builtin_mul_overflow(a, b, product); }

inline int32_t check_extents(int64_t n, int64_t c, int64_t s, int64_t m) {
  if (n < 0 || c < 1 || s < 1 || m < 0) return SHAPLEYCAM_BAD_SHAPE;
  int64_t total = 0;
  if (overflows(n, c, &total) || overflows(total, s, &total) || total > INT64_MAX / 16) return SHAPLEYCAM_BAD_SHAPE;
  if (overflows(n, m, &total) || overflows(total, c > s ? c : s, &total) || total > INT64_MAX / 16) return SHAPLEYCAM_BAD_SHAPE;
  return SHAPLEYCAM_OK;
}

inline int32_t check_view(const shapleycam_view* view) {
  if (view == nullptr || view->data == nullptr) return SHAPLEYCAM_NULL_POINTER;
  const size_t size = element_size(view->dtype);
  if (size == 0) return SHAPLEYCAM_BAD_DTYPE;
  if (reinterpret_cast<uintptr_t>(view->data) % size != 0) return SHAPLEYCAM_BAD_ALIGNMENT;
  return SHAPLEYCAM_OK;
}

inline int32_t check_floats(const shapleycam_view* view) {
  if (view != nullptr && !is_float(view->dtype)) return SHAPLEYCAM_BAD_DTYPE;
  return check_view(view);
}

inline int32_t check_out(const void* out, int32_t out_dtype, int32_t dtype) {
  if (out == nullptr) return SHAPLEYCAM_NULL_POINTER;
  if (out_dtype != accumulation_dtype(dtype)) return SHAPLEYCAM_BAD_DTYPE;
  if (reinterpret_cast<uintptr_t>(out) % element_size(out_dtype) != 0) return SHAPLEYCAM_BAD_ALIGNMENT;
  return SHAPLEYCAM_OK;
}

inline int32_t check_workspace(const void* workspace, size_t given, size_t needed) {
  if (needed == 0) return SHAPLEYCAM_OK;
  if (workspace == nullptr) return SHAPLEYCAM_NULL_POINTER;
  if (given < needed) return SHAPLEYCAM_SMALL_WORKSPACE;
  if (reinterpret_cast<uintptr_t>(workspace) % 16 != 0) return SHAPLEYCAM_BAD_ALIGNMENT;
  return SHAPLEYCAM_OK;
}

}  // namespace shapleycam

#define SHAPLEYCAM_RETURN_IF(expression)                                \
  do {                                                                  \
    const int32_t shapleycam_checked = (expression);                    \
    if (shapleycam_checked != SHAPLEYCAM_OK) return shapleycam_checked; \
  } while (0)
