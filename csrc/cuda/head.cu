// utility_rows and quadrature_rows on CUDA devices, one launch each, and class_maps, two: with the product in between, a whole
// explanation in four.
#include "../utility.h"
#include "display.cuh"
#include "parts.h"

namespace shapleycam {
namespace {

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

constexpr int kOwn = 4;  // logits of a thread: those of an image are in the registers of its block

// data[first + thread], and every kThreads further, below `count`; one branch on the dtype for all of them.
template <typename T>
__device__ __forceinline__ void load_own(T (&own)[kOwn], const void* data, int32_t dtype, int64_t first, int count) {
  const auto from = [&](const auto* typed) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int k = static_cast<int>(threadIdx.x) + i * kThreads;
      own[i] = k < count ? static_cast<T>(widen(typed[first + k])) : T(0);
    }
  };
  switch (dtype) {
    case SHAPLEYCAM_FLOAT32:
      return from(static_cast<const float*>(data));
    case SHAPLEYCAM_FLOAT64:
      return from(static_cast<const double*>(data));
    case SHAPLEYCAM_FLOAT16:
      return from(static_cast<const Float16*>(data));
    default:
      return from(static_cast<const BFloat16*>(data));
  }
}

// The same for at most kOwn * kThreads logits: one read of them and of the bias, and what the class needs is asked for before
// the sums, not after them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rows_of_few_logits(Logits in, const int64_t* targets, int64_t images, int64_t classes, int32_t logits, int32_t utility,
                       int32_t order, T scale, T* rows) {
  const int thread = static_cast<int>(threadIdx.x);
  T bias[kOwn] = {};
  if (in.bias != nullptr) load_own(bias, in.bias, in.bias_dtype, 0, logits);
  for (int64_t n = blockIdx.x; n < images; n += gridDim.x) {
    struct Chosen {
      int64_t c;
      T z, centred;
    };
    const auto chosen = [&](int64_t m) {
      Chosen one = {targets[n * classes + m], T(0), T(0)};
      if (one.c < 0 || one.c >= logits) return one;
      one.z = load<T>(in.data, in.dtype, n * in.stride + one.c);
      one.centred = in.bias == nullptr ? one.z : one.z - load<T>(in.bias, in.bias_dtype, one.c);
      return one;
    };
    T z[kOwn], e[kOwn], total = 0, s = 0;
    load_own(z, in.data, in.dtype, n * in.stride, logits);
    Chosen next = chosen(0);
    Extent<T> extent = no_extent<T>();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (thread + i * kThreads < logits) extent.add(z[i]);
    }
    const T most = over_block(extent).high;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      e[i] = thread + i * kThreads < logits ? exp(z[i] - most) : T(0);
      if (thread + i * kThreads < logits) s += e[i] * (z[i] - bias[i]);
      total += e[i];
    }
    add_over_block(total, s);
    s /= total;
    const T share = T(1) / total;
    for (int64_t m = 0; m < classes; ++m) {
      const Chosen one = next;
      if (m + 1 < classes) next = chosen(m + 1);
      const bool known = one.c >= 0 && one.c < logits;
      const Coefficients<T> on = coefficients<T>(utility, order, exp(one.z - most) * share, one.centred, s);
      T* row = rows + (n * classes + m) * logits;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int k = thread + i * kThreads;
        T value = 0;
        if (utility != SHAPLEYCAM_LOGIT) {
          const T p = e[i] * share;
          value = on.on_p * p;
          if (order == 2) value += on.on_pz * (p * (z[i] - bias[i]));
        }
        value = scale * (k == one.c ? value + on.on_class : value);
        if (k < logits) row[k] = known ? value : static_cast<T>(nan(""));
      }
    }
  }
}

template <typename T>
int32_t launch_rows(const Logits& in, const int64_t* targets, int64_t n, int64_t m, int64_t k, int32_t utility, int32_t order,
                    double scale, void* rows, cudaStream_t stream) {
  if (k <= kOwn * kThreads) {
    const auto few = rows_of_few_logits<T>;
    SHAPLEYCAM_LAUNCH(few, dim3(grid_extent(n)), kThreads, 0, stream, in, targets, n, m, static_cast<int32_t>(k), utility,
                      order, static_cast<T>(scale), static_cast<T*>(rows));
    return launched();
  }
  const auto kernel = rows_of_utility<T>;
  SHAPLEYCAM_LAUNCH(kernel, dim3(grid_extent(n)), kThreads, 0, stream, in, targets, n, m, k, utility, order,
                    static_cast<T>(scale), static_cast<T*>(rows));
  return launched();
}

