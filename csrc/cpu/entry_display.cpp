// display_map and overlay of the C ABI on the CPU.
#include "../checks.h"
#include "parallel.h"
#include "task.h"

using namespace shapleycam;

extern "C" {

int32_t shapleycam_display_map_cpu(const void* raw, int32_t dtype, int64_t n, const int64_t* from, const int64_t* to,
                                   int32_t renormalize, void* out, int32_t out_dtype, int32_t threads) {
  SHAPLEYCAM_RETURN_IF(check_display(raw, dtype, n, from, to, out, out_dtype));
  if (n == 0) return SHAPLEYCAM_OK;
  const int64_t read = from[0] * from[1] * from[2], written = to[0] * to[1] * to[2];
  const Kernels& use = kernels();
  const int64_t step_in = read * static_cast<int64_t>(element_size(dtype));
  const int64_t step_out = written * static_cast<int64_t>(element_size(out_dtype));
  parallel(n, n * written * 16, threads, [&](int64_t i) {
    const DisplayTask task = {static_cast<const char*>(raw) + i * step_in,
                              {from[0], from[1], from[2]},
                              {to[0], to[1], to[2]},
                              renormalize != 0,
                              static_cast<char*>(out) + i * step_out,
                              out_dtype};
    (dtype == SHAPLEYCAM_FLOAT64 ? use.display_f64 : use.display_f32)(task);
  });
  return SHAPLEYCAM_OK;
}

int32_t shapleycam_overlay_cpu(const void* images, int32_t dtype, int64_t n, int64_t height, int64_t width,
                               const int64_t* strides, const float* heatmaps, const uint8_t* table, float alpha,
                               const float* mean, const float* std, uint8_t* out, int32_t threads) {
  SHAPLEYCAM_RETURN_IF(check_overlay(images, dtype, n, height, width, strides, heatmaps, table, mean, std, out));
  if (n == 0) return SHAPLEYCAM_OK;
  const Kernels& use = kernels();
  const int64_t pixels = height * width;
  parallel(n * height, n * pixels * 48, threads, [&](int64_t i) {
    const int64_t image = i / height, row = i % height;
    const int64_t offset = image * strides[0] + row * strides[2];
    OverlayTask task = {};
    task.image = static_cast<const char*>(images) + offset * static_cast<int64_t>(element_size(dtype));
    task.dtype = dtype;
    task.stride_c = strides[1];
    task.stride_h = strides[2];
    task.stride_w = strides[3];
    task.height = 1;
    task.width = width;
    task.heat = heatmaps + image * pixels + row * width;
    task.table = table;
    task.alpha = alpha;
    for (int c = 0; c < 3; ++c) {
      task.scale[c] = std != nullptr ? std[c] : 1.0f;
      task.shift[c] = mean != nullptr ? mean[c] : 0.0f;
    }
    task.out = out + (image * pixels + row * width) * 3;
    use.overlay(task);
  });
  return SHAPLEYCAM_OK;
}

}  // extern "C"
