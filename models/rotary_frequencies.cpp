// Rotary frequencies under every scaling that is supported. Source of all formulas: Hugging Face
// transformers, modeling_rope_utils.py, functions _compute_*_parameters.

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "models/model.h"
#include "schemas/error.h"

namespace kvplan::models {
namespace {

double plain_frequency(double base, std::size_t pair, int rotary_dim) {
  return 1 / std::pow(base, 2 * static_cast<double>(pair) / rotary_dim);
}

/// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between.
double llama3_frequency(double frequency, const RopeScaling& s) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const auto context = static_cast<double>(s.original_context);
  if (wavelength < context / s.high_freq_factor) return frequency;
  if (wavelength > context / s.low_freq_factor) return frequency / s.factor;
  const double smooth =
      (context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1 - smooth) * frequency / s.factor + smooth * frequency;
}

/// NTK by parts: the pairs between which YaRN blends kept frequencies into divided ones.
std::pair<double, double> yarn_range(const RopeSpec& rope, int rotary_dim) {
  const RopeScaling& s = *rope.scaling;
  const auto pair_of = [&](double rotations) {
    return rotary_dim *
           std::log(static_cast<double>(s.original_context) / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(rope.base));
  };
  double low = pair_of(s.beta_fast), high = pair_of(s.beta_slow);
  if (s.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, rotary_dim - 1.0);
  return {low, high == low ? high + 0.001 : high};
}

double yarn_frequency(double frequency, std::size_t pair, std::pair<double, double> range,
                      double factor) {
  const double divided = std::clamp(
      (static_cast<double>(pair) - range.first) / (range.second - range.first), 0.0, 1.0);
  return frequency / factor * divided + frequency * (1 - divided);
}

/// The base that "dynamic" scaling takes for a sequence longer than the original context.
double dynamic_base(const RopeSpec& rope, int rotary_dim, std::int64_t sequence) {
  const RopeScaling& s = *rope.scaling;
  const double ratio = static_cast<double>(std::max(sequence, s.original_context)) /
                       static_cast<double>(s.original_context);
  return rope.base * std::pow(s.factor * ratio - (s.factor - 1),
                              rotary_dim / static_cast<double>(rotary_dim - 2));
}

std::vector<double> frequencies_of(const RopeSpec& rope, int rotary_dim, std::int64_t sequence) {
  const auto& scaling = rope.scaling;
  const std::string type = scaling ? scaling->type : "default";
  std::vector<double> frequencies(static_cast<std::size_t>(rotary_dim / 2));
  const double base = type == "dynamic" ? dynamic_base(rope, rotary_dim, sequence) : rope.base;
  for (std::size_t j = 0; j < frequencies.size(); ++j)
    frequencies[j] = plain_frequency(base, j, rotary_dim);
  if (type == "default" || type == "dynamic") return frequencies;

  const auto range = type == "yarn" ? yarn_range(rope, rotary_dim) : std::pair<double, double>();
  for (std::size_t j = 0; j < frequencies.size(); ++j) {
    double& frequency = frequencies[j];
    if (type == "linear") {
      frequency /= scaling->factor;
    } else if (type == "llama3") {
      frequency = llama3_frequency(frequency, *scaling);
    } else if (type == "yarn") {
      frequency = yarn_frequency(frequency, j, range, scaling->factor);
    } else if (type == "longrope") {
      const bool longer = sequence > scaling->original_context;
      frequency /= (longer ? scaling->long_factors : scaling->short_factors).at(j);
    } else {
      throw InternalError("unknown rotary scaling " + type);
    }
  }
  return frequencies;
}

}  // namespace

std::vector<double> rotary_frequencies(const ModelConfig& config, int layer,
                                       std::int64_t sequence) {
  return frequencies_of(config.layer_rope(layer), config.rotary_dim, sequence);
}

double rotary_attention_factor(const RopeSpec& rope) {
  return rope.scaling ? rope.scaling->attention_factor : 1;
}

}  // namespace kvplan::models
