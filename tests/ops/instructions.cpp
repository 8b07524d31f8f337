// Calls one operator of the C library on one thread, so that valgrind can count its instructions: instructions NAME CALLS.
// bench/guard.py runs it with two numbers of calls and takes the difference.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "shapleycam.h"

namespace {

constexpr int64_t kChannels = 2048, kPositions = 49, kClasses = 1000;

// Values of both signs, the same on every machine.
template <typename T>
std::vector<T> values(size_t count) {
  std::vector<T> found(count);
  uint32_t state = 12345;
  for (T& value : found) {
    state = state * 1664525u + 1013904223u;
    value = T(int32_t(state >> 8) - (1 << 23)) / T(1 << 22);
  }
  return found;
}

struct Inputs {
  std::vector<float> a = values<float>(kChannels * kPositions), g = values<float>(kChannels * kPositions),
                     h = values<float>(kChannels * kPositions), logits = values<float>(kClasses), out;
  std::vector<uint16_t> half = std::vector<uint16_t>(kChannels * kPositions, 0x3f80);  // ones in bfloat16
  std::vector<unsigned char> space = std::vector<unsigned char>(1 << 22), pixels = std::vector<unsigned char>(3 * 224 * 224);
  Inputs() : out(3 * 224 * 224) {}
};

shapleycam_view view(const void* data, int32_t dtype, bool last) {
  return {data, dtype, kChannels * kPositions, last ? 1 : kPositions, last ? kChannels : 1};
}

int32_t reduce(Inputs& in, int32_t pooling, bool last, bool half) {
  const int32_t dtype = half ? SHAPLEYCAM_BFLOAT16 : SHAPLEYCAM_FLOAT32;
  auto pick = [&](const std::vector<float>& wide) { return half ? static_cast<const void*>(in.half.data()) : wide.data(); };
  const shapleycam_view a = view(pick(in.a), dtype, last), g = view(pick(in.g), dtype, last), h = view(pick(in.h), dtype, last);
  return shapleycam_weighted_reduce_cpu(&a, &g, &h, 1, kChannels, kPositions, pooling, in.out.data(), SHAPLEYCAM_FLOAT32,
                                        in.space.data(), in.space.size(), 1);
}

int32_t call(const char* name, Inputs& in) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const int64_t target = 3, from[] = {1, 7, 7}, to[] = {1, 224, 224}, strides[] = {3 * 224 * 224, 224 * 224, 224, 1};
  const double nodes[] = {0.0694, 0.33, 0.67, 0.9306}, weights[] = {0.1739, 0.3261, 0.3261, 0.1739};
  if (is("mean first")) return reduce(in, SHAPLEYCAM_MEAN, false, false);
  if (is("mean last")) return reduce(in, SHAPLEYCAM_MEAN, true, false);
  if (is("elementwise first")) return reduce(in, SHAPLEYCAM_ELEMENTWISE, false, false);
  if (is("elementwise last bfloat16")) return reduce(in, SHAPLEYCAM_ELEMENTWISE, true, true);
  if (is("plusplus first")) return reduce(in, SHAPLEYCAM_PLUSPLUS, false, false);
  if (is("plusplus last")) return reduce(in, SHAPLEYCAM_PLUSPLUS, true, false);
  if (is("channel_weighted_sum")) {
    const shapleycam_view a = view(in.a.data(), SHAPLEYCAM_FLOAT32, false);
    return shapleycam_channel_weighted_sum_cpu(&a, in.g.data(), 1, kChannels, kPositions, 1, in.out.data(), SHAPLEYCAM_FLOAT32,
                                               in.space.data(), in.space.size(), 1);
  }
  if (is("display_map"))
    return shapleycam_display_map_cpu(in.a.data(), SHAPLEYCAM_FLOAT32, 1, from, to, 1, in.out.data(), SHAPLEYCAM_FLOAT32, 1);
  if (is("overlay"))
    return shapleycam_overlay_cpu(in.pixels.data(), SHAPLEYCAM_UINT8, 1, 224, 224, strides, in.out.data(), in.space.data(),
                                  0.5f, nullptr, nullptr, in.space.data() + 1024, 1);
  if (is("utility_rows"))
    return shapleycam_utility_rows_cpu(in.logits.data(), SHAPLEYCAM_FLOAT32, kClasses, in.logits.data(), SHAPLEYCAM_FLOAT32,
                                       &target, 1, 1, kClasses, SHAPLEYCAM_REST, 2, 1.0, in.out.data(), SHAPLEYCAM_FLOAT32, 1);
  if (is("quadrature_rows 4"))
    return shapleycam_quadrature_rows_cpu(in.logits.data(), SHAPLEYCAM_FLOAT32, kClasses, nullptr, SHAPLEYCAM_FLOAT32, 0,
                                          &target, 1, 1, kClasses, SHAPLEYCAM_REST, nodes, weights, 4, 1.0, in.out.data(),
                                          SHAPLEYCAM_FLOAT32, 1);
  std::fprintf(stderr, "unknown operator: %s\n", name);
  std::exit(2);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: instructions NAME CALLS\n");
    return 2;
  }
  Inputs inputs;
  for (int k = std::atoi(arguments[2]); k > 0; --k) {
    const int32_t status = call(arguments[1], inputs);
    if (status != SHAPLEYCAM_OK) {
      std::fprintf(stderr, "%s: %s\n", arguments[1], shapleycam_status_text(status));
      return 1;
    }
  }
  return 0;
}
