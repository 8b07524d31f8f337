// From activations, gradient and Hessian-vector product to a picture, in a program without Python or PyTorch.
//
// A real program takes them from its inference engine; here they are made up: channel 0 fires on a disc, and it is the one that
// the class depends on. The map is computed once more with plain loops, and the program fails if the two differ.
//
// Usage: explain [picture.ppm]
#include <shapleycam.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void must(const char* what, int32_t status) {
  if (status == SHAPLEYCAM_OK) return;
  std::fprintf(stderr, "%s: %s\n", what, shapleycam_status_text(status));
  std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  constexpr int64_t n = 2, c = 64, h = 14, w = 14, s = h * w, size = 224;
  std::vector<float> a(n * c * s), g(n * c * s), ha(n * c * s);
  for (int64_t i = 0; i < n * c * s; ++i) {
    const int64_t channel = i / s % c;
    const double y = double(i % s / w) - 5, x = double(i % w) - 8;
    a[i] = channel == 0 ? float(std::exp(-(x * x + y * y) / 9)) : 0.05f * float(i * 7919 % 11) / 11;
    g[i] = channel == 0 ? 1.0f : 0.01f * float(i % 5 - 2);
    ha[i] = 0.2f * g[i] * a[i];
  }

  // 1. The signed map: sum_c mean_s(g - ha / 2) A.
  const shapleycam_view va = {a.data(), SHAPLEYCAM_FLOAT32, c * s, s, 1};
  const shapleycam_view vg = {g.data(), SHAPLEYCAM_FLOAT32, c * s, s, 1};
  const shapleycam_view vh = {ha.data(), SHAPLEYCAM_FLOAT32, c * s, s, 1};
  std::vector<float> raw(n * s);
  const size_t room = shapleycam_weighted_reduce_workspace_cpu(n, c, s, SHAPLEYCAM_MEAN);
  std::vector<double> workspace(room / sizeof(double) + 2);  // new aligns it to 16 bytes
  must("weighted_reduce", shapleycam_weighted_reduce_cpu(&va, &vg, &vh, n, c, s, SHAPLEYCAM_MEAN, raw.data(),
                                                         SHAPLEYCAM_FLOAT32, workspace.data(), room, 2));
  for (int64_t image = 0; image < n; ++image) {
    for (int64_t at = 0; at < s; ++at) {
      double expected = 0;
      for (int64_t k = 0; k < c; ++k) {
        const int64_t base = (image * c + k) * s;
        double weight = 0;
        for (int64_t i = 0; i < s; ++i) weight += g[base + i] - 0.5 * ha[base + i];
        expected += weight / double(s) * a[base + at];
      }
      if (!(std::fabs(expected - raw[image * s + at]) < 1e-5)) {
        std::fprintf(stderr, "map %lld, position %lld: %g, expected %g\n", (long long)image, (long long)at,
                     double(raw[image * s + at]), expected);
        return 1;
      }
    }
  }

  // 2. The display form, at the size of the image.
  std::vector<float> heat(n * size * size);
  const int64_t from[3] = {1, h, w}, to[3] = {1, size, size};
  must("display_map",
       shapleycam_display_map_cpu(raw.data(), SHAPLEYCAM_FLOAT32, n, from, to, 1, heat.data(), SHAPLEYCAM_FLOAT32, 2));

  // 3. In colour over a grey image. The table: black to red to yellow to white.
  std::vector<uint8_t> table(256 * 3), image(n * 3 * size * size, 128), picture(n * size * size * 3);
  for (int i = 0; i < 256; ++i) {
    for (int k = 0; k < 3; ++k) {
      const int value = 3 * i - 255 * k;
      table[3 * i + k] = uint8_t(value < 0 ? 0 : value > 255 ? 255 : value);
    }
  }
  const int64_t strides[4] = {3 * size * size, size * size, size, 1};
  must("overlay", shapleycam_overlay_cpu(image.data(), SHAPLEYCAM_UINT8, n, size, size, strides, heat.data(), table.data(),
                                         0.6f, nullptr, nullptr, picture.data(), 2));
  if (heat[(5 * 16 + 8) * size + 8 * 16 + 8] < 0.9f || heat[size * size - 1] > 0.2f) {
    std::fprintf(stderr, "the map does not lie on the disc\n");
    return 1;
  }
  if (count > 1) {
    std::FILE* file = std::fopen(arguments[1], "wb");
    if (file == nullptr) {
      std::perror(arguments[1]);
      return 1;
    }
    std::fprintf(file, "P6 %d %d 255\n", int(size), int(size));
    const bool written = std::fwrite(picture.data(), 1, 3 * size * size, file) == 3 * size * size;
    if (std::fclose(file) != 0 || !written) {
      std::perror(arguments[1]);
      return 1;
    }
  }
  std::printf("ok: %lld maps of 14x14, drawn at 224x224, on %s\n", (long long)n, shapleycam_cpu_variant());
  return 0;
}
