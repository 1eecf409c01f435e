#include "studies/vectors.h"

#include <cmath>
#include <sstream>
#include <vector>

#include "quant/baselines.h"

namespace kvplan::studies {

quant::RandomStream study_stream(const StudyContext& context, std::string_view id,
                                 std::uint32_t draw, std::uint32_t part) {
  std::uint32_t key = 0;
  for (const char letter : id) key = key << 8 | static_cast<std::uint8_t>(letter);
  return {context.seed, quant::StreamPurpose::kStudy, key, draw, part};
}

Array<float> gaussian_vectors(std::int64_t n, int d, quant::RandomStream& random) {
  Array<float> x({n, d});
  for (float& value : x.data) value = static_cast<float>(random.next_normal());
  return x;
}

Array<float> unit_vectors(std::int64_t n, int d, quant::RandomStream& random) {
  Array<float> x = gaussian_vectors(n, d, random);
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
    const auto row = x.row(i);
    const double norm = std::sqrt(squared_norm(row));
    for (float& value : row) value = static_cast<float>(value / norm);
  }
  return x;
}

Array<float> student_t_vectors(std::int64_t n, int d, int degrees, quant::RandomStream& random) {
  Array<float> x({n, d});
  for (float& value : x.data) {
    const double normal = random.next_normal();
    double chi_square = 0;
    for (int i = 0; i < degrees; ++i) chi_square += square(random.next_normal());
    value = static_cast<float>(normal / std::sqrt(chi_square / degrees));
  }
  return x;
}

void scale_channels(Array<float>& x, int channels, float factor) {
  for (std::size_t i = 0; i < static_cast<std::size_t>(x.shape[0]); ++i)
    for (float& value : x.row(i).first(static_cast<std::size_t>(channels))) value *= factor;
}

double dot(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

double squared_norm(std::span<const float> x) { return dot(x, x); }

double squared_distance(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += square(double{a[i]} - double{b[i]});
  return sum;
}

double relative_error(const Array<float>& x, const Array<float>& x_hat) {
  double sum = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(x.shape[0]); ++i)
    sum += squared_distance(x.row(i), x_hat.row(i)) / squared_norm(x.row(i));
  return sum / static_cast<double>(x.shape[0]);
}

ModelSpec one_head_model(int head_dim) {
  ModelSpec model;
  model.architecture = "llama";
  model.num_layers = model.query_heads = model.kv_heads = 1;
  model.head_dim = head_dim;
  model.rope.style = "none";
  return model;
}

std::unique_ptr<quant::Codec> baseline_codec(const std::string& name, int head_dim,
                                             std::uint64_t seed, Side side) {
  constexpr int kSinks = 0;
  constexpr std::int64_t kContext = 4096;
  return quant::make_codec(
      quant::baseline_plan(name, one_head_model(head_dim), kSinks, kContext, seed, {}), 0, side);
}

Array<float> stored(const quant::Codec& codec, const Array<float>& x) {
  Array<float> x_hat(x.shape);
  quant::round_trip(codec, {x.shape[0], 1, static_cast<int>(x.shape[1])}, 0, x.data, x_hat.data);
  return x_hat;
}

double baseline_error(const std::string& name, const Array<float>& x, std::uint64_t seed) {
  return relative_error(x, stored(*baseline_codec(name, static_cast<int>(x.shape[1]), seed), x));
}

std::string figure(double value, int digits) {
  std::ostringstream text;
  text.precision(digits);
  text << value;
  return text.str();
}

std::string at_width(const std::string& what, int bits) {
  return what + " at " + std::to_string(bits) + (bits == 1 ? " bit" : " bits");
}

}  // namespace kvplan::studies
