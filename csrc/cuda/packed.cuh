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
    128;  // positions up to which dense is taken where rows could serve as well: a warp's lanes are full
// Packs of one tensor that a thread asks for before it uses the first: what a multiprocessor has under way decides how much of
// the memory's bandwidth it gets. Fewer where three tensors are read together, and registers would run out.
constexpr int kAhead = 4;
template <int kRow>
constexpr int kAheadOf = kPerChannel<kRow> ? kAhead : kAhead / 2;

constexpr int kResident = 3;  // blocks of a multiprocessor that are asked for: for more the assembler would spill

template <typename E>
struct Packed {
  const E *a, *g, *h;  // h is null where there is no Hessian-vector product
  int64_t a_n, a_c, a_s, g_n, g_c, g_s, h_n, h_c, h_s;
};

template <typename E>
__device__ __forceinline__ void widened(float (&to)[kPack<E>], const Pack<E>& pack) {
#pragma unroll
  for (int j = 0; j < kPack<E>; ++j) to[j] = widen(pack.lane[j]);
}

// Where there is no pack, zeros, which add nothing. By selection: ptxas moves a load behind the branches that its use stands
// behind, and then one load is under way instead of all.
template <typename E>
__device__ __forceinline__ Pack<E> pack_or_zeros(bool there, const Pack<E>& pack) {
  unsigned words[4];
  memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = there ? words[i] : 0u;
  Pack<E> found;
  memcpy(&found, words, sizeof(pack));
  return found;
}

// Packs at kCount offsets, all asked for before the first is used: no load depends on a condition of its own, so that who calls
// gives an offset within the tensor also where there is no such pack.
template <typename E, int kCount, typename Offset>
__device__ __forceinline__ void ask(Pack<E> (&packs)[kCount], const E* from, Offset offset) {
#pragma unroll
  for (int b = 0; b < kCount; ++b) packs[b] = fetch_here(from + offset(b));
}

// Packs of the gradient, and of the Hessian-vector product where there is one.
template <typename E, int kCount>
struct Derivatives {
  Pack<E> g[kCount], h[kCount];
  bool second;

  template <typename OffsetG, typename OffsetH>
  __device__ __forceinline__ void ask_for(const E* from_g, OffsetG offset_g, const E* from_h, OffsetH offset_h) {
    second = from_h != nullptr;
    ask(g, from_g, offset_g);
    if (second) ask(h, from_h, offset_h);
  }

  // w = g - h / 2 of pack b, or zeros.
  __device__ __forceinline__ void weights(float (&w)[kPack<E>], int b, bool there) const {
    widened(w, pack_or_zeros(there, g[b]));
    if (!second) return;
    float more[kPack<E>];
    widened(more, pack_or_zeros(there, h[b]));
#pragma unroll
    for (int j = 0; j < kPack<E>; ++j) w[j] = weight(w[j], more[j]);
  }
};

