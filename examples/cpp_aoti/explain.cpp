// explain ARTEFACT.pt2 PHOTO.ppm HEATMAP.pgm [CLASS]
//
// Predicts and explains a photograph with an artefact that was made by
//   shapleycam export ARTEFACT.pt2 --format aoti --resize --targets given
// It prints the explained class and its probability, and writes its map as a grey picture. CLASS is -1, or left out, for the
// predicted class.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

namespace {

// A binary PPM of 8 bits as uint8 [1, height, width, 3].
at::Tensor read_photograph(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  std::int64_t width = 0, height = 0, most = 0;
  if (!(file >> magic >> width >> height >> most) || magic != "P6" || most != 255 || width < 1 || height < 1)
    throw std::runtime_error(path + " is no binary PPM (P6) of 8 bits.");
  file.get();
  at::Tensor pixels = at::empty({1, height, width, 3}, at::kByte);
  if (!file.read(reinterpret_cast<char*>(pixels.data_ptr()), pixels.numel())) throw std::runtime_error(path + " is cut short.");
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

void write_map(const std::string& path, const at::Tensor& map) {
  const at::Tensor grey = (map * 255).round().to(at::kByte).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P5\n" << map.size(1) << ' ' << map.size(0) << "\n255\n";
  file.write(reinterpret_cast<const char*>(grey.data_ptr()), grey.numel());
  if (!file) throw std::runtime_error(path + " cannot be written.");
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: explain ARTEFACT.pt2 PHOTO.ppm HEATMAP.pgm [CLASS]");
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader artefact(argv[1]);
  const std::int64_t asked = argc > 4 ? read_class(argv[4]) : -1;  // -1: the predicted class
  const at::Tensor target = at::full({1}, asked, at::kLong);
  const auto outputs = artefact.run({read_photograph(argv[2]), target});
  const at::Tensor logits = outputs.at(0), map = outputs.at(1);
  const std::int64_t chosen = asked == -1 ? logits.argmax(1).item<std::int64_t>() : asked;
  if (map.isnan().any().item<bool>()) throw std::runtime_error("The map is not a number: is there such a class?");
  write_map(argv[3], map[0]);
  std::cout << "class " << chosen << ", probability " << logits.softmax(1)[0][chosen].item<double>() << '\n';
  return 0;
} catch (const std::exception& error) {
  std::cerr << "explain: " << error.what() << '\n';
  return 2;
}
