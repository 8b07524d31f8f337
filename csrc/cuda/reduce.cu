// weighted_reduce and channel_weighted_sum on CUDA devices.
//
// A block owns one image's chunk of channels. It first reduces the weights over the positions to one alpha per channel, in
// shared memory (rows that need it), then adds its channels up at every position and writes its partial map; a second, tiny
// launch adds the partial maps of the chunks in a fixed order. So every input is read once ("activation" and "plusplus" read
// the activations again while the chunk is still in L1 or L2), and the result does not depend on scheduling.
//
// The lanes of a warp walk along the dimension with unit stride: positions (channels first) or channels (channels last).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../checks.h"

namespace shapleycam {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostChannels = 256;  // of a chunk: alpha and the sums of A fit a few KiB of shared memory
constexpr int kLeastChannels = 16;
constexpr int kBlocksWanted = 2 * 132;  // two per multiprocessor of the largest chip this is built for

struct View {
  const void* data;
  int64_t stride_n, stride_c, stride_s;
  int32_t dtype;
};

template <typename T>
__device__ __forceinline__ T load(const View& v, int64_t offset) {
  // The branch is uniform over the launch.
  switch (v.dtype) {
    case SHAPLEYCAM_FLOAT32:
      return static_cast<T>(__ldg(static_cast<const float*>(v.data) + offset));
    case SHAPLEYCAM_FLOAT64:
      return static_cast<T>(__ldg(static_cast<const double*>(v.data) + offset));
    case SHAPLEYCAM_FLOAT16:
      return static_cast<T>(__half2float(static_cast<const __half*>(v.data)[offset]));
    default:
      return static_cast<T>(__bfloat162float(static_cast<const __nv_bfloat16*>(v.data)[offset]));
  }
}

template <typename T>
__device__ __forceinline__ T positive(T x) {
  return x < T(0) ? T(0) : x;  // keeps NaN
}

template <typename T>
__device__ __forceinline__ T plusplus_term(T w, T sum) {
  const T square = w * w;
  const T ratio = square / (T(2) * square + square * w * sum + T(1e-6));
  return w == T(0) ? T(0) : positive(w) * ratio;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

template <typename T>
struct Weights {
  View g, h;
  __device__ __forceinline__ T at(int64_t n, int64_t c, int64_t s) const {
    const T gradient = load<T>(g, n * g.stride_n + c * g.stride_c + s * g.stride_s);
    if (h.data == nullptr) return gradient;
    return gradient - T(0.5) * load<T>(h, n * h.stride_n + c * h.stride_c + s * h.stride_s);
  }
};

template <typename T>
__device__ __forceinline__ T at(const View& a, int64_t n, int64_t c, int64_t s) {
  return load<T>(a, n * a.stride_n + c * a.stride_c + s * a.stride_s);
}

// Calls value(c, s) for the block's channels and all positions, sums over the positions, and leaves the sums in total[channel].
template <typename T, bool kChannelsLast, typename Value>
__device__ void sum_over_positions(T* total, int64_t first, int count, int64_t positions, T* scratch, Value value) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (kChannelsLast) {
    // 32 neighbouring channels to a warp; the warps share the positions.
    for (int base = 0; base < count; base += 32) {
      T sum = 0;
      if (base + lane < count) {
        for (int64_t s = warp; s < positions; s += kWarps) sum += value(first + base + lane, s);
      }
      scratch[warp * 32 + lane] = sum;
      __syncthreads();
      if (warp == 0 && base + lane < count) {
        T all = 0;
        for (int w = 0; w < kWarps; ++w) all += scratch[w * 32 + lane];
        total[base + lane] = all;
      }
      __syncthreads();
    }
  } else {
    for (int channel = warp; channel < count; channel += kWarps) {
      T sum = 0;
      for (int64_t s = lane; s < positions; s += 32) sum += value(first + channel, s);
      sum = warp_sum(sum);
      if (lane == 0) total[channel] = sum;
    }
    __syncthreads();
  }
}

// Sums value(channel index in the chunk, s) over the chunk's channels and hands the total of every position to store(s, sum).
template <typename T, bool kChannelsLast, typename Value, typename Store>
__device__ void sum_over_channels(int count, int64_t positions, T* scratch, Value value, Store store) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (kChannelsLast) {
    for (int64_t s = warp; s < positions; s += kWarps) {
      T sum = 0;
      for (int channel = lane; channel < count; channel += 32) sum += value(channel, s);
      sum = warp_sum(sum);
      if (lane == 0) store(s, sum);
    }
  } else {
    // 32 neighbouring positions to a warp; the warps share the channels.
    for (int64_t base = 0; base < positions; base += 32) {
      T sum = 0;
      if (base + lane < positions) {
        for (int channel = warp; channel < count; channel += kWarps) sum += value(channel, base + lane);
      }
      scratch[warp * 32 + lane] = sum;
      __syncthreads();
      if (warp == 0 && base + lane < positions) {
        T all = 0;
        for (int w = 0; w < kWarps; ++w) all += scratch[w * 32 + lane];
        store(base + lane, all);
      }
      __syncthreads();
    }
  }
}

