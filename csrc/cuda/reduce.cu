// weighted_reduce and channel_weighted_sum on CUDA devices: which kernel, and how the channels are shared out.
//
// An image's channels are cut into chunks, one to a block; a second, tiny launch adds the partial maps of the chunks up in a
// fixed order. So the result does not depend on scheduling, and every input is read once ("activation" and "plusplus" read the
// activations again, unless the chunk is in shared memory). The chunks depend on the extents alone and not on the device at
// hand, so that the same call gives the same bits on every chip.
#include "general.cuh"
#include "packed.cuh"
#include "parts.h"

namespace shapleycam {
namespace {

struct Plan {
  int chunk;
  int64_t pieces;
};

Plan plan_with(int chunk, int64_t c) { return {chunk, (c + chunk - 1) / chunk}; }

// A chunk is as large as still gives blocks enough; never below `least`, since what is cut has to be added up.
Plan plan_of(int64_t n, int64_t c, int most, int least = kLeastChannels) {
  int chunk = most;
  while (chunk > least && n * ((c + chunk - 1) / chunk) < kBlocksWanted) chunk /= 2;
  return plan_with(chunk, c);
}

// The dense kernel's chunk is a multiple of 8, so that it starts on 16 bytes whatever the element.
Plan dense_plan(int64_t n, int64_t c, int64_t s, int least = 8) {
  int chunk = kMostTile / static_cast<int>(s) / 8 * 8;
  chunk = chunk < kMostChannels ? chunk : kMostChannels;
  while (chunk > least && n * ((c + chunk - 1) / chunk) < kBlocksWanted) {
    chunk = chunk / 2 / 8 * 8;
    chunk = chunk < least ? least : chunk;
  }
  return plan_with(chunk < 8 ? 8 : chunk, c);
}

bool dense_fits(int64_t s) { return s <= kMostTile / 8; }

// The largest of the plans that a call with these extents may take: layout and dtype are not known yet.
size_t partial_bytes(int64_t n, int64_t c, int64_t s, int64_t m) {
  if (n == 0 || check_extents(n, c, s, m) != SHAPLEYCAM_OK) return 0;
  int64_t pieces = plan_of(n, c, 128).pieces, bytes = 0;
  if (dense_fits(s) && dense_plan(n, c, s).pieces > pieces) pieces = dense_plan(n, c, s).pieces;
  if (pieces == 1) return 0;
  // A grid's first extent ends at 2^31 - 1.
  if (pieces > INT32_MAX || overflows(n * pieces, m, &bytes) || overflows(bytes, s * 8, &bytes)) return SIZE_MAX;
  return static_cast<size_t>(bytes);
}

dim3 grid_of(int64_t n, int64_t pieces) { return dim3(static_cast<unsigned>(pieces), grid_extent(n)); }

template <typename T>
int32_t add_parts(const T* parts, int64_t n, int64_t length, int64_t pieces, T* out, cudaStream_t stream) {
  const int64_t total = n * length;
  SHAPLEYCAM_LAUNCH(add_kernel<T>, dim3(grid_extent((total + kThreads - 1) / kThreads)), kThreads, 0, stream, parts, total,
                    length, pieces, out);
  return launched();
}

// One call of either operator: m is 1 and alpha null in weighted_reduce, g and h are null in channel_weighted_sum.
struct Call {
  const shapleycam_view *a, *g, *h;
  const void* alpha;
  int64_t n, c, s, m;
  int32_t row;
  void *out, *workspace;
  cudaStream_t stream;
  Parts* parts;  // not null: who calls adds the pieces up
};

// The display adds an image's pieces up in every block of its own, so that it wants few of them.
int least_channels(const Call& call) { return call.parts == nullptr ? kLeastChannels : 32; }

enum class Kind { general, rows, dense, last };

// Whether a view can be read in packs of `lanes` along the dimension whose stride is `unit`.
bool packs(const shapleycam_view* v, int64_t unit, int64_t other, int64_t images, int64_t lanes) {
  return unit == 1 && other % lanes == 0 && (images == 1 || v->stride_n % lanes == 0) &&
         reinterpret_cast<uintptr_t>(v->data) % 16 == 0;
}

// Mixed dtypes or layouts, expanded weights, and everything that is not aligned take the general kernels.
Kind kind_of(const Call& call) {
  const int64_t lanes = 16 / static_cast<int64_t>(element_size(call.a->dtype));
  bool rows = call.s % lanes == 0, dense = dense_fits(call.s), last = channels_last(call.a) && call.c % lanes == 0;
  if (call.a->dtype == SHAPLEYCAM_FLOAT64) return Kind::general;
  for (const shapleycam_view* v : {call.a, call.g, call.h}) {
    if (v == nullptr) continue;
    if (v->dtype != call.a->dtype) return Kind::general;
    rows = rows && packs(v, v->stride_s, v->stride_c, call.n, lanes);
    dense = dense && packs(v, v->stride_s, 0, call.n, lanes) && v->stride_c == call.s;
    last = last && packs(v, v->stride_c, v->stride_s, call.n, lanes);
  }
  if (last) return Kind::last;
  if (dense && (!rows || call.s <= kDenseWidest)) return Kind::dense;
  return rows ? Kind::rows : Kind::general;
}

// Runs launch(partial maps) and adds the pieces up.
template <typename T, typename Launch>
int32_t in_pieces(const Call& call, const Plan& plan, Launch launch) {
  T* out = static_cast<T*>(call.out);
  T* parts = plan.pieces == 1 ? out : static_cast<T*>(call.workspace);
  SHAPLEYCAM_RETURN_IF(launch(parts));
  if (call.parts != nullptr) {
    *call.parts = {parts, plan.pieces};
    return SHAPLEYCAM_OK;
  }
  return plan.pieces == 1 ? SHAPLEYCAM_OK : add_parts(parts, call.n, call.m * call.s, plan.pieces, out, call.stream);
}

template <typename T, bool kChannelsLast>
int32_t general(const Call& call) {
  const Plan plan = plan_of(call.n, call.c, kMostChannels, least_channels(call));
  const View a = view_of(call.a);
  const Weights<T> w = {view_of(call.g), view_of(call.h)};
  return in_pieces<T>(call, plan, [&](T* parts) {
    return with_row(call.row, [&](auto row) {
      constexpr int kRow = decltype(row)::value;
      if constexpr (kRow == kGiven) {
        const auto kernel = sum_kernel<T, kChannelsLast>;
        SHAPLEYCAM_LAUNCH(kernel, grid_of(call.n, plan.pieces), kThreads, 0, call.stream, a, static_cast<const T*>(call.alpha),
                          call.n, call.c, call.s, call.m, plan.chunk, parts);
      } else {
        const auto kernel = reduce_kernel<T, kChannelsLast, kRow>;
        SHAPLEYCAM_LAUNCH(kernel, grid_of(call.n, plan.pieces), kThreads, 0, call.stream, a, w, call.n, call.c, call.s,
                          plan.chunk, parts);
      }
      return launched();
    });
  });
}

template <typename E>
int32_t packed(const Call& call, Kind kind) {
  const auto data = [](const shapleycam_view* v) { return v == nullptr ? nullptr : static_cast<const E*>(v->data); };
  const shapleycam_view none = {};
  const shapleycam_view &g = call.g == nullptr ? none : *call.g, &h = call.h == nullptr ? none : *call.h;
  const Packed<E> in = {data(call.a), data(call.g), data(call.h), call.a->stride_n, call.a->stride_c, call.a->stride_s,
                        g.stride_n,   g.stride_c,   g.stride_s,   h.stride_n,       h.stride_c,       h.stride_s};
  const int least = least_channels(call);
  const Plan plan = kind == Kind::dense  ? dense_plan(call.n, call.c, call.s, call.parts == nullptr ? 8 : least)
                    : kind == Kind::last ? plan_of(call.n, call.c, 32 * kPack<E>, least)
                                         : plan_of(call.n, call.c, kMostChannels, least);
  return in_pieces<float>(call, plan, [&](float* parts) {
    return with_row(call.row, [&](auto row) {
      constexpr int kRow = decltype(row)::value;
      const auto kernel = kind == Kind::dense  ? dense_kernel<E, kRow>
                          : kind == Kind::last ? last_kernel<E, kRow>
                                               : rows_kernel<E, kRow>;
      const size_t tile = static_cast<size_t>(plan.chunk) * static_cast<size_t>(call.s);
      const size_t floats = tile * (kPools<kRow> ? 2 : 1) + (kPerChannel<kRow> ? plan.chunk : 0) + kThreads;
      SHAPLEYCAM_LAUNCH(kernel, grid_of(call.n, plan.pieces), kThreads, kind == Kind::dense ? floats * sizeof(float) : 0,
                        call.stream, in, static_cast<const float*>(call.alpha), call.n, call.c, call.s, call.m, plan.chunk,
                        parts);
      return launched();
    });
  });
}

int32_t run(const Call& call) {
  const Kind kind = kind_of(call);
  if (kind != Kind::general) {
    if (call.a->dtype == SHAPLEYCAM_FLOAT32) return packed<float>(call, kind);
    return call.a->dtype == SHAPLEYCAM_FLOAT16 ? packed<Float16>(call, kind) : packed<BFloat16>(call, kind);
  }
  if (call.a->dtype == SHAPLEYCAM_FLOAT64) {
    return channels_last(call.a) ? general<double, true>(call) : general<double, false>(call);
  }
  return channels_last(call.a) ? general<float, true>(call) : general<float, false>(call);
}

}  // namespace

int32_t channel_parts(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c, int64_t s, int64_t m,
                      void* out, void* workspace, cudaStream_t stream, Parts* parts) {
  return run({activations, nullptr, nullptr, alpha, n, c, s, m, kGiven, out, workspace, stream, parts});
}

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
  return run(
      {activations, gradient, hvp, nullptr, n, c, s, 1, pooling, out, workspace, static_cast<cudaStream_t>(stream), nullptr});
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
  return run(
      {activations, nullptr, nullptr, alpha, n, c, s, m, kGiven, out, workspace, static_cast<cudaStream_t>(stream), nullptr});
}

}  // extern "C"
