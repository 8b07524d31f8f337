/* shapleycam: fused operators for class activation maps, as a plain C ABI.
 *
 * No PyTorch, no Python, no exceptions across this boundary, and no allocation inside: the caller passes a workspace whose
 * size a query function tells (starting a thread aside). Every function returns a shapleycam_status; nothing is written unless
 * it is SHAPLEYCAM_OK.
 *
 * All tensors are strided views [N, C, S] (images, channels, positions); strides count elements and may be zero (an expanded
 * tensor). Any strides are correct; unit stride on S (channels first) or on C (channels last, tokens) is fast. Sums are kept
 * in float32, or in float64 where the activations are float64; the result has that type. NaN propagates.
 * Results are deterministic: they do not depend on the number of threads.
 */
#ifndef SHAPLEYCAM_H
#define SHAPLEYCAM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SHAPLEYCAM_API __declspec(dllexport)
#else
#define SHAPLEYCAM_API __attribute__((visibility("default")))
#endif

typedef enum shapleycam_status {
  SHAPLEYCAM_OK = 0,
  SHAPLEYCAM_NULL_POINTER = 1,    /* a required pointer is null */
  SHAPLEYCAM_BAD_SHAPE = 2,       /* a size is negative, or C or S is zero, or the element count overflows */
  SHAPLEYCAM_BAD_DTYPE = 3,       /* an unknown dtype, or an output that is not the accumulation type */
  SHAPLEYCAM_BAD_POOLING = 4,     /* an unknown row */
  SHAPLEYCAM_SMALL_WORKSPACE = 5, /* the workspace is smaller than the query said */
  SHAPLEYCAM_BAD_ALIGNMENT = 6,   /* a pointer is not aligned to its element, or the workspace not to 16 bytes */
  SHAPLEYCAM_UNSUPPORTED = 7,     /* this build does not implement the call */
  SHAPLEYCAM_LAUNCH_FAILED = 8,   /* CUDA refused the launch: no context, too large a grid, or no code for this chip */
  SHAPLEYCAM_BAD_UTILITY = 9,     /* an unknown utility, or an order that is not 1 or 2 */
  SHAPLEYCAM_BAD_NODES = 10       /* fewer than 1 or more than SHAPLEYCAM_MOST_NODES nodes */
} shapleycam_status;

typedef enum shapleycam_dtype {
  SHAPLEYCAM_FLOAT32 = 0,
  SHAPLEYCAM_FLOAT64 = 1,
  SHAPLEYCAM_FLOAT16 = 2,
  SHAPLEYCAM_BFLOAT16 = 3,
  SHAPLEYCAM_UINT8 = 4 /* images and display maps only */
} shapleycam_dtype;

/* Rows of the method table; w = gradient - hvp / 2, or w = gradient where hvp is null. */
typedef enum shapleycam_pooling {
  SHAPLEYCAM_MEAN = 0,              /* sum_c mean_s(w) A */
  SHAPLEYCAM_ELEMENTWISE = 1,       /* sum_c w A */
  SHAPLEYCAM_ELEMENTWISE_RELU = 2,  /* sum_c max(w A, 0) */
  SHAPLEYCAM_ACTIVATION = 3,        /* a_c = sum_s w A / (sum_s A + 1e-7); sum_c a_c A */
  SHAPLEYCAM_POSITIVE_GRADIENT = 4, /* sum_c max(w, 0) A */
  SHAPLEYCAM_PLUSPLUS = 5           /* a_c = sum_s max(w,0) w^2 / (2 w^2 + w^3 sum_s A + 1e-6), 0 where w = 0; sum_c a_c A */
} shapleycam_pooling;

/* Utilities in the logits z, with p = softmax(z) and the explained class c. */
typedef enum shapleycam_utility {
  SHAPLEYCAM_LOGIT = 0,           /* z_c */
  SHAPLEYCAM_PROBABILITY = 1,     /* p_c */
  SHAPLEYCAM_LOG_PROBABILITY = 2, /* ln p_c */
  SHAPLEYCAM_REST = 3             /* z_c + ln p_c */
} shapleycam_utility;

/* Of a quadrature rule. */
#define SHAPLEYCAM_MOST_NODES 32

/* A strided [N, C, S] view; the extents are passed once per call. */
typedef struct shapleycam_view {
  const void* data;
  int32_t dtype; /* shapleycam_dtype */
  int64_t stride_n;
  int64_t stride_c;
  int64_t stride_s;
} shapleycam_view;

