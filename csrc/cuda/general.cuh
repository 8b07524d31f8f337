// The kernels for any strides, dtypes and alignment, one element at a time; packed.cuh has the fast ones.
//
// A block owns one image's chunk of channels. It first reduces the weights over the positions to one alpha per channel, in
// shared memory (rows that need it), then adds its channels up at every position and writes its partial map.
//
// The lanes of a warp walk along the dimension with unit stride: positions (channels first) or channels (channels last).
#pragma once

#include "device.cuh"

namespace shapleycam {

constexpr int kMostChannels = 256;  // of a chunk: alpha and the sums of A fit a few KiB of shared memory
constexpr int kLeastChannels = 16;

template <typename T>
struct Weights {
  View g, h;
  __device__ __forceinline__ T at(int64_t n, int64_t c, int64_t s) const {
    const T gradient = shapleycam::at<T>(g, n, c, s);
    return h.data == nullptr ? gradient : weight(gradient, shapleycam::at<T>(h, n, c, s));
  }
};

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

// Sums value(channel, s) over `count` channels and hands the total of every position to store(s, sum).
template <typename T, bool kChannelsLast, typename Value, typename Store>
__device__ void sum_over_channels(int64_t count, int64_t positions, T* scratch, Value value, Store store) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (kChannelsLast) {
    for (int64_t s = warp; s < positions; s += kWarps) {
      T sum = 0;
      for (int64_t channel = lane; channel < count; channel += 32) sum += value(channel, s);
      sum = warp_sum(sum);
      if (lane == 0) store(s, sum);
    }
  } else {
    // 32 neighbouring positions to a warp; the warps share the channels.
    for (int64_t base = 0; base < positions; base += 32) {
      T sum = 0;
      if (base + lane < positions) {
        for (int64_t channel = warp; channel < count; channel += kWarps) sum += value(channel, base + lane);
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

template <typename T, bool kChannelsLast, int kRow>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(View a, Weights<T> w, int64_t images, int64_t channels, int64_t positions, int chunk, T* out) {
  __shared__ T alpha[kMostChannels], sums[kMostChannels], scratch[kThreads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk;
  const int count = static_cast<int>(channels - first < chunk ? channels - first : chunk);
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    if constexpr (kRow == SHAPLEYCAM_ACTIVATION || kRow == SHAPLEYCAM_PLUSPLUS) {
      sum_over_positions<T, kChannelsLast>(sums, first, count, positions, scratch,
                                           [&](int64_t c, int64_t s) { return at<T>(a, n, c, s); });
    }
    if constexpr (kPools<kRow>) {
      sum_over_positions<T, kChannelsLast>(alpha, first, count, positions, scratch, [&](int64_t c, int64_t s) {
        if constexpr (kRow == SHAPLEYCAM_ACTIVATION) return w.at(n, c, s) * at<T>(a, n, c, s);
        if constexpr (kRow == SHAPLEYCAM_PLUSPLUS) return plusplus_term(w.at(n, c, s), sums[c - first]);
        return w.at(n, c, s);
      });
      for (int i = threadIdx.x; i < count; i += kThreads) {
        alpha[i] = channel_weight<kRow>(alpha[i], kRow == SHAPLEYCAM_MEAN ? T(0) : sums[i], positions);
      }
      __syncthreads();
    }
    T* row = out + (n * gridDim.x + blockIdx.x) * positions;
    sum_over_channels<T, kChannelsLast>(
        count, positions, scratch,
        [&](int64_t channel, int64_t s) {
          const T x = at<T>(a, n, first + channel, s);
          if constexpr (kPools<kRow>) return alpha[channel] * x;
          return term<kRow>(w.at(n, first + channel, s), x);
        },
        [&](int64_t s, T sum) { row[s] = sum; });
    __syncthreads();  // the next image overwrites alpha and sums
  }
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) sum_kernel(View a, const T* weights, int64_t images, int64_t channels,
                                                       int64_t positions, int64_t classes, int chunk, T* out) {
  __shared__ T scratch[kThreads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t count = channels - first < chunk ? channels - first : chunk;
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    for (int64_t m = 0; m < classes; ++m) {
      // The chunk's activations come from L1 or L2 for every class but the first.
      const T* alpha = weights + (n * classes + m) * channels + first;
      T* row = out + ((n * gridDim.x + blockIdx.x) * classes + m) * positions;
      sum_over_channels<T, kChannelsLast>(
          count, positions, scratch,
          [&](int64_t channel, int64_t s) { return alpha[channel] * at<T>(a, n, first + channel, s); },
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

}  // namespace shapleycam