// A quadrature rule, by value: a launch brings it along. The path at a node is to_z z + to_start start.
template <typename T>
struct Rule {
  int32_t count;
  T to_z[SHAPLEYCAM_MOST_NODES], to_start[SHAPLEYCAM_MOST_NODES], weight[SHAPLEYCAM_MOST_NODES];
};

constexpr int kTogether = 4;  // classes whose rows share the exponentials
static_assert(SHAPLEYCAM_MOST_NODES == 32 && kTogether <= kWarps, "a warp has a lane for every node");

// One block to an image. First the maximum and the sum of every softmax, the nodes shared out among the warps, or the warps
// among the nodes where these are few; then the rows, with one read of the logits for all nodes. `in.bias` is the path's start.
// Two blocks to a multiprocessor are asked for, since the assembler spills for more of its own accord.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    rows_of_integral(Logits in, int64_t start_stride, Rule<T> rule, const int64_t* targets, int64_t images, int64_t classes,
                     int64_t logits, int32_t utility, T* rows) {
  __shared__ T part_top[SHAPLEYCAM_MOST_NODES], part_total[SHAPLEYCAM_MOST_NODES];
  __shared__ T to_z[SHAPLEYCAM_MOST_NODES], to_start[SHAPLEYCAM_MOST_NODES], top[SHAPLEYCAM_MOST_NODES],
      total[SHAPLEYCAM_MOST_NODES], factor[SHAPLEYCAM_MOST_NODES][kTogether], on_class[kTogether];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int parts = rule.count < kWarps ? kWarps / rule.count : 1, units = rule.count * parts;
  const T nothing = -static_cast<T>(INFINITY);
  if (thread < rule.count) {
    to_z[thread] = rule.to_z[thread];
    to_start[thread] = rule.to_start[thread];
  }
  __syncthreads();
  for (int64_t n = blockIdx.x; n < images; n += gridDim.x) {
    const auto z = [&](int64_t k) { return load<T>(in.data, in.dtype, n * in.stride + k); };
    const auto start = [&](int64_t k) {
      return in.bias == nullptr ? T(0) : load<T>(in.bias, in.bias_dtype, n * start_stride + k);
    };
    // Without a start nothing is added: 0 times an infinite weight of it would be NaN.
    const auto point = [&](int q, T at_z, T at_start) {
      return in.bias == nullptr ? to_z[q] * at_z : to_z[q] * at_z + to_start[q] * at_start;
    };
    for (int unit = warp; unit < units && utility != SHAPLEYCAM_LOGIT; unit += kWarps) {
      const int q = unit / parts;
      const int64_t first = unit % parts * 32 + lane, step = parts * 32;
      T high = nothing, sum = 0;  // NaN is passed over here: the sum brings it back
      for (int64_t k = first; k < logits; k += step) {
        const T x = point(q, z(k), start(k));
        high = x > high ? x : high;
      }
#pragma unroll
      for (int l = 16; l > 0; l /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, high, l);
        high = other > high ? other : high;
      }
      const T from = high == nothing ? T(0) : high;
      for (int64_t k = first; k < logits; k += step) sum += exp(point(q, z(k), start(k)) - from);
      sum = warp_sum(sum);
      if (lane == 0) {
        part_top[unit] = high;
        part_total[unit] = sum;
      }
    }
    __syncthreads();
    if (thread < rule.count && utility != SHAPLEYCAM_LOGIT) {
      const int begin = thread * parts;
      T high = nothing, sum = 0;
      for (int u = begin; u < begin + parts; ++u) high = part_top[u] > high ? part_top[u] : high;
      const T from = high == nothing ? T(0) : high;
      for (int u = begin; u < begin + parts; ++u) sum += part_total[u] * exp(part_top[u] - from);
      top[thread] = high;
      total[thread] = sum;
    }
    __syncthreads();
    for (int64_t m = 0; m < classes; m += kTogether) {
      const int together = classes - m < kTogether ? static_cast<int>(classes - m) : kTogether;
      const int64_t* chosen = targets + n * classes + m;
      if (warp < together) {
        const int64_t c = chosen[warp];
        const bool known = c >= 0 && c < logits;
        T share = 0;
        if (lane < rule.count) {
          const bool curved = utility != SHAPLEYCAM_LOGIT;
          const T p = curved && known ? exp(point(lane, z(c), start(c)) - top[lane]) / total[lane] : T(0);
          const Coefficients<T> on = coefficients<T>(utility, 1, p, T(0), T(0));
          share = rule.weight[lane] * on.on_class;
          factor[lane][warp] = curved ? rule.weight[lane] * on.on_p / total[lane] : T(0);
        }
        share = warp_sum(share);
        if (lane == 0) on_class[warp] = share;
      }
      __syncthreads();
      for (int64_t k = threadIdx.x; k < logits; k += kThreads) {
        T sums[kTogether] = {};
        if (utility != SHAPLEYCAM_LOGIT) {
          const T at_z = z(k), at_start = start(k);
          for (int q = 0; q < rule.count; ++q) {
            const T e = exp(point(q, at_z, at_start) - top[q]);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) sums[i] += factor[q][i] * e;
          }
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (i >= together) break;
          const int64_t c = chosen[i];
          const T value = k == c ? on_class[i] + sums[i] : sums[i];
          rows[(n * classes + m + i) * logits + k] = c < 0 || c >= logits ? static_cast<T>(nan("")) : value;
        }
      }
      __syncthreads();  // the next classes' factors, and the next image's sums
    }
  }
}

