// explain ARTEFACT.onnx PHOTO.ppm HEATMAP.pgm [CLASS]
//
// Predicts and explains a photograph with an artefact that was made by
//   shapleycam export ARTEFACT.onnx --resize --targets given
// It prints the explained class and its probability, and writes its map as a grey picture. CLASS is -1, or left out, for the
// predicted class.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <openvino/openvino.hpp>
#include <span>
#include <stdexcept>
#include <string>

namespace {

// A binary PPM of 8 bits as uint8 [1, height, width, 3].
ov::Tensor read_photograph(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  std::int64_t width = 0, height = 0, most = 0;
  if (!(file >> magic >> width >> height >> most) || magic != "P6" || most != 255 || width < 1 || height < 1)
    throw std::runtime_error(path + " is no binary PPM (P6) of 8 bits.");
  file.get();
  ov::Tensor pixels(ov::element::u8, {1, static_cast<std::size_t>(height), static_cast<std::size_t>(width), 3});
  if (!file.read(reinterpret_cast<char*>(pixels.data<std::uint8_t>()), static_cast<std::streamsize>(pixels.get_byte_size())))
    throw std::runtime_error(path + " is cut short.");
  return pixels;
}

std::int64_t read_class(const std::string& text) {
  std::size_t end = 0;
  std::int64_t index = 0;
  try {
    index = std::stoll(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (text.empty() || end != text.size()) throw std::runtime_error("CLASS must be a whole number, got '" + text + "'.");
  return index;
}

void write_map(const std::string& path, const ov::Tensor& map) {
  const auto values = std::span(map.data<const float>(), map.get_size());
  std::string grey;
  for (const float value : values) grey.push_back(static_cast<char>(std::lround(value * 255)));
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << map.get_shape()[2] << ' ' << map.get_shape()[1] << "\n255\n" << grey;
  if (!file.flush()) throw std::runtime_error(path + " cannot be written.");
}

double probability_of(std::span<const float> logits, std::int64_t index) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return std::exp(logits[static_cast<std::size_t>(index)] - largest) / sum;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: explain ARTEFACT.onnx PHOTO.ppm HEATMAP.pgm [CLASS]");
  ov::Core core;
  // Where a processor has bfloat16 OpenVINO computes in it unless it is told not to.
  ov::CompiledModel artefact = core.compile_model(argv[1], "CPU", ov::hint::inference_precision(ov::element::f32));
  const std::int64_t asked = argc > 4 ? read_class(argv[4]) : -1;  // -1: the predicted class
  ov::Tensor target(ov::element::i64, {1});
  *target.data<std::int64_t>() = asked;
  ov::InferRequest request = artefact.create_infer_request();
  request.set_tensor("image", read_photograph(argv[2]));
  request.set_tensor("target", target);
  request.infer();
  const ov::Tensor prediction = request.get_tensor("prediction"), map = request.get_tensor("saliency_map");
  const auto logits = std::span(prediction.data<const float>(), prediction.get_size());
  const std::int64_t chosen = asked == -1 ? std::max_element(logits.begin(), logits.end()) - logits.begin() : asked;
  const auto values = std::span(map.data<const float>(), map.get_size());
  if (std::any_of(values.begin(), values.end(), [](float value) { return std::isnan(value); }))
    throw std::runtime_error("The map is not a number: is there such a class?");
  write_map(argv[3], map);
  std::cout << "class " << chosen << ", probability " << probability_of(logits, chosen) << '\n';
  return 0;
} catch (const std::exception& error) {
  std::cerr << "explain: " << error.what() << '\n';
  return 2;
}
