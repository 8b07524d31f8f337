// display_map and overlay on CUDA devices, one launch each.
//
// display_map gives a block to each image. The second min-max needs the extent of the resized map, so the map is computed
// twice: that is arithmetic on a small raw map in L1, where storing and reading it back would be memory traffic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../checks.h"

namespace shapleycam {
namespace {

constexpr int kThreads = 512;

template <typename T>
__device__ __forceinline__ T positive(T x) {
  return x < T(0) ? T(0) : x;  // keeps NaN
}

// These two carry NaN along; fminf and fmaxf would drop it.
template <typename T>
__device__ __forceinline__ T lower(T a, T b) {
  return (a < b || a != a) ? a : b;
}

template <typename T>
__device__ __forceinline__ T higher(T a, T b) {
  return (a > b || a != a) ? a : b;
}

template <typename T>
struct Extent {
  T low, high;
  __device__ void add(T x) {
    low = lower(x, low);
    high = higher(x, high);
  }
};

// The extent over the block, for every thread.
template <typename T>
__device__ Extent<T> over_block(Extent<T> mine) {
  __shared__ T lows[kThreads / 32], highs[kThreads / 32];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    mine.low = lower(__shfl_xor_sync(0xffffffffu, mine.low, lane), mine.low);
    mine.high = higher(__shfl_xor_sync(0xffffffffu, mine.high, lane), mine.high);
  }
  __syncthreads();  // the arrays may still be read from the call before
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = mine.low;
    highs[threadIdx.x / 32] = mine.high;
  }
  __syncthreads();
  Extent<T> all = {lows[0], highs[0]};
  for (int w = 1; w < kThreads / 32; ++w) {
    all.low = lower(lows[w], all.low);
    all.high = higher(highs[w], all.high);
  }
  return all;
}

template <typename T>
struct Axis {
  int64_t from, to;
  T scale;
};

template <typename T>
struct Place {
  int64_t low, high;
  T weight;
};

template <typename T>
__device__ __forceinline__ Place<T> place(int64_t i, const Axis<T>& axis) {
  T x = axis.scale * (static_cast<T>(i) + T(0.5)) - T(0.5);
  x = x < T(0) ? T(0) : x;
  int64_t low = static_cast<int64_t>(x);
  low = low < axis.from - 1 ? low : axis.from - 1;
  return {low, low + (low < axis.from - 1 ? 1 : 0), x - static_cast<T>(low)};
}

template <typename T>
__device__ __forceinline__ T between(T a, T b, T weight) {
  return (T(1) - weight) * a + weight * b;
}

template <typename T>
struct Map {
  const T* raw;
  Axis<T> z, y, x;
  T low, scale;

  __device__ __forceinline__ T unit(int64_t i) const { return (positive(raw[i]) - low) / scale; }

  __device__ T plane(int64_t pz, const Place<T>& py, const Place<T>& px) const {
    const int64_t upper = (pz * y.from + py.low) * x.from, below = (pz * y.from + py.high) * x.from;
    return between(between(unit(upper + px.low), unit(upper + px.high), px.weight),
                   between(unit(below + px.low), unit(below + px.high), px.weight), py.weight);
  }

  __device__ T at(int64_t i) const {
    const Place<T> px = place(i % x.to, x), py = place(i / x.to % y.to, y);
    if (z.from == 1) return plane(0, py, px);
    const Place<T> pz = place(i / (x.to * y.to), z);
    return between(plane(pz.low, py, px), plane(pz.high, py, px), pz.weight);
  }
};