/* What a status means, as a static string. */
SHAPLEYCAM_API const char* shapleycam_status_text(int32_t status);

/* The instruction set the CPU functions use on this machine: "avx512", "avx2", "neon" or "baseline". The environment variable
 * SHAPLEYCAM_CPU_VARIANT, read once, asks for a smaller one: "avx2" or "baseline". */
SHAPLEYCAM_API const char* shapleycam_cpu_variant(void);

/* The largest workspace that weighted_reduce needs for these extents, in bytes; SIZE_MAX where none is large enough. */
SHAPLEYCAM_API size_t shapleycam_weighted_reduce_workspace_cpu(int64_t n, int64_t c, int64_t s, int32_t pooling);

/* out[n, s], contiguous, of the accumulation type; hvp may be null. At most `threads` threads, the caller's included: those of
 * the OpenMP runtime where the process has one (so that they are PyTorch's, say), else threads that are started for the call.
 */
SHAPLEYCAM_API int32_t shapleycam_weighted_reduce_cpu(const shapleycam_view* activations, const shapleycam_view* gradient,
                                                      const shapleycam_view* hvp, int64_t n, int64_t c, int64_t s,
                                                      int32_t pooling, void* out, int32_t out_dtype, void* workspace,
                                                      size_t workspace_size, int32_t threads);

SHAPLEYCAM_API size_t shapleycam_channel_weighted_sum_workspace_cpu(int64_t n, int64_t c, int64_t s, int64_t m);

/* out[n, m, s] = sum_c alpha[n, m, c] activations[n, c, s]; alpha and out contiguous, of the accumulation type. */
SHAPLEYCAM_API int32_t shapleycam_channel_weighted_sum_cpu(const shapleycam_view* activations, const void* alpha, int64_t n,
                                                           int64_t c, int64_t s, int64_t m, void* out, int32_t out_dtype,
                                                           void* workspace, size_t workspace_size, int32_t threads);

/* The display form of n signed maps: max(., 0), min-max, linear resize with half-pixel centres, and, if renormalize is not 0,
 * min-max again; min-max is (m - min) / (1e-7 + (max - min)). `raw` is contiguous [n, from[0], from[1], from[2]] in float32 or
 * float64 (leading extents of 1 for maps of fewer dimensions), `out` contiguous [n, to...] of the same dtype, or float16, or
 * uint8 (0 to 255, NaN as 0). */
SHAPLEYCAM_API int32_t shapleycam_display_map_cpu(const void* raw, int32_t dtype, int64_t n, const int64_t* from,
                                                  const int64_t* to, int32_t renormalize, void* out, int32_t out_dtype,
                                                  int32_t threads);

/* Heatmaps (float32, contiguous [n, height, width], 0 to 1) in colour over images: out[n, height, width, 3]. `images` is
 * [n, 3, height, width] with `strides` (four, in elements), uint8 or any float dtype in 0 to 1, or normalised by mean and std
 * (three each, or both null). `table` is uint8 [256, 3]. Where a heatmap is not finite, the pixel is magenta. */
SHAPLEYCAM_API int32_t shapleycam_overlay_cpu(const void* images, int32_t dtype, int64_t n, int64_t height, int64_t width,
                                              const int64_t* strides, const float* heatmaps, const uint8_t* table, float alpha,
                                              const float* mean, const float* std, uint8_t* out, int32_t threads);

/* For a head that is z = W mean_s(A) + b: rows[n, m, k] = scale (U' - U'' (z - b) / 2), the weights of the logits, whose
 * product with W is the Shapley weight of every channel (order 2); with order 1 only scale U'. `logits` is [n, k], `stride`
 * elements from one row to the next; `bias` is [k] of its own dtype, or null; `targets` is [n, m], and a row whose target is
 * not in [0, k) is NaN. `rows` is contiguous, of the accumulation type. */
SHAPLEYCAM_API int32_t shapleycam_utility_rows_cpu(const void* logits, int32_t dtype, int64_t stride, const void* bias,
                                                   int32_t bias_dtype, const int64_t* targets, int64_t n, int64_t m, int64_t k,
                                                   int32_t utility, int32_t order, double scale, void* rows, int32_t out_dtype,
                                                   int32_t threads);

/* The same with the gradient integrated along a straight path by a quadrature rule of `count` nodes and weights (read on the
 * host): rows[n, m, k] = scale sum_q weights[q] U'(nodes[q] z + (1 - nodes[q]) start). `start` is [n, k] of its own dtype,
 * `start_stride` elements from one row to the next (0 for one row that all images share, such as the head's bias), or null for
 * zero. One read of the logits tells the maxima and the sums of all softmaxes, a second one, where an image has many, the rows.
 */
