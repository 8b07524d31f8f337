// display_map and overlay on CUDA devices, one launch each; and the display form of partial maps.
#include "display.cuh"
#include "parts.h"

namespace shapleycam {
namespace {

constexpr size_t kMostShared = 40 << 10;    // of a map with its tables, in bytes; larger maps are read where they are
constexpr int64_t kBlocksAtOnce = 4 * 132;  // as many as the largest chip holds of them

// A map is the sum of `pieces` partial maps, in their order: parts[n / classes, piece, n % classes].
template <typename T>
struct Sources {
  const T* parts;
  int64_t pieces, classes;
};

template <typename T>
size_t shared_bytes(const Axes<T>& axes) {
  const size_t numbers = static_cast<size_t>(positions_of(axes)) + kThreads + static_cast<size_t>(lines_of(axes));
  return numbers * sizeof(T) + static_cast<size_t>(lines_of(axes)) * 2 * sizeof(int32_t);
}

// A block writes `part` rows of one resized map; each of them adds the map up and finds the extents again, which is little. The
// map and the places of its extremes are in shared memory.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    display_kernel(Sources<T> in, int64_t images, Axes<T> axes, bool renormalize, bool wide, int32_t part, T* raws, Out* outs) {
  SHAPLEYCAM_DYNAMIC_SHARED(T, units);
  const int32_t count = positions_of(axes), thread = static_cast<int32_t>(threadIdx.x);
  const int32_t ez = extremes(axes.z), ey = extremes(axes.y), ex = extremes(axes.x), lines = ez + ey + ex;
  T *sums = units + count, *weights = sums + kThreads;
  int32_t *lows = reinterpret_cast<int32_t*>(weights + lines), *highs = lows + lines;
  const int32_t rows = axes.z.to * axes.y.to, begin = static_cast<int32_t>(blockIdx.x) * part;
  const int32_t end = rows - begin < part ? rows : begin + part;
  for (int32_t q = thread; renormalize && q < lines; q += kThreads) {
    const int32_t of_y = q - ez, of_x = of_y - ey;
    const Line<T> axis = of_y < 0 ? axes.z : (of_x < 0 ? axes.y : axes.x);
    const Spot<T> spot = place(extreme(of_y < 0 ? q : (of_x < 0 ? of_y : of_x), axis), axis);
    lows[q] = spot.low;
    highs[q] = spot.high;
    weights[q] = spot.weight;
  }
  const auto line = [&](int32_t q) { return Spot<T>{lows[q], highs[q], weights[q]}; };
  const auto unit = [&](int32_t i) { return units[i]; };
  // Where the positions are fewer than the threads, groups of threads share the pieces.
  const int32_t groups = in.pieces > 1 && count < kThreads ? kThreads / count : 1;
  const int32_t group = groups > 1 ? thread / count : 0, own = thread - group * count;
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    const T* from = in.parts + (n / in.classes * in.pieces * in.classes + n % in.classes) * count;
    const int64_t step = in.classes * count;
    Extent<T> extent = no_extent<T>();
    const auto keep = [&](int32_t i, T sum) {
      units[i] = sum;
      extent.add(positive(sum));
      if (raws != nullptr && blockIdx.x == 0) raws[n * count + i] = sum;
    };
    if (groups > 1) {
      T sum = 0;
      if (group < groups) {
        const int64_t share = (in.pieces + groups - 1) / groups, first = group * share;
        const int64_t last = first + share < in.pieces ? first + share : in.pieces;
#pragma unroll 8
        for (int64_t p = first; p < last; ++p) sum += from[p * step + own];
      }
      sums[thread] = sum;
      __syncthreads();
      if (thread < count) {
        T all = 0;
        for (int32_t g = 0; g < groups; ++g) all += sums[g * count + thread];
        keep(thread, all);
      }
    } else {
      for (int32_t i = thread; i < count; i += kThreads) {
        T sum = 0;
#pragma unroll 8
        for (int64_t p = 0; p < in.pieces; ++p) sum += from[p * step + i];
        keep(i, sum);
      }
    }
    extent = over_block(extent);
    const T divisor = divisor_of(extent.low, extent.high);
    for (int32_t i = thread; i < count; i += kThreads) units[i] = unit_of(units[i], extent.low, divisor);
    __syncthreads();
    T low = 0, inverse = 1;
    if (renormalize) {
      Extent<T> again = no_extent<T>();
      for (int32_t i = thread; i < ez * ey * ex; i += kThreads) {
        const int32_t plane = i / ex, qz = plane / ey;
        again.add(resized(axes, unit, line(qz), line(ez + plane - qz * ey), line(ez + ey + i - plane * ex)));
      }
      again = over_block(again);
      low = again.low;
      inverse = T(1) / divisor_of(again.low, again.high);
    }
    write_any_rows(axes, unit, renormalize, low, inverse, wide, begin, end, outs + n * rows * axes.x.to);
    __syncthreads();  // the next image overwrites the map
  }
}