template <typename T, bool kChannelsLast, int kPooling>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(View a, Weights<T> w, int64_t images, int64_t channels, int64_t positions, int chunk, T* out) {
  __shared__ T alpha[kMostChannels], sums[kMostChannels], scratch[kThreads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk;
  const int count = static_cast<int>(channels - first < chunk ? channels - first : chunk);
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    if constexpr (kPooling == SHAPLEYCAM_ACTIVATION || kPooling == SHAPLEYCAM_PLUSPLUS) {
      sum_over_positions<T, kChannelsLast>(sums, first, count, positions, scratch,
                                           [&](int64_t c, int64_t s) { return at<T>(a, n, c, s); });
    }
    if constexpr (kPooling == SHAPLEYCAM_MEAN) {
      sum_over_positions<T, kChannelsLast>(alpha, first, count, positions, scratch,
                                           [&](int64_t c, int64_t s) { return w.at(n, c, s); });
    } else if constexpr (kPooling == SHAPLEYCAM_ACTIVATION) {
      sum_over_positions<T, kChannelsLast>(alpha, first, count, positions, scratch,
                                           [&](int64_t c, int64_t s) { return w.at(n, c, s) * at<T>(a, n, c, s); });
    } else if constexpr (kPooling == SHAPLEYCAM_PLUSPLUS) {
      sum_over_positions<T, kChannelsLast>(alpha, first, count, positions, scratch,
                                           [&](int64_t c, int64_t s) { return plusplus_term(w.at(n, c, s), sums[c - first]); });
    }
    if constexpr (kPooling == SHAPLEYCAM_MEAN || kPooling == SHAPLEYCAM_ACTIVATION) {
      for (int i = threadIdx.x; i < count; i += kThreads) {
        alpha[i] /= kPooling == SHAPLEYCAM_MEAN ? static_cast<T>(positions) : sums[i] + T(1e-7);
      }
      __syncthreads();
    }
    T* row = out + (n * gridDim.x + blockIdx.x) * positions;
    sum_over_channels<T, kChannelsLast>(
        count, positions, scratch,
        [&](int channel, int64_t s) {
          const T x = at<T>(a, n, first + channel, s);
          if constexpr (kPooling == SHAPLEYCAM_ELEMENTWISE) return w.at(n, first + channel, s) * x;
          if constexpr (kPooling == SHAPLEYCAM_ELEMENTWISE_RELU) return positive(w.at(n, first + channel, s) * x);
          if constexpr (kPooling == SHAPLEYCAM_POSITIVE_GRADIENT) return positive(w.at(n, first + channel, s)) * x;
          return alpha[channel] * x;
        },
        [&](int64_t s, T sum) { row[s] = sum; });
    __syncthreads();  // the next image overwrites alpha and sums
  }
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(View a, const T* weights, int64_t images, int64_t channels, int64_t positions, int64_t rows, int chunk, T* out) {
  __shared__ T scratch[kThreads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk;
  const int count = static_cast<int>(channels - first < chunk ? channels - first : chunk);
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    for (int64_t m = 0; m < rows; ++m) {
      // The chunk's activations come from L1 or L2 for every row but the first.
      const T* alpha = weights + (n * rows + m) * channels + first;
      T* row = out + ((n * gridDim.x + blockIdx.x) * rows + m) * positions;
      sum_over_channels<T, kChannelsLast>(
          count, positions, scratch, [&](int channel, int64_t s) { return alpha[channel] * at<T>(a, n, first + channel, s); },
          [&](int64_t s, T sum) { row[s] = sum; });
    }
  }
}

// out[n, i] = sum over p of parts[n, p, i], in the order of p.
template <typename T>
__global__ void __launch_bounds__(kThreads) add_kernel(const T* parts, int64_t total, int64_t length, int64_t pieces, T* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const T* from = parts + i / length * pieces * length + i % length;
    T sum = 0;
    for (int64_t p = 0; p < pieces; ++p) sum += from[p * length];
    out[i] = sum;
  }
}