template <typename E, int kRow>
__global__ void __launch_bounds__(kThreads, kResident)
    rows_kernel(Packed<E> in, const float* given, int64_t images, int64_t channels, int64_t positions, int64_t classes,
                int chunk, float* out) {
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
    if constexpr (kPools<kRow>) {
      for (int channel = warp; channel < count; channel += kWarps) {
        const E *ac = a + channel * in.a_c, *gc = g + channel * in.g_c, *hc = h == nullptr ? nullptr : h + channel * in.h_c;
        float sum = 0, activations = 0;
        if constexpr (kRow == SHAPLEYCAM_PLUSPLUS) {
          for (int64_t i = lane * V; i < positions; i += 32 * V * kAhead) {
            Pack<E> packs[kAhead];
            ask(packs, ac, [&](int b) { return i + 32 * V * b < positions ? i + 32 * V * b : i; });
#pragma unroll
            for (int b = 0; b < kAhead; ++b) {
              float x[V], part = 0;
              widened(x, pack_or_zeros(i + 32 * V * b < positions, packs[b]));
#pragma unroll
              for (int j = 0; j < V; ++j) part += x[j];
              activations += part;
            }
          }
          activations = warp_sum(activations);
        }
        // A pack at a time, since every addition rounds what the sum has become; "activation" has no register to spare.
        constexpr bool kByPack = kRow != SHAPLEYCAM_ACTIVATION;
        constexpr int kTogether = kRow == SHAPLEYCAM_MEAN ? kAhead : kAhead / 2;
        for (int64_t i = lane * V; i < positions; i += 32 * V * kTogether) {
          const auto at = [&](int b) { return i + 32 * V * b < positions ? i + 32 * V * b : i; };
          Derivatives<E, kTogether> derivatives;
          Pack<E> packs[kTogether];
          derivatives.ask_for(gc, at, hc, at);
          if constexpr (kRow == SHAPLEYCAM_ACTIVATION) ask(packs, ac, at);
#pragma unroll
          for (int b = 0; b < kTogether; ++b) {
            const bool there = i + 32 * V * b < positions;
            float w[V], x[V] = {}, part = kByPack ? 0.0f : sum;
            derivatives.weights(w, b, there);
            if constexpr (kRow == SHAPLEYCAM_ACTIVATION) widened(x, pack_or_zeros(there, packs[b]));
#pragma unroll
            for (int j = 0; j < V; ++j) pool<kRow>(w[j], x[j], part, activations);
            sum = kByPack ? sum + part : part;
          }
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
          constexpr int kChannels = kAheadOf<kRow>;
          for (int from = group; from < count; from += groups * kChannels) {
            const auto near = [&](int b) { return static_cast<int64_t>(from + b * groups < count ? from + b * groups : from); };
            Pack<E> packs[kChannels];
            Derivatives<E, kChannels> derivatives;
            ask(packs, a, [&](int b) { return near(b) * in.a_c + v * V; });
            if constexpr (!kPerChannel<kRow>) {
              derivatives.ask_for(
                  g, [&](int b) { return near(b) * in.g_c + v * V; }, h, [&](int b) { return near(b) * in.h_c + v * V; });
            }
#pragma unroll
            for (int b = 0; b < kChannels; ++b) {
              const bool there = from + b * groups < count;
              const int channel = there ? from + b * groups : from;
              float x[V];
              widened(x, pack_or_zeros(there, packs[b]));
              if constexpr (kRow == kGiven) {
#pragma unroll
                for (int k = 0; k < kTogether; ++k) {
                  const float weight = there && m + k < classes ? row_weights[k * channels + channel] : 0.0f;
#pragma unroll
                  for (int j = 0; j < V; ++j) sums[k][j] += weight * x[j];
                }
              } else if constexpr (kPools<kRow>) {
#pragma unroll
                for (int j = 0; j < V; ++j) sums[0][j] += (there ? alpha[channel] : 0.0f) * x[j];
              } else {
                float w[V];
                derivatives.weights(w, b, there);
#pragma unroll
                for (int j = 0; j < V; ++j) sums[0][j] += term<kRow>(w[j], x[j]);
              }
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
    constexpr int kTogether = kRow == kGiven ? kAhead : kAhead / 2;
    for (int from = threadIdx.x * V; from < packs; from += kThreads * V * kTogether) {
      const auto near = [&](int b) { return from + kThreads * V * b < packs ? from + kThreads * V * b : from; };
      Pack<E> activations[kTogether];
      Derivatives<E, kTogether> derivatives;
      ask(activations, a, near);
      if constexpr (kRow != kGiven) derivatives.ask_for(g, near, h, near);
#pragma unroll
      for (int b = 0; b < kTogether; ++b) {
        const int i = near(b);  // where there is no pack, the first one is stored again
        float from_a[V], from_w[V] = {};
        widened(from_a, activations[b]);
        if constexpr (kRow != kGiven) derivatives.weights(from_w, b, true);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          x[i + j] = kPerChannel<kRow> ? from_a[j] : term<kRow>(from_w[j], from_a[j]);
          if constexpr (kPools<kRow>) w[i + j] = from_w[j];
        }
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
__global__ void __launch_bounds__(kThreads, kResident)
    last_kernel(Packed<E> in, const float* given, int64_t images, int64_t channels, int64_t positions, int64_t classes,
                int chunk, float* out) {
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
    const int64_t at = live ? c : 0;  // lanes beyond the channels read what others do, and add nothing
    const E* a = in.a + n * in.a_n + at;
    const E* g = in.g + n * in.g_n + at;
    const E* h = in.h == nullptr ? nullptr : in.h + n * in.h_n + at;
    float alpha[V] = {};
    if constexpr (kPools<kRow>) {
      float activations[V] = {};
      if constexpr (kRow == SHAPLEYCAM_PLUSPLUS) {
        for (int64_t from = group; live && from < positions; from += static_cast<int64_t>(groups) * kAhead) {
          Pack<E> packs[kAhead];
          ask(packs, a, [&](int b) { return (from + b * groups < positions ? from + b * groups : from) * in.a_s; });
#pragma unroll
          for (int b = 0; b < kAhead; ++b) {
            float x[V];
            widened(x, pack_or_zeros(from + b * groups < positions, packs[b]));
#pragma unroll
            for (int j = 0; j < V; ++j) activations[j] += x[j];
          }
        }
        over_groups(activations);
      }
      // These two have no registers to spare.
      constexpr int kTogether = kRow == SHAPLEYCAM_ACTIVATION || kRow == SHAPLEYCAM_PLUSPLUS ? kAhead / 2 : kAhead;
      for (int64_t from = group; live && from < positions; from += static_cast<int64_t>(groups) * kTogether) {
        const auto near = [&](int b) { return from + b * groups < positions ? from + b * groups : from; };
        Derivatives<E, kTogether> derivatives;
        Pack<E> packs[kTogether];
        derivatives.ask_for(g, [&](int b) { return near(b) * in.g_s; }, h, [&](int b) { return near(b) * in.h_s; });
        if constexpr (kRow == SHAPLEYCAM_ACTIVATION) ask(packs, a, [&](int b) { return near(b) * in.a_s; });
#pragma unroll
        for (int b = 0; b < kTogether; ++b) {
          const bool there = from + b * groups < positions;
          float w[V], x[V] = {};
          derivatives.weights(w, b, there);
          if constexpr (kRow == SHAPLEYCAM_ACTIVATION) widened(x, pack_or_zeros(there, packs[b]));
#pragma unroll
          for (int j = 0; j < V; ++j) pool<kRow>(w[j], x[j], alpha[j], activations[j]);
        }
      }
      over_groups(alpha);
      if constexpr (kRow == SHAPLEYCAM_ACTIVATION) over_groups(activations);
#pragma unroll
      for (int j = 0; j < V; ++j) alpha[j] = channel_weight<kRow>(alpha[j], activations[j], positions);
    }
    // Every thread takes part in every step, because the shuffles want all of them.
    constexpr int kPositions = kAheadOf<kRow>;
    for (int64_t base = 0; base < positions; base += static_cast<int64_t>(groups) * kPositions) {
      const auto near = [&](int b) {
        const int64_t s = base + b * groups + group;
        return s < positions ? s : positions - 1;
      };
      Pack<E> packs[kPositions];
      Derivatives<E, kPositions> derivatives;
      ask(packs, a, [&](int b) { return near(b) * in.a_s; });
      if constexpr (!kPerChannel<kRow>) {
        derivatives.ask_for(g, [&](int b) { return near(b) * in.g_s; }, h, [&](int b) { return near(b) * in.h_s; });
      }
      for (int64_t m = 0; m < classes; ++m) {
        if constexpr (kRow == kGiven) {
          const float* row_weights = given + (n * classes + m) * channels + c;
#pragma unroll
          for (int j = 0; j < V; ++j) alpha[j] = live ? row_weights[j] : 0.0f;
        }
        float* row = out + ((n * gridDim.x + blockIdx.x) * classes + m) * positions;
#pragma unroll
        for (int b = 0; b < kPositions; ++b) {
          float sum = 0, x[V], w[V] = {};
          widened(x, packs[b]);
          if constexpr (!kPerChannel<kRow>) derivatives.weights(w, b, true);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const float part = kPerChannel<kRow> ? alpha[j] * x[j] : term<kRow>(w[j], x[j]);
            sum += live ? part : 0.0f;
          }
          for (int other = lanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
          const int64_t s = base + b * groups + group;
          if (lane == 0 && s < positions) row[s] = sum;
        }
      }
    }
  }
}

}  // namespace shapleycam