SHAPLEYCAM_API int32_t shapleycam_quadrature_rows_cpu(const void* logits, int32_t dtype, int64_t stride, const void* start,
                                                      int32_t start_dtype, int64_t start_stride, const int64_t* targets,
                                                      int64_t n, int64_t m, int64_t k, int32_t utility, const double* nodes,
                                                      const double* weights, int32_t count, double scale, void* rows,
                                                      int32_t out_dtype, int32_t threads);

/* channel_weighted_sum and display_map in one: raw[n, m, from...] as the former, maps[n, m, to...] as the latter makes of it.
 * The workspace is that of channel_weighted_sum with s = from[0] from[1] from[2]. */
SHAPLEYCAM_API int32_t shapleycam_class_maps_cpu(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c,
                                                 int64_t m, const int64_t* from, const int64_t* to, int32_t renormalize,
                                                 void* raw, int32_t raw_dtype, void* maps, int32_t maps_dtype, void* workspace,
                                                 size_t workspace_size, int32_t threads);

/* The same on a CUDA device, ordered on `stream` (a cudaStream_t, null for the default one), without synchronisation and
 * without allocation, so that a CUDA graph can capture the call. CUDA loads a kernel when it is first launched, and overlay
 * copies its colour table: make each call once before a capture. Data pointers are device pointers on the current device;
 * extents, strides, mean and std are read on the host. In a build without CUDA these return SHAPLEYCAM_UNSUPPORTED. */
SHAPLEYCAM_API size_t shapleycam_weighted_reduce_workspace_cuda(int64_t n, int64_t c, int64_t s, int32_t pooling);

SHAPLEYCAM_API int32_t shapleycam_weighted_reduce_cuda(const shapleycam_view* activations, const shapleycam_view* gradient,
                                                       const shapleycam_view* hvp, int64_t n, int64_t c, int64_t s,
                                                       int32_t pooling, void* out, int32_t out_dtype, void* workspace,
                                                       size_t workspace_size, void* stream);

SHAPLEYCAM_API size_t shapleycam_channel_weighted_sum_workspace_cuda(int64_t n, int64_t c, int64_t s, int64_t m);

SHAPLEYCAM_API int32_t shapleycam_channel_weighted_sum_cuda(const shapleycam_view* activations, const void* alpha, int64_t n,
                                                            int64_t c, int64_t s, int64_t m, void* out, int32_t out_dtype,
                                                            void* workspace, size_t workspace_size, void* stream);

SHAPLEYCAM_API int32_t shapleycam_display_map_cuda(const void* raw, int32_t dtype, int64_t n, const int64_t* from,
                                                   const int64_t* to, int32_t renormalize, void* out, int32_t out_dtype,
                                                   void* stream);

SHAPLEYCAM_API int32_t shapleycam_overlay_cuda(const void* images, int32_t dtype, int64_t n, int64_t height, int64_t width,
                                               const int64_t* strides, const float* heatmaps, const uint8_t* table, float alpha,
                                               const float* mean, const float* std, uint8_t* out, void* stream);

SHAPLEYCAM_API int32_t shapleycam_utility_rows_cuda(const void* logits, int32_t dtype, int64_t stride, const void* bias,
                                                    int32_t bias_dtype, const int64_t* targets, int64_t n, int64_t m, int64_t k,
                                                    int32_t utility, int32_t order, double scale, void* rows, int32_t out_dtype,
                                                    void* stream);

SHAPLEYCAM_API int32_t shapleycam_quadrature_rows_cuda(const void* logits, int32_t dtype, int64_t stride, const void* start,
                                                       int32_t start_dtype, int64_t start_stride, const int64_t* targets,
                                                       int64_t n, int64_t m, int64_t k, int32_t utility, const double* nodes,
                                                       const double* weights, int32_t count, double scale, void* rows,
                                                       int32_t out_dtype, void* stream);

/* Two launches; as many as its two parts where a map's own positions are thousands. */
SHAPLEYCAM_API int32_t shapleycam_class_maps_cuda(const shapleycam_view* activations, const void* alpha, int64_t n, int64_t c,
                                                  int64_t m, const int64_t* from, const int64_t* to, int32_t renormalize,
                                                  void* raw, int32_t raw_dtype, void* maps, int32_t maps_dtype, void* workspace,
                                                  size_t workspace_size, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* SHAPLEYCAM_H */
