// utility_rows and class_maps on CUDA devices, one launch each: with the product in between, a whole explanation in three.
#include "../utility.h"
#include "display.cuh"
#include "general.cuh"

namespace shapleycam {
namespace {

// Activations of an image that one block may read alone; more blocks and two more launches serve larger ones. Not measured yet.
constexpr int64_t kMostBytes = 1 << 19;
constexpr int64_t kMostPositions = 4096;  // of a map in shared memory

// Two sums over the block, for every thread.
template <typename T>
__device__ void add_over_block(T& a, T& b) {
  __shared__ T parts[2 * kWarps];
  a = warp_sum(a);
  b = warp_sum(b);
  __syncthreads();  // the array may still be read from the call before
  if (threadIdx.x % 32 == 0) {
    parts[threadIdx.x / 32] = a;
    parts[kWarps + threadIdx.x / 32] = b;
  }
  __syncthreads();
  a = b = 0;
  for (int w = 0; w < kWarps; ++w) {
    a += parts[w];
    b += parts[kWarps + w];
  }
}

struct Logits {
  const void* data;
  int32_t dtype;
  int64_t stride;
  const void* bias;
  int32_t bias_dtype;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) rows_of_utility(Logits in, const int64_t* targets, int64_t images, int64_t classes,
                                                            int64_t logits, int32_t utility, int32_t order, T scale, T* rows) {
  for (int64_t n = blockIdx.x; n < images; n += gridDim.x) {
    const auto z = [&](int64_t k) { return load<T>(in.data, in.dtype, n * in.stride + k); };
    const auto centred = [&](int64_t k, T value) {
      return in.bias == nullptr ? value : value - load<T>(in.bias, in.bias_dtype, k);
    };
    Extent<T> extent = {z(0), z(0)};
    for (int64_t k = threadIdx.x; k < logits; k += kThreads) extent.add(z(k));
    const T most = over_block(extent).high;
    T total = 0, s = 0;
    for (int64_t k = threadIdx.x; k < logits; k += kThreads) {
      const T value = z(k), e = exp(value - most);
      total += e;
      s += e * centred(k, value);
    }
    add_over_block(total, s);
    s /= total;
    for (int64_t m = 0; m < classes; ++m) {
      const int64_t c = targets[n * classes + m];
      T* row = rows + (n * classes + m) * logits;
      if (c < 0 || c >= logits) {
        for (int64_t k = threadIdx.x; k < logits; k += kThreads) row[k] = static_cast<T>(nan(""));
        continue;
      }
      const T z_c = z(c);
      const Coefficients<T> on = coefficients<T>(utility, order, exp(z_c - most) / total, centred(c, z_c), s);
      for (int64_t k = threadIdx.x; k < logits; k += kThreads) {
        T value = 0;
        if (utility != SHAPLEYCAM_LOGIT) {
          const T own = z(k), p = exp(own - most) / total;
          value = on.on_p * p;
          if (order == 2) value += on.on_pz * (p * centred(k, own));
        }
        row[k] = scale * (k == c ? value + on.on_class : value);
      }
    }
    __syncthreads();  // the next image's extent
  }
}

template <typename T>
int32_t launch_rows(const Logits& in, const int64_t* targets, int64_t n, int64_t m, int64_t k, int32_t utility, int32_t order,
                    double scale, void* rows, cudaStream_t stream) {
  const auto kernel = rows_of_utility<T>;
  SHAPLEYCAM_LAUNCH(kernel, dim3(grid_extent(n)), kThreads, 0, stream, in, targets, n, m, k, utility, order,
                    static_cast<T>(scale), static_cast<T*>(rows));
  return launched();
}

// One block to an image and class: the signed map in shared memory, and from there its display form.
template <typename T, typename Out, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    maps_kernel(View a, const T* alpha, int64_t images, int64_t channels, int64_t classes, Axis<T> z, Axis<T> y, Axis<T> x,
                bool renormalize, T* raws, Out* outs) {
  SHAPLEYCAM_DYNAMIC_SHARED(T, map);
  __shared__ T scratch[kThreads];
  const int64_t positions = z.from * y.from * x.from, total = z.to * y.to * x.to, m = blockIdx.x;
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    const T* weights = alpha + (n * classes + m) * channels;
    T* raw = raws + (n * classes + m) * positions;
    sum_over_channels<T, kChannelsLast>(
        channels, positions, scratch, [&](int64_t c, int64_t s) { return weights[c] * at<T>(a, n, c, s); },
        [&](int64_t s, T sum) { map[s] = raw[s] = sum; });
    __syncthreads();
    display_part(Map<T>{map, z, y, x, T(0), T(1)}, renormalize, 0, total, outs + (n * classes + m) * total);
    __syncthreads();  // the next image overwrites the map
  }
}

struct Maps {
  const shapleycam_view* a;
  const void* alpha;
  int64_t n, c, m;
  const int64_t *from, *to;
  bool renormalize;
  void *raw, *maps;
  cudaStream_t stream;
};

template <typename T, typename Out>
int32_t launch_maps(const Maps& call) {
  const auto kernel = channels_last(call.a) ? maps_kernel<T, Out, true> : maps_kernel<T, Out, false>;
  const auto axis = [&](int i) { return axis_of<T>(call.from[i], call.to[i]); };
  const size_t shared = static_cast<size_t>(call.from[0] * call.from[1] * call.from[2]) * sizeof(T);
  SHAPLEYCAM_LAUNCH(kernel, dim3(static_cast<unsigned>(call.m), grid_extent(call.n)), kThreads, shared, call.stream,
                    view_of(call.a), static_cast<const T*>(call.alpha), call.n, call.c, call.m, axis(0), axis(1), axis(2),
                    call.renormalize, static_cast<T*>(call.raw), static_cast<Out*>(call.maps));
  return launched();
}

template <typename T>
int32_t pick_maps(const Maps& call, int32_t dtype) {
  if (dtype == SHAPLEYCAM_FLOAT16) return launch_maps<T, Float16>(call);
  if (dtype == SHAPLEYCAM_UINT8) return launch_maps<T, uint8_t>(call);
  return launch_maps<T, T>(call);
}

}  // namespace
}  // namespace shapleycam

