// The kernels for activations, gradient and Hessian-vector product of one dtype and layout, in 16-byte loads.
//
// rows   channels first, and a channel's positions are whole packs (28 x 28, 56 x 56): lanes walk along the positions.
// dense  channels first, and they are not (7 x 7), but the image is one run of memory: a chunk of channels comes in as one run
// of
//        packs, is widened into shared memory, and is summed there, so that every row reads every input once.
// last   channels last: a pack is a few channels of one position; groups of lanes share a position.
//
// As in general.cuh a block owns one image's chunk of channels and writes a partial map; sums have a fixed order.
#pragma once

#include "device.cuh"

namespace shapleycam {

constexpr int kMostTile = 4096;  // elements of a dense chunk: two tiles of float are 32 KiB of shared memory
constexpr int kDenseWidest =
    128;                   // positions up to which dense is taken where rows could serve as well: a warp's lanes are full
constexpr int kBatch = 4;  // positions in flight per thread in the last kernel

template <typename E>
struct Packed {
  const E *a, *g, *h;  // h is null where there is no Hessian-vector product
  int64_t a_n, a_c, a_s, g_n, g_c, g_s, h_n, h_c, h_s;
};

template <typename E>
__device__ __forceinline__ void widened(float (&to)[kPack<E>], const E* from) {
  const Pack<E> pack = fetch(from);
#pragma unroll
  for (int j = 0; j < kPack<E>; ++j) to[j] = widen(pack.lane[j]);
}

// w = g - h / 2 of one pack.
template <typename E>
__device__ __forceinline__ void weights(float (&w)[kPack<E>], const E* g, const E* h) {
  widened(w, g);
  if (h == nullptr) return;
  float second[kPack<E>];
  widened(second, h);
#pragma unroll
  for (int j = 0; j < kPack<E>; ++j) w[j] = weight(w[j], second[j]);
}

template <typename E, int kRow>
__global__ void __launch_bounds__(kThreads) rows_kernel(Packed<E> in, const float* given, int64_t images, int64_t channels,
                                                        int64_t positions, int64_t classes, int chunk, float* out) {
  constexpr int V = kPack<E>;
  constexpr int kTogether = kRow == kGiven ? 4 : 1;  // classes served by one read of the activations
  __shared__ float alpha[256], parts[kThreads * V];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk;
  const int count = static_cast<int>(channels - first < chunk ? channels - first : chunk);
  const int64_t vectors = positions / V;
  // Where the positions are fewer than the threads, groups of threads share the channels.
  const int groups = vectors < kThreads ? kThreads / static_cast<int>(vectors) : 1;
  const int group = groups > 1 ? threadIdx.x / static_cast<int>(vectors) : 0;
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    const E* a = in.a + n * in.a_n + first * in.a_c;
    const E* g = in.g + n * in.g_n + first * in.g_c;
    const E* h = in.h == nullptr ? nullptr : in.h + n * in.h_n + first * in.h_c;
    const auto second = [&](int channel) { return h == nullptr ? nullptr : h + channel * in.h_c; };
    if constexpr (kPools<kRow>) {
      for (int channel = warp; channel < count; channel += kWarps) {
        const E *ac = a + channel * in.a_c, *gc = g + channel * in.g_c, *hc = second(channel);
        float sum = 0, activations = 0;
        if constexpr (kRow == SHAPLEYCAM_PLUSPLUS) {
          for (int64_t i = lane * V; i < positions; i += 32 * V) {
            float x[V], part = 0;
            widened(x, ac + i);
#pragma unroll
            for (int j = 0; j < V; ++j) part += x[j];
            activations += part;
          }
          activations = warp_sum(activations);
        }
#pragma unroll 2
        for (int64_t i = lane * V; i < positions; i += 32 * V) {
          // A pack at a time, since every addition rounds what the sum has become; "activation" has no register to spare.
          constexpr bool kByPack = kRow != SHAPLEYCAM_ACTIVATION;
          float w[V], x[V], part = kByPack ? 0.0f : sum;
          weights(w, gc + i, hc == nullptr ? nullptr : hc + i);
          if constexpr (kRow == SHAPLEYCAM_ACTIVATION) widened(x, ac + i);
#pragma unroll
          for (int j = 0; j < V; ++j) pool<kRow>(w[j], x[j], part, activations);
          sum = kByPack ? sum + part : part;
        }
        sum = warp_sum(sum);
        if constexpr (kRow == SHAPLEYCAM_ACTIVATION) activations = warp_sum(activations);
        if (lane == 0) alpha[channel] = channel_weight<kRow>(sum, activations, positions);
      }
      __syncthreads();
    }
    for (int64_t m = 0; m < classes; m += kTogether) {
      const float* row_weights = given == nullptr ? nullptr : given + (n * classes + m) * channels + first;
      float* row = out + ((n * gridDim.x + blockIdx.x) * classes + m) * positions;
      for (int64_t base = 0; base < vectors; base += kThreads) {
        const int64_t v = groups > 1 ? threadIdx.x % vectors : base + threadIdx.x;
        float sums[kTogether][V] = {};
        if (group < groups && v < vectors) {
#pragma unroll 2
          for (int channel = group; channel < count; channel += groups) {
            float x[V];
            widened(x, a + channel * in.a_c + v * V);
            if constexpr (kRow == kGiven) {
#pragma unroll
              for (int k = 0; k < kTogether; ++k) {
                const float weight = m + k < classes ? row_weights[k * channels + channel] : 0.0f;
#pragma unroll
                for (int j = 0; j < V; ++j) sums[k][j] += weight * x[j];
              }
            } else if constexpr (kPools<kRow>) {
#pragma unroll
              for (int j = 0; j < V; ++j) sums[0][j] += alpha[channel] * x[j];
            } else {
              float w[V];
              const E* hc = second(channel);
              weights(w, g + channel * in.g_c + v * V, hc == nullptr ? nullptr : hc + v * V);
#pragma unroll
              for (int j = 0; j < V; ++j) sums[0][j] += term<kRow>(w[j], x[j]);
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (m + k >= classes) break;
          if (groups == 1) {
            if (v < vectors) {
#pragma unroll
              for (int j = 0; j < V; ++j) row[k * positions + v * V + j] = sums[k][j];
            }
            continue;
          }
          if (group < groups) {
#pragma unroll
            for (int j = 0; j < V; ++j) parts[group * positions + v * V + j] = sums[k][j];
          }
          __syncthreads();
          for (int64_t p = threadIdx.x; p < positions; p += kThreads) {
            float all = 0;
            for (int i = 0; i < groups; ++i) all += parts[i * positions + p];
            row[k * positions + p] = all;
          }
          __syncthreads();
        }
      }
    }
    __syncthreads();  // the next image overwrites alpha
  }
}

template <typename E, int kRow>
__global__ void __launch_bounds__(kThreads) dense_kernel(Packed<E> in, const float* given, int64_t images, int64_t channels,
                                                         int64_t positions, int64_t classes, int chunk, float* out) {
  constexpr int V = kPack<E>;
  SHAPLEYCAM_DYNAMIC_SHARED(float, shared);
  const int S = static_cast<int>(positions), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* x = shared;                                       // activations, or their products where the row is elementwise
  float* w = x + chunk * S;                                // weights, where the row pools them
  float* alpha = w + (kPools<kRow> ? chunk * S : 0);       // [chunk]
  float* parts = alpha + (kPerChannel<kRow> ? chunk : 0);  // [kThreads]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk;
  const int count = static_cast<int>(channels - first < chunk ? channels - first : chunk);
  const int length = count * S, packs = length / V * V;
  const int groups = S < kThreads ? kThreads / S : 1;
  const int group = groups > 1 ? threadIdx.x / S : 0;
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    const E* a = in.a + n * in.a_n + first * positions;
    const E* g = in.g + n * in.g_n + first * positions;
    const E* h = in.h == nullptr ? nullptr : in.h + n * in.h_n + first * positions;
#pragma unroll 4
    for (int i = threadIdx.x * V; i < packs; i += kThreads * V) {
      float from_a[V], from_w[V];
      widened(from_a, a + i);
      if constexpr (kRow != kGiven) weights(from_w, g + i, h == nullptr ? nullptr : h + i);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        x[i + j] = kPerChannel<kRow> ? from_a[j] : term<kRow>(from_w[j], from_a[j]);
        if constexpr (kPools<kRow>) w[i + j] = from_w[j];
      }
    }
    for (int i = packs + threadIdx.x; i < length; i += kThreads) {
      const float from_a = widen(a[i]);
      float from_w = 0;
      if constexpr (kRow != kGiven) from_w = weight(widen(g[i]), h == nullptr ? 0.0f : widen(h[i]));
      x[i] = kPerChannel<kRow> ? from_a : term<kRow>(from_w, from_a);
      if constexpr (kPools<kRow>) w[i] = from_w;
    }
    __syncthreads();
    if constexpr (kPools<kRow>) {
      for (int channel = warp; channel < count; channel += kWarps) {
        const float *xc = x + channel * S, *wc = w + channel * S;
        float sum = 0, activations = 0;
        if constexpr (kRow != SHAPLEYCAM_MEAN) {
          for (int s = lane; s < S; s += 32) activations += xc[s];
          activations = warp_sum(activations);
        }
        for (int s = lane; s < S; s += 32) {
          if constexpr (kRow == SHAPLEYCAM_ACTIVATION) {
            sum += wc[s] * xc[s];  // the activations are summed above
          } else {
            pool<kRow>(wc[s], 0.0f, sum, activations);
          }
        }
        sum = warp_sum(sum);
        if (lane == 0) alpha[channel] = channel_weight<kRow>(sum, activations, positions);
      }
      __syncthreads();
    }
    for (int64_t m = 0; m < classes; ++m) {
      if constexpr (kRow == kGiven) {
        for (int i = threadIdx.x; i < count; i += kThreads) alpha[i] = given[(n * classes + m) * channels + first + i];
        __syncthreads();
      }
      float* row = out + ((n * gridDim.x + blockIdx.x) * classes + m) * positions;
      const auto sum_at = [&](int p) {
        float sum = 0;
        for (int channel = group; channel < count; channel += groups) {
          sum += kPerChannel<kRow> ? alpha[channel] * x[channel * S + p] : x[channel * S + p];
        }
        return sum;
      };
      if (groups == 1) {
        for (int p = threadIdx.x; p < S; p += kThreads) row[p] = sum_at(p);
      } else {
        if (group < groups) parts[threadIdx.x] = sum_at(threadIdx.x % S);
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < S) {
          float all = 0;
          for (int i = 0; i < groups; ++i) all += parts[i * S + threadIdx.x];
          row[threadIdx.x] = all;
        }
      }
      __syncthreads();  // the next class overwrites alpha and parts, the next image everything
    }
  }
}

