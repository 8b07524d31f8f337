// Between reduce.cu, which makes an image's partial maps, and display.cu, which adds them up on the way to the display form.
#pragma once

#include "launch.h"

namespace shapleycam {

// Partial maps [n, pieces, m, s], contiguous, of the accumulation type.
struct Parts {
  const void* data;
  int64_t pieces;
};

// The first half of channel_weighted_sum: the partial maps in the workspace, or the whole ones in `out` where there is one
// piece.
int32_t channel_parts(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c, int64_t s, int64_t m,
                      void* out, void* workspace, cudaStream_t stream, Parts* parts);

// Whether maps of these extents can be added up and shown in one launch.
bool shows_parts(const int64_t* from, const int64_t* to, int32_t dtype);

// The second half, and the display form, in one launch: raw[n, m, s] and out[n, m, to...].
int32_t display_parts(const Parts& parts, int64_t n, int64_t m, const int64_t* from, const int64_t* to, bool renormalize,
                      void* raw, int32_t dtype, void* out, int32_t out_dtype, cudaStream_t stream);

}  // namespace shapleycam
