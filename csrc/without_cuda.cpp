// The CUDA half of the C ABI in a build without it.
#include "include/shapleycam.h"

extern "C" {

size_t shapleycam_weighted_reduce_workspace_cuda(int64_t, int64_t, int64_t, int32_t) { return 0; }
int32_t shapleycam_weighted_reduce_cuda(const shapleycam_view*, const shapleycam_view*, const shapleycam_view*, int64_t,
                                        int64_t, int64_t, int32_t, void*, int32_t, void*, size_t, void*) {
  return SHAPLEYCAM_UNSUPPORTED;
}
size_t shapleycam_channel_weighted_sum_workspace_cuda(int64_t, int64_t, int64_t, int64_t) { return 0; }
int32_t shapleycam_channel_weighted_sum_cuda(const shapleycam_view*, const void*, int64_t, int64_t, int64_t, int64_t, void*,
                                             int32_t, void*, size_t, void*) {
  return SHAPLEYCAM_UNSUPPORTED;
}

int32_t shapleycam_display_map_cuda(const void*, int32_t, int64_t, const int64_t*, const int64_t*, int32_t, void*, int32_t,
                                    void*) {
  return SHAPLEYCAM_UNSUPPORTED;
}
int32_t shapleycam_overlay_cuda(const void*, int32_t, int64_t, int64_t, int64_t, const int64_t*, const float*, const uint8_t*,
                                float, const float*, const float*, uint8_t*, void*) {
  return SHAPLEYCAM_UNSUPPORTED;
}

int32_t shapleycam_utility_rows_cuda(const void*, int32_t, int64_t, const void*, int32_t, const int64_t*, int64_t, int64_t,
                                     int64_t, int32_t, int32_t, double, void*, int32_t, void*) {
  return SHAPLEYCAM_UNSUPPORTED;
}
int32_t shapleycam_quadrature_rows_cuda(const void*, int32_t, int64_t, const void*, int32_t, int64_t, const int64_t*, int64_t,
                                        int64_t, int64_t, int32_t, const double*, const double*, int32_t, double, void*,
                                        int32_t, void*) {
  return SHAPLEYCAM_UNSUPPORTED;
}
int32_t shapleycam_class_maps_cuda(const shapleycam_view*, const void*, int64_t, int64_t, int64_t, const int64_t*,
                                   const int64_t*, int32_t, void*, int32_t, void*, int32_t, void*, size_t, void*) {
  return SHAPLEYCAM_UNSUPPORTED;
}

}  // extern "C"