// The same for maps that shared memory does not hold.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    large_display_kernel(const T* raws, int64_t images, Axes<T> axes, bool renormalize, bool wide, int32_t part, Out* outs) {
  const int32_t count = positions_of(axes), thread = static_cast<int32_t>(threadIdx.x);
  const int32_t rows = axes.z.to * axes.y.to, begin = static_cast<int32_t>(blockIdx.x) * part;
  const int32_t end = rows - begin < part ? rows : begin + part;
  for (int64_t n = blockIdx.y; n < images; n += gridDim.y) {
    const T* raw = raws + n * count;
    Extent<T> extent = no_extent<T>();
    for (int32_t i = thread; i < count; i += kThreads) extent.add(positive(raw[i]));
    extent = over_block(extent);
    const T least = extent.low, divisor = divisor_of(extent.low, extent.high);
    const auto unit = [&](int32_t i) { return unit_of(raw[i], least, divisor); };
    T low = 0, inverse = 1;
    if (renormalize) {
      const int32_t ey = extremes(axes.y), ex = extremes(axes.x);
      const int64_t candidates = static_cast<int64_t>(extremes(axes.z)) * ey * ex;
      extent = no_extent<T>();
      for (int64_t i = thread; i < candidates; i += kThreads) {
        const int32_t plane = static_cast<int32_t>(i / ex), qz = plane / ey, qx = static_cast<int32_t>(i % ex);
        extent.add(resized(axes, unit, place(extreme(qz, axes.z), axes.z), place(extreme(plane - qz * ey, axes.y), axes.y),
                           place(extreme(qx, axes.x), axes.x)));
      }
      extent = over_block(extent);
      low = extent.low;
      inverse = T(1) / divisor_of(extent.low, extent.high);
    }
    write_any_rows(axes, unit, renormalize, low, inverse, wide, begin, end, outs + n * rows * axes.x.to);
  }
}

// Positions are counted in 32 bits within a map.
bool counts(const int64_t* extents) {
  int64_t total = 0;
  return !overflows(extents[0], extents[1], &total) && !overflows(total, extents[2], &total) && total <= INT32_MAX / 4;
}

template <typename T>
Axes<T> axes_of(const int64_t* from, const int64_t* to) {
  return {axis_of<T, int32_t>(from[0], to[0]), axis_of<T, int32_t>(from[1], to[1]), axis_of<T, int32_t>(from[2], to[2])};
}

template <typename T>
bool fits(const Axes<T>& axes) {
  return shared_bytes(axes) <= kMostShared;
}