template <typename E, int kRow>
__global__ void __launch_bounds__(kThreads) last_kernel(Packed<E> in, const float* given, int64_t images, int64_t channels,
                                                        int64_t positions, int64_t classes, int chunk, float* out) {
  constexpr int V = kPack<E>;
  __shared__ float parts[kThreads * V];
  const int lanes = chunk / V, lane = threadIdx.x % lanes;  // lanes that share a position: a power of two up to 32
  const int groups = kThreads / lanes, group = threadIdx.x / lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk, c = first + lane * V;
  const bool live = c < channels;
  // Adds a pack's sums over the groups of positions up, for every group alike.
  const auto over_groups = [&](float (&sum)[V]) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) parts[threadIdx.x * V + j] = sum[j];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sum[j] = 0;
      for (int i = 0; i < groups; ++i) sum[j] += parts[(i * lanes + lane) * V + j];
    }
  };
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    const E* a = in.a + n * in.a_n + c;
    const E* g = in.g + n * in.g_n + c;
    const E* h = in.h == nullptr ? nullptr : in.h + n * in.h_n + c;
    const auto weights_at = [&](float (&w)[V], int64_t s) {
      weights(w, g + s * in.g_s, h == nullptr ? nullptr : h + s * in.h_s);
    };
    float alpha[V] = {};
    if constexpr (kPools<kRow>) {
      float activations[V] = {};
      if constexpr (kRow == SHAPLEYCAM_PLUSPLUS) {
        for (int64_t s = group; live && s < positions; s += groups) {
          float x[V];
          widened(x, a + s * in.a_s);
#pragma unroll
          for (int j = 0; j < V; ++j) activations[j] += x[j];
        }
        over_groups(activations);
      }
#pragma unroll 4
      for (int64_t s = group; live && s < positions; s += groups) {
        float w[V], x[V];
        weights_at(w, s);
        if constexpr (kRow == SHAPLEYCAM_ACTIVATION) widened(x, a + s * in.a_s);
#pragma unroll
        for (int j = 0; j < V; ++j) pool<kRow>(w[j], x[j], alpha[j], activations[j]);
      }
      over_groups(alpha);
      if constexpr (kRow == SHAPLEYCAM_ACTIVATION) over_groups(activations);
#pragma unroll
      for (int j = 0; j < V; ++j) alpha[j] = channel_weight<kRow>(alpha[j], activations[j], positions);
    }
    // Every thread takes part in every step, because the shuffles want all of them.
    for (int64_t base = 0; base < positions; base += static_cast<int64_t>(groups) * kBatch) {
      float x[kBatch][V] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t s = base + b * groups + group;
        if (!live || s >= positions) continue;
        widened(x[b], a + s * in.a_s);
        if constexpr (!kPerChannel<kRow>) {
          float w[V];
          weights_at(w, s);
#pragma unroll
          for (int j = 0; j < V; ++j) x[b][j] = term<kRow>(w[j], x[b][j]);
        }
      }
      for (int64_t m = 0; m < classes; ++m) {
        if constexpr (kRow == kGiven) {
          const float* row_weights = given + (n * classes + m) * channels + c;
#pragma unroll
          for (int j = 0; j < V; ++j) alpha[j] = live ? row_weights[j] : 0.0f;
        }
        float* row = out + ((n * gridDim.x + blockIdx.x) * classes + m) * positions;
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          float sum = 0;
#pragma unroll
          for (int j = 0; j < V; ++j) sum += kPerChannel<kRow> ? (live ? alpha[j] * x[b][j] : 0.0f) : x[b][j];
          for (int other = lanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
          const int64_t s = base + b * groups + group;
          if (lane == 0 && s < positions) row[s] = sum;
        }
      }
    }
  }
}

}  // namespace shapleycam