struct Plan {
  int chunk;
  int64_t pieces;
};

// From the extents alone, so that results do not depend on the device. A chunk is as large as still gives blocks enough.
Plan plan_of(int64_t n, int64_t c) {
  int chunk = kMostChannels;
  while (chunk > kLeastChannels && n * ((c + chunk - 1) / chunk) < kBlocksWanted) chunk /= 2;
  return {chunk, (c + chunk - 1) / chunk};
}

size_t partial_bytes(int64_t n, int64_t c, int64_t s, int64_t m) {
  if (n == 0 || check_extents(n, c, s, m) != SHAPLEYCAM_OK) return 0;
  const int64_t pieces = plan_of(n, c).pieces;
  int64_t bytes = 0;
  if (pieces == 1 || overflows(n * pieces, m, &bytes) || overflows(bytes, s * 8, &bytes)) return 0;
  return static_cast<size_t>(bytes);
}

View view_of(const shapleycam_view* v) {
  return v == nullptr ? View{nullptr, 0, 0, 0, SHAPLEYCAM_FLOAT32}
                      : View{v->data, v->stride_n, v->stride_c, v->stride_s, v->dtype};
}

bool channels_last(const shapleycam_view* a) { return a->stride_c == 1 && a->stride_s != 1; }

dim3 grid_of(int64_t n, int64_t pieces) {
  return dim3(static_cast<unsigned>(pieces), static_cast<unsigned>(n < 65535 ? n : 65535));
}

int32_t launched() { return cudaPeekAtLastError() == cudaSuccess ? SHAPLEYCAM_OK : SHAPLEYCAM_LAUNCH_FAILED; }

template <typename T>
int32_t add_parts(const T* parts, int64_t n, int64_t length, int64_t pieces, T* out, cudaStream_t stream) {
  const int64_t total = n * length, wanted = (total + kThreads - 1) / kThreads;
  add_kernel<T>
      <<<static_cast<unsigned>(wanted < 65535 ? wanted : 65535), kThreads, 0, stream>>>(parts, total, length, pieces, out);
  return launched();
}

template <typename T, bool kChannelsLast>
int32_t launch_row(const View& a, const Weights<T>& w, int64_t n, int64_t c, int64_t s, int32_t pooling, const Plan& plan,
                   T* out, cudaStream_t stream) {
  const dim3 grid = grid_of(n, plan.pieces);
#define SHAPLEYCAM_ROW(row)                                                                              \
  case row:                                                                                              \
    reduce_kernel<T, kChannelsLast, row><<<grid, kThreads, 0, stream>>>(a, w, n, c, s, plan.chunk, out); \
    break;
  switch (pooling) {
    SHAPLEYCAM_ROW(SHAPLEYCAM_MEAN)
    SHAPLEYCAM_ROW(SHAPLEYCAM_ELEMENTWISE)
    SHAPLEYCAM_ROW(SHAPLEYCAM_ELEMENTWISE_RELU)
    SHAPLEYCAM_ROW(SHAPLEYCAM_ACTIVATION)
    SHAPLEYCAM_ROW(SHAPLEYCAM_POSITIVE_GRADIENT)
    SHAPLEYCAM_ROW(SHAPLEYCAM_PLUSPLUS)
    default:
      return SHAPLEYCAM_BAD_POOLING;
  }
#undef SHAPLEYCAM_ROW
  return launched();
}

