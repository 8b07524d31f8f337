// What one worker does: the partial map of a chunk of channels of one image.
#pragma once

#include "../include/shapleycam.h"
#include "../utility.h"

namespace shapleycam {

// Everything a task needs beyond this lives on its stack; a chunk never has more channels than this.
constexpr int64_t kBlock = 2048;
// Nor, channels first, than this: every channel is added to the map that there is, and each time the sum is rounded.
constexpr int64_t kMostAdded = 1024;

struct ReduceTask {
  shapleycam_view a, g, h;  // h.data is null where there is no Hessian-vector product
  int64_t image, first, channels, positions;
  int32_t pooling;
  void* out;  // [positions], of the accumulation type; overwritten
};

struct SumTask {
  shapleycam_view a;
  const void* alpha;  // of the image and chunk: row m starts at alpha + m * alpha_stride
  int64_t alpha_stride;
  int64_t image, first, channels, positions, rows;
  void* out;  // row m starts at out + m * out_stride
  int64_t out_stride;
};

struct RowsTask {
  shapleycam_view logits, bias;  // of one image: [1, 1, k]; bias.data is null where there is none; with nodes, the path's start
  const int64_t* targets;        // [m]
  int64_t m, k;
  int32_t utility, order;
  double scale;
  void* rows;  // [m, k], of the accumulation type
  const double *nodes, *weights;
  int32_t nodes_count;  // 0 where the rows are those of a derivative
};

struct DisplayTask {
  const void* raw;  // [from], of the accumulation type
  int64_t from[3], to[3];
  bool renormalize;
  void* out;
  int32_t out_dtype;
};

struct OverlayTask {
  const void* image;
  int32_t dtype;
  int64_t stride_c, stride_h, stride_w, height, width;
  const float* heat;     // [height, width]
  const uint8_t* table;  // [256, 3]
  float alpha, scale[3], shift[3];
  uint8_t* out;  // [height, width, 3]
};

// One set per instruction set: kernels.inl is compiled once for each.
struct Kernels {
  const char* name;
  void (*reduce_f32)(const ReduceTask&);
  void (*reduce_f64)(const ReduceTask&);
  void (*sum_f32)(const SumTask&);
  void (*sum_f64)(const SumTask&);
  void (*add_f32)(void* out, const void* parts, int64_t count, int64_t parts_count, int64_t stride);
  void (*add_f64)(void* out, const void* parts, int64_t count, int64_t parts_count, int64_t stride);
  void (*rows_f32)(const RowsTask&);
  void (*rows_f64)(const RowsTask&);
  void (*display_f32)(const DisplayTask&);
  void (*display_f64)(const DisplayTask&);
  void (*overlay)(const OverlayTask&);
};

const Kernels& baseline_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// The set for this machine.
const Kernels& kernels();

}  // namespace shapleycam