__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(double* out, double x) { *out = x; }
template <typename T>
__device__ __forceinline__ void put(__half* out, T x) {
  *out = __float2half_rn(static_cast<float>(x));
}
template <typename T>
__device__ __forceinline__ void put(uint8_t* out, T x) {
  const T scaled = x > T(0) ? x * T(255) : T(0);  // NaN becomes 0: a byte cannot say it
  *out = static_cast<uint8_t>(rint(scaled < T(255) ? scaled : T(255)));
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    display_kernel(const T* raws, int64_t images, Axis<T> z, Axis<T> y, Axis<T> x, bool renormalize, Out* outs) {
  const int64_t count = z.from * y.from * x.from, total = z.to * y.to * x.to;
  for (int64_t n = blockIdx.x; n < images; n += gridDim.x) {
    Map<T> map = {raws + n * count, z, y, x, T(0), T(1)};
    const T first = positive(map.raw[0]);
    Extent<T> extent = {first, first};
    for (int64_t i = threadIdx.x; i < count; i += kThreads) extent.add(positive(map.raw[i]));
    extent = over_block(extent);
    map.low = extent.low;
    map.scale = T(1e-7) + (extent.high - extent.low);
    T low = 0, scale = 1;
    if (renormalize) {
      const T corner = map.at(0);
      extent = {corner, corner};
      for (int64_t i = threadIdx.x; i < total; i += kThreads) extent.add(map.at(i));
      extent = over_block(extent);
      low = extent.low;
      scale = T(1e-7) + (extent.high - extent.low);
    }
    Out* out = outs + n * total;
    for (int64_t i = threadIdx.x; i < total; i += kThreads) {
      const T value = map.at(i);
      put(out + i, renormalize ? (value - low) / scale : value);
    }
  }
}

template <typename T, typename Out>
int32_t display(const void* raw, int64_t n, const int64_t* from, const int64_t* to, bool renormalize, void* out,
                cudaStream_t stream) {
  const auto axis = [&](int i) { return Axis<T>{from[i], to[i], static_cast<T>(from[i]) / static_cast<T>(to[i])}; };
  const unsigned blocks = static_cast<unsigned>(n < 1 << 20 ? n : 1 << 20);
  display_kernel<T, Out><<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(raw), n, axis(0), axis(1), axis(2), renormalize,
                                                          static_cast<Out*>(out));
  return cudaPeekAtLastError() == cudaSuccess ? SHAPLEYCAM_OK : SHAPLEYCAM_LAUNCH_FAILED;
}

template <typename T>
int32_t pick_out(const void* raw, int64_t n, const int64_t* from, const int64_t* to, bool renormalize, void* out,
                 int32_t out_dtype, cudaStream_t stream) {
  if (out_dtype == SHAPLEYCAM_FLOAT16) return display<T, __half>(raw, n, from, to, renormalize, out, stream);
  if (out_dtype == SHAPLEYCAM_UINT8) return display<T, uint8_t>(raw, n, from, to, renormalize, out, stream);
  return display<T, T>(raw, n, from, to, renormalize, out, stream);
}

struct Picture {
  const void* data;
  int32_t dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
  float scale[3], shift[3];
};

__device__ __forceinline__ float load(const Picture& p, int64_t i) {
  switch (p.dtype) {
    case SHAPLEYCAM_UINT8:
      return static_cast<float>(static_cast<const uint8_t*>(p.data)[i]) / 255.0f;
    case SHAPLEYCAM_FLOAT32:
      return static_cast<const float*>(p.data)[i];
    case SHAPLEYCAM_FLOAT64:
      return static_cast<float>(static_cast<const double*>(p.data)[i]);
    case SHAPLEYCAM_FLOAT16:
      return __half2float(static_cast<const __half*>(p.data)[i]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.data)[i]);
  }
}

__global__ void __launch_bounds__(kThreads) overlay_kernel(Picture p, const float* heat, const uint8_t* table, float alpha,
                                                           int64_t height, int64_t width, int64_t total, uint8_t* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t x = i % width, y = i / width % height, n = i / (width * height);
    const float h = heat[i];
    uint8_t* to = out + i * 3;
    if (!(h - h == 0.0f)) {
      to[0] = 255;
      to[1] = 0;
      to[2] = 255;
      continue;
    }
    const uint8_t* colour = table + 3 * static_cast<int>(rintf(fminf(fmaxf(h, 0.0f), 1.0f) * 255.0f));
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      float base = load(p, n * p.stride_n + c * p.stride_c + y * p.stride_h + x * p.stride_w) * p.scale[c] + p.shift[c];
      base = base < 0.0f ? 0.0f : (base > 1.0f ? 1.0f : base);
      const float mixed = ((1.0f - alpha) * base + alpha * (static_cast<float>(colour[c]) / 255.0f)) * 255.0f;
      to[c] = mixed > 0.0f ? static_cast<uint8_t>(rintf(fminf(mixed, 255.0f))) : 0;
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
  const unsigned blocks = static_cast<unsigned>(wanted < 1 << 16 ? wanted : 1 << 16);
  overlay_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, heatmaps, table, alpha, height, width, total,
                                                                             out);
  return cudaPeekAtLastError() == cudaSuccess ? SHAPLEYCAM_OK : SHAPLEYCAM_LAUNCH_FAILED;
}

}  // extern "C"
