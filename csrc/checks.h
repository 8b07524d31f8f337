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

// Everything weighted_reduce can check; `needed` is the workspace in bytes. With n = 0 the pointers may be anything.
inline int32_t check_reduce(const shapleycam_view* activations, const shapleycam_view* gradient, const shapleycam_view* hvp,
                            int64_t n, int64_t c, int64_t s, int32_t pooling, const void* out, int32_t out_dtype,
                            const void* workspace, size_t given, size_t needed) {
  int32_t status = check_extents(n, c, s, 1);
  if (status != SHAPLEYCAM_OK) return status;
  if (pooling < SHAPLEYCAM_MEAN || pooling > SHAPLEYCAM_PLUSPLUS) return SHAPLEYCAM_BAD_POOLING;
  if (n == 0) return SHAPLEYCAM_OK;
  if ((status = check_floats(activations)) != SHAPLEYCAM_OK) return status;
  if ((status = check_floats(gradient)) != SHAPLEYCAM_OK) return status;
  if (hvp != nullptr && (status = check_floats(hvp)) != SHAPLEYCAM_OK) return status;
  if ((status = check_out(out, out_dtype, activations->dtype)) != SHAPLEYCAM_OK) return status;
  return check_workspace(workspace, given, needed);
}

// The same for channel_weighted_sum.
inline int32_t check_sum(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c, int64_t s, int64_t m,
                         const void* out, int32_t out_dtype, const void* workspace, size_t given, size_t needed) {
  int32_t status = check_extents(n, c, s, m);
  if (status != SHAPLEYCAM_OK || n == 0 || m == 0) return status;
  if ((status = check_floats(activations)) != SHAPLEYCAM_OK) return status;
  if ((status = check_out(out, out_dtype, activations->dtype)) != SHAPLEYCAM_OK) return status;
  const shapleycam_view weights = {alpha, out_dtype, 0, 0, 0};
  if ((status = check_view(&weights)) != SHAPLEYCAM_OK) return status;
  return check_workspace(workspace, given, needed);
}

inline bool volume_fits(const int64_t extents[3], int64_t n) {
  int64_t total = n > 0 ? n : 1;
  for (int i = 0; i < 3; ++i) {
    if (extents[i] < 1 || overflows(total, extents[i], &total)) return false;
  }
  return total <= INT64_MAX / 64;
}

inline int32_t check_pointer(const void* data, int32_t dtype) {
  const shapleycam_view view = {data, dtype, 0, 0, 0};
  return check_view(&view);
}

inline int32_t check_display(const void* raw, int32_t dtype, int64_t n, const int64_t* from, const int64_t* to, const void* out,
                             int32_t out_dtype) {
  if (from == nullptr || to == nullptr) return SHAPLEYCAM_NULL_POINTER;
  if (n < 0 || !volume_fits(from, n) || !volume_fits(to, n)) return SHAPLEYCAM_BAD_SHAPE;
  if (dtype != accumulation_dtype(dtype)) return SHAPLEYCAM_BAD_DTYPE;
  if (out_dtype != dtype && out_dtype != SHAPLEYCAM_FLOAT16 && out_dtype != SHAPLEYCAM_UINT8) return SHAPLEYCAM_BAD_DTYPE;
  if (n == 0) return SHAPLEYCAM_OK;
  const int32_t status = check_pointer(raw, dtype);
  return status != SHAPLEYCAM_OK ? status : check_pointer(out, out_dtype);
}

