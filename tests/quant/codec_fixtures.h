#pragma once
// A small model, plans by baseline name and Gaussian vectors, for tests of codecs.

#include <cmath>
#include <span>
#include <string_view>
#include <vector>

#include "quant/baselines.h"
#include "quant/codec.h"
#include "quant/packing.h"
#include "quant/random.h"

namespace kvplan::quant::testing {

inline ModelSpec small_model(int kv_heads = 3, int head_dim = 64) {
  ModelSpec model;
  model.architecture = "llama";
  model.num_layers = 2;
  model.query_heads = 3 * kv_heads;
  model.kv_heads = kv_heads;
  model.head_dim = head_dim;
  model.rotary_dim = head_dim;
  model.container = "gguf";
  model.kv_weights_sha256 = std::string(64, 'a');
  return model;
}

inline PlanBundle baseline(std::string_view name, const ModelSpec& model = small_model(),
                           const Profile* profile = nullptr, std::uint64_t seed = 11) {
  std::vector<double> inv_freq;
  for (int j = 0; j < model.rotary_dim / 2; ++j)
    inv_freq.push_back(std::pow(10000.0, -2.0 * j / model.rotary_dim));
  return baseline_plan(name, model, 4, 4096, seed, inv_freq, profile);
}

/// N(0,1), each value exact in fp16.
inline std::vector<float> gaussian(const KvShape& shape, std::uint32_t draw = 0) {
  RandomStream random(5, StreamPurpose::kTest, draw);
  std::vector<float> x(static_cast<std::size_t>(shape.elements()));
  for (float& value : x) value = round_to_half(static_cast<float>(random.next_normal()));
  return x;
}

inline std::vector<float> round_trip(const Codec& codec, const KvShape& shape,
                                     std::span<const float> x, std::int64_t first_position = 4) {
  std::vector<float> x_hat(x.size());
  quant::round_trip(codec, shape, first_position, x, x_hat);
  return x_hat;
}

inline std::vector<std::byte> encoded(const Codec& codec, const KvShape& shape,
                                      std::span<const float> x) {
  std::vector<std::byte> codes(codec.packed_bytes(shape));
  codec.encode(shape, 4, x, codes);
  return codes;
}

inline double relative_error(std::span<const float> x, std::span<const float> x_hat) {
  double error = 0, energy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    error += (double{x[i]} - x_hat[i]) * (double{x[i]} - x_hat[i]);
    energy += double{x[i]} * x[i];
  }
  return error / energy;
}

/// <x, x_hat> / <x, x>: 1 for an unbiased codec.
inline double slope(std::span<const float> x, std::span<const float> x_hat) {
  double product = 0, energy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    product += double{x[i]} * x_hat[i];
    energy += double{x[i]} * x[i];
  }
  return product / energy;
}

/// A name as part of a test's name.
inline std::string test_name(std::string name) {
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
}

}  // namespace kvplan::quant::testing
