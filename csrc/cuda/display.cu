// display_map and overlay on CUDA devices, one launch each.
#include "display.cuh"

namespace shapleycam {
namespace {

// A block writes `part` positions of one map; each of them finds the extents again, which are few.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    display_kernel(const T* raws, int64_t images, Axis<T> z, Axis<T> y, Axis<T> x, bool renormalize, int64_t part, Out* outs) {
  const int64_t count = z.from * y.from * x.from, total = z.to * y.to * x.to, begin = static_cast<int64_t>(blockIdx.x) * part;
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    const Map<T> map = {raws + n * count, z, y, x, T(0), T(1)};
    display_part(map, renormalize, begin, begin + part < total ? begin + part : total, outs + n * total);
  }
}

template <typename T, typename Out>
int32_t display(const void* raw, int64_t n, const int64_t* from, const int64_t* to, bool renormalize, void* out,
                cudaStream_t stream) {
  const Axis<T> z = axis_of<T>(from[0], to[0]), y = axis_of<T>(from[1], to[1]), x = axis_of<T>(from[2], to[2]);
  const int64_t total = to[0] * to[1] * to[2], overhead = from[0] * from[1] * from[2] + extremes(z) * extremes(y) * extremes(x);
  // As many blocks as the device takes, unless a block would find extents for longer than it writes.
  int64_t blocks = (kBlocksWanted + n - 1) / n;
  const int64_t most = total / (overhead > 4 * kThreads ? overhead : 4 * kThreads);
  blocks = blocks < most ? blocks : most;
  blocks = blocks < 1 ? 1 : blocks;
  const int64_t part = (total + blocks - 1) / blocks;
  const auto kernel = display_kernel<T, Out>;
  SHAPLEYCAM_LAUNCH(kernel, dim3(static_cast<unsigned>((total + part - 1) / part), grid_extent(n)), kThreads, 0, stream,
                    static_cast<const T*>(raw), n, z, y, x, renormalize, part, static_cast<Out*>(out));
  return launched();
}

template <typename T>
int32_t pick_out(const void* raw, int64_t n, const int64_t* from, const int64_t* to, bool renormalize, void* out,
                 int32_t out_dtype, cudaStream_t stream) {
  if (out_dtype == SHAPLEYCAM_FLOAT16) return display<T, Float16>(raw, n, from, to, renormalize, out, stream);
  if (out_dtype == SHAPLEYCAM_UINT8) return display<T, uint8_t>(raw, n, from, to, renormalize, out, stream);
  return display<T, T>(raw, n, from, to, renormalize, out, stream);
}

struct Picture {
  const void* data;
  int32_t dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
  float scale[3], shift[3];
};

__device__ __forceinline__ float pixel(const Picture& p, int64_t i) {
  if (p.dtype == SHAPLEYCAM_UINT8) return static_cast<float>(static_cast<const uint8_t*>(p.data)[i]) / 255.0f;
  return load<float>(p.data, p.dtype, i);
}

__global__ void __launch_bounds__(kThreads) overlay_kernel(Picture p, const float* heat, const uint8_t* table, float alpha,
                                                           int64_t height, int64_t width, int64_t total, uint8_t* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t x = i % width, y = i / width % height, n = i / (width * height);
    const float h = heat[i];
    uint8_t* to = out + i * 3;
    if (!(h - h == 0.0f)) {
      mark_unknown(to);
      continue;
    }
    const uint8_t* colour = table + 3 * colour_of(h);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const float base = pixel(p, n * p.stride_n + c * p.stride_c + y * p.stride_h + x * p.stride_w) * p.scale[c] + p.shift[c];
      to[c] = blended(base, colour[c], alpha);
    }
  }
}

}  // namespace
}  // namespace shapleycam

using namespace shapleycam;

extern "C" {

int32_t shapleycam_display_map_cuda(const void* raw, int32_t dtype, int64_t n, const int64_t* from, const int64_t* to,
                                    int32_t renormalize, void* out, int32_t out_dtype, void* stream) {
  SHAPLEYCAM_RETURN_IF(check_display(raw, dtype, n, from, to, out, out_dtype));
  if (n == 0) return SHAPLEYCAM_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return (dtype == SHAPLEYCAM_FLOAT64 ? pick_out<double> : pick_out<float>)(raw, n, from, to, renormalize != 0, out, out_dtype,
                                                                            on);
}

int32_t shapleycam_overlay_cuda(const void* images, int32_t dtype, int64_t n, int64_t height, int64_t width,
                                const int64_t* strides, const float* heatmaps, const uint8_t* table, float alpha,
                                const float* mean, const float* std, uint8_t* out, void* stream) {
  SHAPLEYCAM_RETURN_IF(check_overlay(images, dtype, n, height, width, strides, heatmaps, table, mean, std, out));
  if (n == 0) return SHAPLEYCAM_OK;
  Picture p = {images, dtype, strides[0], strides[1], strides[2], strides[3], {1.0f, 1.0f, 1.0f}, {0.0f, 0.0f, 0.0f}};
  for (int c = 0; c < 3 && mean != nullptr; ++c) {
    p.scale[c] = std[c];
    p.shift[c] = mean[c];
  }
  const int64_t total = n * height * width, wanted = (total + kThreads - 1) / kThreads;
  SHAPLEYCAM_LAUNCH(overlay_kernel, dim3(grid_extent(wanted)), kThreads, 0, static_cast<cudaStream_t>(stream), p, heatmaps,
                    table, alpha, height, width, total, out);
  return launched();
}

}  // extern "C"