inline int32_t check_rows(const void* logits, int32_t dtype, const void* bias, int32_t bias_dtype, const int64_t* targets,
                          int64_t n, int64_t m, int64_t k, int64_t stride, int32_t utility, int32_t order, const void* rows,
                          int32_t out_dtype) {
  int64_t last = 0;
  int32_t status = check_extents(n, k, 1, m);
  if (status != SHAPLEYCAM_OK) return status;
  if (stride < 0 || overflows(n, stride, &last) || last > INT64_MAX / 16) return SHAPLEYCAM_BAD_SHAPE;
  if (utility < SHAPLEYCAM_LOGIT || utility > SHAPLEYCAM_REST || order < 1 || order > 2) return SHAPLEYCAM_BAD_UTILITY;
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  const shapleycam_view z = {logits, dtype, 0, 0, 0}, b = {bias, bias_dtype, 0, 0, 0};
  if ((status = check_floats(&z)) != SHAPLEYCAM_OK) return status;
  if (bias != nullptr && (status = check_floats(&b)) != SHAPLEYCAM_OK) return status;
  if (targets == nullptr) return SHAPLEYCAM_NULL_POINTER;
  if (reinterpret_cast<uintptr_t>(targets) % sizeof(int64_t) != 0) return SHAPLEYCAM_BAD_ALIGNMENT;
  return check_out(rows, out_dtype, dtype);
}

// The same for quadrature_rows.
inline int32_t check_integral(const void* logits, int32_t dtype, int64_t stride, const void* start, int32_t start_dtype,
                              int64_t start_stride, const int64_t* targets, int64_t n, int64_t m, int64_t k, int32_t utility,
                              const double* nodes, const double* weights, int32_t count, const void* rows, int32_t out_dtype) {
  int64_t last = 0;
  if (start_stride < 0 || (n > 0 && overflows(n, start_stride, &last)) || last > INT64_MAX / 16) return SHAPLEYCAM_BAD_SHAPE;
  if (count < 1 || count > SHAPLEYCAM_MOST_NODES) return SHAPLEYCAM_BAD_NODES;
  if (nodes == nullptr || weights == nullptr) return SHAPLEYCAM_NULL_POINTER;
  return check_rows(logits, dtype, start, start_dtype, targets, n, m, k, stride, utility, 1, rows, out_dtype);
}

// class_maps: everything its two parts check, before either runs; `s` receives the number of positions.
inline int32_t check_maps(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c, int64_t m,
                          const int64_t* from, const int64_t* to, const void* raw, int32_t raw_dtype, const void* maps,
                          int32_t maps_dtype, int64_t* s) {
  if (from == nullptr || to == nullptr) return SHAPLEYCAM_NULL_POINTER;
  int64_t images = 0;
  if (n < 0 || m < 0 || overflows(n, m, &images)) return SHAPLEYCAM_BAD_SHAPE;
  // An empty batch has no maps, but its extents are looked at all the same.
  const int32_t status = check_display(raw, raw_dtype, images, from, to, maps, maps_dtype);
  if (status != SHAPLEYCAM_OK) return status;
  *s = from[0] * from[1] * from[2];
  if (check_extents(n, c, *s, m) != SHAPLEYCAM_OK) return SHAPLEYCAM_BAD_SHAPE;
  if (images == 0) return SHAPLEYCAM_OK;
  return check_sum(activations, alpha, n, c, *s, m, raw, raw_dtype, nullptr, 0, 0);
}

inline int32_t check_overlay(const void* images, int32_t dtype, int64_t n, int64_t height, int64_t width,
                             const int64_t* strides, const float* heatmaps, const uint8_t* table, const float* mean,
                             const float* std, const uint8_t* out) {
  const int64_t extents[3] = {3, height, width};
  if (n < 0 || !volume_fits(extents, n)) return SHAPLEYCAM_BAD_SHAPE;
  if (n == 0) return SHAPLEYCAM_OK;
  if (strides == nullptr || table == nullptr || out == nullptr) return SHAPLEYCAM_NULL_POINTER;
  if ((mean == nullptr) != (std == nullptr)) return SHAPLEYCAM_NULL_POINTER;
  const int32_t status = check_pointer(images, dtype);
  return status != SHAPLEYCAM_OK ? status : check_pointer(heatmaps, SHAPLEYCAM_FLOAT32);
}

}  // namespace shapleycam

#define SHAPLEYCAM_RETURN_IF(expression)                                \
  do {                                                                  \
    const int32_t shapleycam_checked = (expression);                    \
    if (shapleycam_checked != SHAPLEYCAM_OK) return shapleycam_checked; \
  } while (0)