using namespace shapleycam;

extern "C" {

int32_t shapleycam_utility_rows_cuda(const void* logits, int32_t dtype, int64_t stride, const void* bias, int32_t bias_dtype,
                                     const int64_t* targets, int64_t n, int64_t m, int64_t k, int32_t utility, int32_t order,
                                     double scale, void* rows, int32_t out_dtype, void* stream) {
  SHAPLEYCAM_RETURN_IF(check_rows(logits, dtype, bias, bias_dtype, targets, n, m, k, stride, utility, order, rows, out_dtype));
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  const Logits in = {logits, dtype, stride, bias, bias_dtype};
  return (out_dtype == SHAPLEYCAM_FLOAT64 ? launch_rows<double> : launch_rows<float>)(in, targets, n, m, k, utility, order,
                                                                                      scale, rows,
                                                                                      static_cast<cudaStream_t>(stream));
}

int32_t shapleycam_class_maps_cuda(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c, int64_t m,
                                   const int64_t* from, const int64_t* to, int32_t renormalize, void* raw, int32_t raw_dtype,
                                   void* maps, int32_t maps_dtype, void* workspace, size_t workspace_size, void* stream) {
  int64_t s = 0;
  SHAPLEYCAM_RETURN_IF(check_maps(activations, alpha, n, c, m, from, to, raw, raw_dtype, maps, maps_dtype, &s));
  SHAPLEYCAM_RETURN_IF(check_workspace(workspace, workspace_size, shapleycam_channel_weighted_sum_workspace_cuda(n, c, s, m)));
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  const bool small = c * s * static_cast<int64_t>(element_size(activations->dtype)) <= kMostBytes;
  if (s <= kMostPositions && m <= INT32_MAX && (small || n * m >= kBlocksWanted)) {
    const Maps call = {activations, alpha, n, c, m, from, to, renormalize != 0, raw, maps, static_cast<cudaStream_t>(stream)};
    return (raw_dtype == SHAPLEYCAM_FLOAT64 ? pick_maps<double> : pick_maps<float>)(call, maps_dtype);
  }
  SHAPLEYCAM_RETURN_IF(
      shapleycam_channel_weighted_sum_cuda(activations, alpha, n, c, s, m, raw, raw_dtype, workspace, workspace_size, stream));
  return shapleycam_display_map_cuda(raw, raw_dtype, n * m, from, to, renormalize, maps, maps_dtype, stream);
}

}  // extern "C"