template <typename T>
int32_t launch_integral(const Logits& in, int64_t start_stride, const double* nodes, const double* weights, int32_t count,
                        const int64_t* targets, int64_t n, int64_t m, int64_t k, int32_t utility, double scale, void* rows,
                        cudaStream_t stream) {
  const auto kernel = rows_of_integral<T>;
  Rule<T> rule = {};
  rule.count = count;
  for (int32_t q = 0; q < count; ++q) {
    rule.to_z[q] = static_cast<T>(nodes[q]);
    rule.to_start[q] = static_cast<T>(1.0 - nodes[q]);
    rule.weight[q] = static_cast<T>(weights[q] * scale);
  }
  SHAPLEYCAM_LAUNCH(kernel, dim3(grid_extent(n)), kThreads, 0, stream, in, start_stride, rule, targets, n, m, k, utility,
                    static_cast<T*>(rows));
  return launched();
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

int32_t shapleycam_quadrature_rows_cuda(const void* logits, int32_t dtype, int64_t stride, const void* start,
                                        int32_t start_dtype, int64_t start_stride, const int64_t* targets, int64_t n, int64_t m,
                                        int64_t k, int32_t utility, const double* nodes, const double* weights, int32_t count,
                                        double scale, void* rows, int32_t out_dtype, void* stream) {
  SHAPLEYCAM_RETURN_IF(check_integral(logits, dtype, stride, start, start_dtype, start_stride, targets, n, m, k, utility, nodes,
                                      weights, count, rows, out_dtype));
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  const Logits in = {logits, dtype, stride, start, start_dtype};
  return (out_dtype == SHAPLEYCAM_FLOAT64 ? launch_integral<double>
                                          : launch_integral<float>)(in, start_stride, nodes, weights, count, targets, n, m, k,
                                                                    utility, scale, rows, static_cast<cudaStream_t>(stream));
}

int32_t shapleycam_class_maps_cuda(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c, int64_t m,
                                   const int64_t* from, const int64_t* to, int32_t renormalize, void* raw, int32_t raw_dtype,
                                   void* maps, int32_t maps_dtype, void* workspace, size_t workspace_size, void* stream) {
  int64_t s = 0;
  SHAPLEYCAM_RETURN_IF(check_maps(activations, alpha, n, c, m, from, to, raw, raw_dtype, maps, maps_dtype, &s));
  SHAPLEYCAM_RETURN_IF(check_workspace(workspace, workspace_size, shapleycam_channel_weighted_sum_workspace_cuda(n, c, s, m)));
  if (n == 0 || m == 0) return SHAPLEYCAM_OK;
  if (shows_parts(from, to, raw_dtype)) {
    const auto on = static_cast<cudaStream_t>(stream);
    Parts parts = {};
    SHAPLEYCAM_RETURN_IF(channel_parts(activations, alpha, n, c, s, m, raw, workspace, on, &parts));
    return display_parts(parts, n, m, from, to, renormalize != 0, parts.pieces == 1 ? nullptr : raw, raw_dtype, maps,
                         maps_dtype, on);
  }
  SHAPLEYCAM_RETURN_IF(
      shapleycam_channel_weighted_sum_cuda(activations, alpha, n, c, s, m, raw, raw_dtype, workspace, workspace_size, stream));
  return shapleycam_display_map_cuda(raw, raw_dtype, n * m, from, to, renormalize, maps, maps_dtype, stream);
}

}  // extern "C"