// `raws` is where the sums go, or null where there is nothing to add.
template <typename T, typename Out>
int32_t display(const Sources<T>& in, int64_t n, const Axes<T>& axes, bool renormalize, T* raws, Out* out,
                cudaStream_t stream) {
  const bool wide = axes.x.to % kWide == 0 && reinterpret_cast<uintptr_t>(out) % kStore<Out, kWide> == 0;
  const int64_t rows = static_cast<int64_t>(axes.z.to) * axes.y.to, at_once = rows_at_once(axes.x.to, wide ? kWide : 1);
  const int64_t overhead = positions_of(axes) + static_cast<int64_t>(extremes(axes.z)) * extremes(axes.y) * extremes(axes.x);
  // As many blocks as the device takes, unless a block would find extents for longer than it writes.
  const int64_t least = overhead > 4 * kThreads ? overhead : 4 * kThreads, most = rows * axes.x.to / least;
  int64_t blocks = (kBlocksAtOnce + n - 1) / n;
  blocks = blocks < most ? blocks : most;
  blocks = blocks < 1 ? 1 : blocks;
  const int64_t whole = (rows + blocks - 1) / blocks, up = (whole + at_once - 1) / at_once * at_once;
  // Whole turns of the block's threads: fewer rows to a block where that makes no more blocks than the device takes.
  const int64_t down = whole < at_once ? at_once : whole / at_once * at_once;
  const int64_t part = n * ((rows + down - 1) / down) <= kBlocksAtOnce ? down : up;
  const dim3 grid(static_cast<unsigned>((rows + part - 1) / part), grid_extent(n));
  if (fits(axes)) {
    const auto kernel = display_kernel<T, Out>;
    SHAPLEYCAM_LAUNCH(kernel, grid, kThreads, shared_bytes(axes), stream, in, n, axes, renormalize, wide,
                      static_cast<int32_t>(part), raws, out);
  } else {
    const auto kernel = large_display_kernel<T, Out>;
    SHAPLEYCAM_LAUNCH(kernel, grid, kThreads, 0, stream, in.parts, n, axes, renormalize, wide, static_cast<int32_t>(part), out);
  }
  return launched();
}

template <typename T>
int32_t pick_out(const Parts& parts, int64_t n, int64_t m, const int64_t* from, const int64_t* to, bool renormalize, void* raw,
                 void* out, int32_t out_dtype, cudaStream_t stream) {
  if (!counts(from) || !counts(to)) return SHAPLEYCAM_UNSUPPORTED;
  const Sources<T> in = {static_cast<const T*>(parts.data), parts.pieces, m};
  const Axes<T> axes = axes_of<T>(from, to);
  T* raws = static_cast<T*>(raw);
  if (out_dtype == SHAPLEYCAM_FLOAT16) {
    return display(in, n * m, axes, renormalize, raws, static_cast<Float16*>(out), stream);
  }
  if (out_dtype == SHAPLEYCAM_UINT8) return display(in, n * m, axes, renormalize, raws, static_cast<uint8_t*>(out), stream);
  return display(in, n * m, axes, renormalize, raws, static_cast<T*>(out), stream);
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

bool shows_parts(const int64_t* from, const int64_t* to, int32_t dtype) {
  if (!counts(from) || !counts(to)) return false;
  return dtype == SHAPLEYCAM_FLOAT64 ? fits(axes_of<double>(from, to)) : fits(axes_of<float>(from, to));
}

int32_t display_parts(const Parts& parts, int64_t n, int64_t m, const int64_t* from, const int64_t* to, bool renormalize,
                      void* raw, int32_t dtype, void* out, int32_t out_dtype, cudaStream_t stream) {
  return (dtype == SHAPLEYCAM_FLOAT64 ? pick_out<double> : pick_out<float>)(parts, n, m, from, to, renormalize, raw, out,
                                                                            out_dtype, stream);
}

}  // namespace shapleycam

using namespace shapleycam;

extern "C" {

int32_t shapleycam_display_map_cuda(const void* raw, int32_t dtype, int64_t n, const int64_t* from, const int64_t* to,
                                    int32_t renormalize, void* out, int32_t out_dtype, void* stream) {
  SHAPLEYCAM_RETURN_IF(check_display(raw, dtype, n, from, to, out, out_dtype));
  if (n == 0) return SHAPLEYCAM_OK;
  return display_parts({raw, 1}, n, 1, from, to, renormalize != 0, nullptr, dtype, out, out_dtype,
                       static_cast<cudaStream_t>(stream));
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