template <typename T>
int32_t reduce(const shapleycam_view* a, const shapleycam_view* g, const shapleycam_view* h, int64_t n, int64_t c, int64_t s,
               int32_t pooling, void* out, void* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(n, c);
  const Weights<T> w = {view_of(g), view_of(h)};
  T* parts = static_cast<T*>(plan.pieces == 1 ? out : workspace);
  SHAPLEYCAM_RETURN_IF(
      (channels_last(a) ? launch_row<T, true> : launch_row<T, false>)(view_of(a), w, n, c, s, pooling, plan, parts, stream));
  return plan.pieces == 1 ? SHAPLEYCAM_OK : add_parts(parts, n, s, plan.pieces, static_cast<T*>(out), stream);
}

template <typename T>
int32_t sum(const shapleycam_view* a, const void* alpha, int64_t n, int64_t c, int64_t s, int64_t m, void* out, void* workspace,
            cudaStream_t stream) {
  const Plan plan = plan_of(n, c);
  T* parts = static_cast<T*>(plan.pieces == 1 ? out : workspace);
  const auto kernel = channels_last(a) ? sum_kernel<T, true> : sum_kernel<T, false>;
  kernel<<<grid_of(n, plan.pieces), kThreads, 0, stream>>>(view_of(a), static_cast<const T*>(alpha), n, c, s, m, plan.chunk,
                                                           parts);
  SHAPLEYCAM_RETURN_IF(launched());
  return plan.pieces == 1 ? SHAPLEYCAM_OK : add_parts(parts, n, m * s, plan.pieces, static_cast<T*>(out), stream);
}

}  // namespace
}  // namespace shapleycam

using namespace shapleycam;

extern "C" {

size_t shapleycam_weighted_reduce_workspace_cuda(int64_t n, int64_t c, int64_t s, int32_t) { return partial_bytes(n, c, s, 1); }

int32_t shapleycam_weighted_reduce_cuda(const shapleycam_view* activations, const shapleycam_view* gradient,
                                        const shapleycam_view* hvp, int64_t n, int64_t c, int64_t s, int32_t pooling, void* out,
                                        int32_t out_dtype, void* workspace, size_t workspace_size, void* stream) {
  SHAPLEYCAM_RETURN_IF(check_reduce(activations, gradient, hvp, n, c, s, pooling, out, out_dtype, workspace, workspace_size,
                                    partial_bytes(n, c, s, 1)));
  if (n == 0) return SHAPLEYCAM_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return (out_dtype == SHAPLEYCAM_FLOAT64 ? reduce<double> : reduce<float>)(activations, gradient, hvp, n, c, s, pooling, out,
                                                                            workspace, on);
}

size_t shapleycam_channel_weighted_sum_workspace_cuda(int64_t n, int64_t c, int64_t s, int64_t m) {
  return partial_bytes(n, c, s, m);
}

int32_t shapleycam_channel_weighted_sum_cuda(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c,
                                             int64_t s, int64_t m, void* out, int32_t out_dtype, void* workspace,
                                             size_t workspace_size, void* stream) {
  SHAPLEYCAM_RETURN_IF(
      check_sum(activations, alpha, n, c, s, m, out, out_dtype, workspace, workspace_size, partial_bytes(n, c, s, m)));
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  const auto on = static_cast<cudaStream_t>(stream);
  return (out_dtype == SHAPLEYCAM_FLOAT64 ? sum<double> : sum<float>)(activations, alpha, n, c, s, m, out, workspace, on);
}

}  // extern "C"
