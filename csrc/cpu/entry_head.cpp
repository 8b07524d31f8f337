// utility_rows, quadrature_rows and class_maps of the C ABI on the CPU.
#include "../checks.h"
#include "parallel.h"
#include "task.h"

using namespace shapleycam;

extern "C" {

int32_t shapleycam_utility_rows_cpu(const void* logits, int32_t dtype, int64_t stride, const void* bias, int32_t bias_dtype,
                                    const int64_t* targets, int64_t n, int64_t m, int64_t k, int32_t utility, int32_t order,
                                    double scale, void* rows, int32_t out_dtype, int32_t threads) {
  SHAPLEYCAM_RETURN_IF(check_rows(logits, dtype, bias, bias_dtype, targets, n, m, k, stride, utility, order, rows, out_dtype));
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  const bool wide = out_dtype == SHAPLEYCAM_FLOAT64;
  const Kernels& use = kernels();
  const int64_t step = stride * static_cast<int64_t>(element_size(dtype));
  // An exponential costs as much as a few dozen bytes.
  parallel(n, n * k * (64 + 8 * m), threads, [&](int64_t i) {
    const RowsTask task = {{static_cast<const char*>(logits) + i * step, dtype, 0, 0, 1},
                           {bias, bias_dtype, 0, 0, 1},
                           targets + i * m,
                           m,
                           k,
                           utility,
                           order,
                           scale,
                           static_cast<char*>(rows) + i * m * k * (wide ? 8 : 4),
                           nullptr,
                           nullptr,
                           0};
    (wide ? use.rows_f64 : use.rows_f32)(task);
  });
  return SHAPLEYCAM_OK;
}

int32_t shapleycam_quadrature_rows_cpu(const void* logits, int32_t dtype, int64_t stride, const void* start,
                                       int32_t start_dtype, int64_t start_stride, const int64_t* targets, int64_t n, int64_t m,
                                       int64_t k, int32_t utility, const double* nodes, const double* weights, int32_t count,
                                       double scale, void* rows, int32_t out_dtype, int32_t threads) {
  SHAPLEYCAM_RETURN_IF(check_integral(logits, dtype, stride, start, start_dtype, start_stride, targets, n, m, k, utility, nodes,
                                      weights, count, rows, out_dtype));
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  const bool wide = out_dtype == SHAPLEYCAM_FLOAT64;
  const Kernels& use = kernels();
  const int64_t step = stride * static_cast<int64_t>(element_size(dtype));
  const int64_t start_step = start == nullptr ? 0 : start_stride * static_cast<int64_t>(element_size(start_dtype));
  // A vectorised exponential costs as much as a dozen bytes.
  const int64_t bytes = n * k * (int64_t(wide ? 64 : 12) * count + 8 * m);
  parallel(n, bytes, threads, [&](int64_t i) {
    const RowsTask task = {
        {static_cast<const char*>(logits) + i * step, dtype, 0, 0, 1},
        {start == nullptr ? nullptr : static_cast<const char*>(start) + i * start_step, start_dtype, 0, 0, 1},
        targets + i * m,
        m,
        k,
        utility,
        1,
        scale,
        static_cast<char*>(rows) + i * m * k * (wide ? 8 : 4),
        nodes,
        weights,
        count};
    (wide ? use.rows_f64 : use.rows_f32)(task);
  });
  return SHAPLEYCAM_OK;
}

int32_t shapleycam_class_maps_cpu(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c, int64_t m,
                                  const int64_t* from, const int64_t* to, int32_t renormalize, void* raw, int32_t raw_dtype,
                                  void* maps, int32_t maps_dtype, void* workspace, size_t workspace_size, int32_t threads) {
  int64_t s = 0;
  SHAPLEYCAM_RETURN_IF(check_maps(activations, alpha, n, c, m, from, to, raw, raw_dtype, maps, maps_dtype, &s));
  SHAPLEYCAM_RETURN_IF(
      shapleycam_channel_weighted_sum_cpu(activations, alpha, n, c, s, m, raw, raw_dtype, workspace, workspace_size, threads));
  return shapleycam_display_map_cpu(raw, raw_dtype, n * m, from, to, renormalize, maps, maps_dtype, threads);
}

}  // extern "C"
