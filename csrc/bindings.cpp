// shapleycam._native: the C ABI for Python. Takes addresses and strides, knows nothing of PyTorch, and releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "include/shapleycam.h"

namespace py = pybind11;

namespace {

using Described = std::tuple<uintptr_t, int32_t, int64_t, int64_t, int64_t>;

shapleycam_view view_of(const Described& d) {
  return {reinterpret_cast<const void*>(std::get<0>(d)), std::get<1>(d), std::get<2>(d), std::get<3>(d), std::get<4>(d)};
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

int32_t reduce_cpu(const Described& a, const Described& g, const std::optional<Described>& h, int64_t n, int64_t c, int64_t s,
                   int32_t pooling, uintptr_t out, int32_t out_dtype, uintptr_t workspace, size_t size, int32_t threads) {
  const shapleycam_view va = view_of(a), vg = view_of(g), vh = h ? view_of(*h) : shapleycam_view{};
  const py::gil_scoped_release release;
  return shapleycam_weighted_reduce_cpu(&va, &vg, h ? &vh : nullptr, n, c, s, pooling, pointer(out), out_dtype,
                                        pointer(workspace), size, threads);
}

int32_t reduce_cuda(const Described& a, const Described& g, const std::optional<Described>& h, int64_t n, int64_t c, int64_t s,
                    int32_t pooling, uintptr_t out, int32_t out_dtype, uintptr_t workspace, size_t size, uintptr_t stream) {
  const shapleycam_view va = view_of(a), vg = view_of(g), vh = h ? view_of(*h) : shapleycam_view{};
  const py::gil_scoped_release release;
  return shapleycam_weighted_reduce_cuda(&va, &vg, h ? &vh : nullptr, n, c, s, pooling, pointer(out), out_dtype,
                                         pointer(workspace), size, pointer(stream));
}

int32_t sum_cpu(const Described& a, uintptr_t alpha, int64_t n, int64_t c, int64_t s, int64_t m, uintptr_t out,
                int32_t out_dtype, uintptr_t workspace, size_t size, int32_t threads) {
  const shapleycam_view va = view_of(a);
  const py::gil_scoped_release release;
  return shapleycam_channel_weighted_sum_cpu(&va, pointer(alpha), n, c, s, m, pointer(out), out_dtype, pointer(workspace), size,
                                             threads);
}

int32_t sum_cuda(const Described& a, uintptr_t alpha, int64_t n, int64_t c, int64_t s, int64_t m, uintptr_t out,
                 int32_t out_dtype, uintptr_t workspace, size_t size, uintptr_t stream) {
  const shapleycam_view va = view_of(a);
  const py::gil_scoped_release release;
  return shapleycam_channel_weighted_sum_cuda(&va, pointer(alpha), n, c, s, m, pointer(out), out_dtype, pointer(workspace),
                                              size, pointer(stream));
}

using Extents = std::array<int64_t, 3>;

int32_t display_cpu(uintptr_t raw, int32_t dtype, int64_t n, const Extents& from, const Extents& to, bool renormalize,
                    uintptr_t out, int32_t out_dtype, int32_t threads) {
  const py::gil_scoped_release release;
  return shapleycam_display_map_cpu(pointer(raw), dtype, n, from.data(), to.data(), renormalize, pointer(out), out_dtype,
                                    threads);
}

int32_t rows_cpu(uintptr_t logits, int32_t dtype, int64_t stride, uintptr_t bias, int32_t bias_dtype, uintptr_t targets,
                 int64_t n, int64_t m, int64_t k, int32_t utility, int32_t order, double scale, uintptr_t rows,
                 int32_t out_dtype, int32_t threads) {
  const py::gil_scoped_release release;
  return shapleycam_utility_rows_cpu(pointer(logits), dtype, stride, pointer(bias), bias_dtype,
                                     static_cast<const int64_t*>(pointer(targets)), n, m, k, utility, order, scale,
                                     pointer(rows), out_dtype, threads);
}

int32_t rows_cuda(uintptr_t logits, int32_t dtype, int64_t stride, uintptr_t bias, int32_t bias_dtype, uintptr_t targets,
                  int64_t n, int64_t m, int64_t k, int32_t utility, int32_t order, double scale, uintptr_t rows,
                  int32_t out_dtype, uintptr_t stream) {
  const py::gil_scoped_release release;
  return shapleycam_utility_rows_cuda(pointer(logits), dtype, stride, pointer(bias), bias_dtype,
                                      static_cast<const int64_t*>(pointer(targets)), n, m, k, utility, order, scale,
                                      pointer(rows), out_dtype, pointer(stream));
}

using Rule = std::vector<double>;

int32_t integral_cpu(uintptr_t logits, int32_t dtype, int64_t stride, uintptr_t start, int32_t start_dtype,
                     int64_t start_stride, uintptr_t targets, int64_t n, int64_t m, int64_t k, int32_t utility,
                     const Rule& nodes, const Rule& weights, double scale, uintptr_t rows, int32_t out_dtype, int32_t threads) {
  if (nodes.size() != weights.size() || nodes.size() > SHAPLEYCAM_MOST_NODES) return SHAPLEYCAM_BAD_NODES;
  const py::gil_scoped_release release;
  return shapleycam_quadrature_rows_cpu(pointer(logits), dtype, stride, pointer(start), start_dtype, start_stride,
                                        static_cast<const int64_t*>(pointer(targets)), n, m, k, utility, nodes.data(),
                                        weights.data(), static_cast<int32_t>(nodes.size()), scale, pointer(rows), out_dtype,
                                        threads);
}

int32_t integral_cuda(uintptr_t logits, int32_t dtype, int64_t stride, uintptr_t start, int32_t start_dtype,
                      int64_t start_stride, uintptr_t targets, int64_t n, int64_t m, int64_t k, int32_t utility,
                      const Rule& nodes, const Rule& weights, double scale, uintptr_t rows, int32_t out_dtype,
                      uintptr_t stream) {
  if (nodes.size() != weights.size() || nodes.size() > SHAPLEYCAM_MOST_NODES) return SHAPLEYCAM_BAD_NODES;
  const py::gil_scoped_release release;
  return shapleycam_quadrature_rows_cuda(pointer(logits), dtype, stride, pointer(start), start_dtype, start_stride,
                                         static_cast<const int64_t*>(pointer(targets)), n, m, k, utility, nodes.data(),
                                         weights.data(), static_cast<int32_t>(nodes.size()), scale, pointer(rows), out_dtype,
                                         pointer(stream));
}

int32_t maps_cpu(const Described& a, uintptr_t alpha, int64_t n, int64_t c, int64_t m, const Extents& from, const Extents& to,
                 bool renormalize, uintptr_t raw, int32_t raw_dtype, uintptr_t maps, int32_t maps_dtype, uintptr_t workspace,
                 size_t size, int32_t threads) {
  const shapleycam_view va = view_of(a);
  const py::gil_scoped_release release;
  return shapleycam_class_maps_cpu(&va, pointer(alpha), n, c, m, from.data(), to.data(), renormalize, pointer(raw), raw_dtype,
                                   pointer(maps), maps_dtype, pointer(workspace), size, threads);
}

int32_t maps_cuda(const Described& a, uintptr_t alpha, int64_t n, int64_t c, int64_t m, const Extents& from, const Extents& to,
                  bool renormalize, uintptr_t raw, int32_t raw_dtype, uintptr_t maps, int32_t maps_dtype, uintptr_t workspace,
                  size_t size, uintptr_t stream) {
  const shapleycam_view va = view_of(a);
  const py::gil_scoped_release release;
  return shapleycam_class_maps_cuda(&va, pointer(alpha), n, c, m, from.data(), to.data(), renormalize, pointer(raw), raw_dtype,
                                    pointer(maps), maps_dtype, pointer(workspace), size, pointer(stream));
}

int32_t overlay_cpu(uintptr_t images, int32_t dtype, int64_t n, int64_t height, int64_t width,
                    const std::array<int64_t, 4>& strides, uintptr_t heatmaps, uintptr_t table, float alpha,
                    const std::optional<std::array<float, 3>>& mean, const std::optional<std::array<float, 3>>& std,
                    uintptr_t out, int32_t threads) {
  const py::gil_scoped_release release;
  return shapleycam_overlay_cpu(pointer(images), dtype, n, height, width, strides.data(),
                                static_cast<const float*>(pointer(heatmaps)), static_cast<const uint8_t*>(pointer(table)),
                                alpha, mean ? mean->data() : nullptr, std ? std->data() : nullptr,
                                static_cast<uint8_t*>(pointer(out)), threads);
}

int32_t display_cuda(uintptr_t raw, int32_t dtype, int64_t n, const Extents& from, const Extents& to, bool renormalize,
                     uintptr_t out, int32_t out_dtype, uintptr_t stream) {
  const py::gil_scoped_release release;
  return shapleycam_display_map_cuda(pointer(raw), dtype, n, from.data(), to.data(), renormalize, pointer(out), out_dtype,
                                     pointer(stream));
}

int32_t overlay_cuda(uintptr_t images, int32_t dtype, int64_t n, int64_t height, int64_t width,
                     const std::array<int64_t, 4>& strides, uintptr_t heatmaps, uintptr_t table, float alpha,
                     const std::optional<std::array<float, 3>>& mean, const std::optional<std::array<float, 3>>& std,
                     uintptr_t out, uintptr_t stream) {
  const py::gil_scoped_release release;
  return shapleycam_overlay_cuda(pointer(images), dtype, n, height, width, strides.data(),
                                 static_cast<const float*>(pointer(heatmaps)), static_cast<const uint8_t*>(pointer(table)),
                                 alpha, mean ? mean->data() : nullptr, std ? std->data() : nullptr,
                                 static_cast<uint8_t*>(pointer(out)), pointer(stream));
}

// The enums of the C ABI by the names that Python has for them.
using Codes = std::map<std::string, int32_t>;

const Codes& dtypes() {
  static const Codes codes = {{"float32", SHAPLEYCAM_FLOAT32},
                              {"float64", SHAPLEYCAM_FLOAT64},
                              {"float16", SHAPLEYCAM_FLOAT16},
                              {"bfloat16", SHAPLEYCAM_BFLOAT16},
                              {"uint8", SHAPLEYCAM_UINT8}};
  return codes;
}

const Codes& poolings() {
  static const Codes codes = {{"mean", SHAPLEYCAM_MEAN},
                              {"elementwise", SHAPLEYCAM_ELEMENTWISE},
                              {"elementwise_relu", SHAPLEYCAM_ELEMENTWISE_RELU},
                              {"activation", SHAPLEYCAM_ACTIVATION},
                              {"positive_gradient", SHAPLEYCAM_POSITIVE_GRADIENT},
                              {"plusplus", SHAPLEYCAM_PLUSPLUS}};
  return codes;
}

const Codes& utilities() {
  static const Codes codes = {{"logit", SHAPLEYCAM_LOGIT},
                              {"probability", SHAPLEYCAM_PROBABILITY},
                              {"log_probability", SHAPLEYCAM_LOG_PROBABILITY},
                              {"rest", SHAPLEYCAM_REST}};
  return codes;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  const std::vector<const char*> operators = {"weighted_reduce", "channel_weighted_sum", "utility_rows", "quadrature_rows",
                                              "class_maps",      "display_map",          "overlay"};
  module.attr("cpu_operators") = operators;
#if defined(SHAPLEYCAM_WITH_CUDA)
  module.attr("has_cuda") = true;
  module.attr("cuda_operators") = operators;
#else
  module.attr("has_cuda") = false;
  module.attr("cuda_operators") = std::vector<const char*>{};
#endif
  module.attr("dtypes") = dtypes();
  module.attr("poolings") = poolings();
  module.attr("utilities") = utilities();
  module.attr("most_nodes") = SHAPLEYCAM_MOST_NODES;
  module.def("status_text", &shapleycam_status_text);
  module.def("cpu_variant", &shapleycam_cpu_variant);
  module.def("weighted_reduce_workspace_cpu", &shapleycam_weighted_reduce_workspace_cpu);
  module.def("weighted_reduce_cpu", &reduce_cpu);
  module.def("channel_weighted_sum_workspace_cpu", &shapleycam_channel_weighted_sum_workspace_cpu);
  module.def("channel_weighted_sum_cpu", &sum_cpu);
  module.def("utility_rows_cpu", &rows_cpu);
  module.def("quadrature_rows_cpu", &integral_cpu);
  module.def("class_maps_cpu", &maps_cpu);
  module.def("display_map_cpu", &display_cpu);
  module.def("overlay_cpu", &overlay_cpu);
  module.def("weighted_reduce_workspace_cuda", &shapleycam_weighted_reduce_workspace_cuda);
  module.def("weighted_reduce_cuda", &reduce_cuda);
  module.def("channel_weighted_sum_workspace_cuda", &shapleycam_channel_weighted_sum_workspace_cuda);
  module.def("channel_weighted_sum_cuda", &sum_cuda);
  module.def("utility_rows_cuda", &rows_cuda);
  module.def("quadrature_rows_cuda", &integral_cuda);
  module.def("class_maps_cuda", &maps_cuda);
  module.def("display_map_cuda", &display_cuda);
  module.def("overlay_cuda", &overlay_cuda);
}
