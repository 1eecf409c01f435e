#include "quant/rotary_mean.h"

#include <string>

#include "quant/portable_math.h"
#include "schemas/error.h"

namespace kvplan::quant {

RotaryMean::RotaryMean(std::span<const float> means, int head_dim)
    : head_dim_(head_dim), means_(means.begin(), means.end()) {}

RotaryMean::RotaryMean(std::span<const float> means, int head_dim, const RopeSpec& rope,
                       int rotary_dim, std::span<const double> inv_freq)
    : RotaryMean(means, head_dim) {
  if (rope.style == "none") return;
  const int pairs = static_cast<int>(inv_freq.size());
  if (rope.style != "half" && rope.style != "interleaved")
    throw InputError("plan.json", "/model/rope/style",
                     "expected half, interleaved or none, found " + rope.style);
  if (2 * pairs != rotary_dim || rotary_dim > head_dim)
    throw InputError("plan.safetensors", "inv_freq",
                     "expected " + std::to_string(rotary_dim / 2) +
                         " frequencies (half of rotary_dim, which is at most head_dim " +
                         std::to_string(head_dim) + "), found " + std::to_string(pairs));
  pair_stride_ = rope.style == "half" ? 1 : 2;
  pair_distance_ = rope.style == "half" ? pairs : 1;
  inv_freq_.assign(inv_freq.begin(), inv_freq.end());
  for (std::int64_t t = 0; t < kStep; ++t)
    for (const double frequency : inv_freq_) {
      fine_cos_.push_back(portable_cos(static_cast<double>(t) * frequency));
      fine_sin_.push_back(portable_sin(static_cast<double>(t) * frequency));
    }
}

void RotaryMean::fill(std::int64_t first_position, std::int64_t tokens,
                      std::span<float> out) const {
  const std::size_t pairs = inv_freq_.size(), row = means_.size();
  const auto d = static_cast<std::size_t>(head_dim_);
  const auto stride = static_cast<std::size_t>(pair_stride_);
  const auto distance = static_cast<std::size_t>(pair_distance_);
  std::vector<double> coarse_cos(pairs), coarse_sin(pairs), cosine(pairs), sine(pairs);
  std::int64_t coarse = -1;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t position = first_position + t;
    if (position / kStep != coarse) {
      coarse = position / kStep;
      for (std::size_t j = 0; j < pairs; ++j) {
        const double angle = static_cast<double>(coarse * kStep) * inv_freq_[j];
        coarse_cos[j] = portable_cos(angle);
        coarse_sin[j] = portable_sin(angle);
      }
    }
    const std::size_t fine = static_cast<std::size_t>(position % kStep) * pairs;
    for (std::size_t j = 0; j < pairs; ++j) {
      const double c = fine_cos_[fine + j], s = fine_sin_[fine + j];
      cosine[j] = coarse_cos[j] * c - coarse_sin[j] * s;
      sine[j] = coarse_sin[j] * c + coarse_cos[j] * s;
    }
    float* const token = out.data() + static_cast<std::size_t>(t) * row;
    for (std::size_t base = 0; base < row; base += d) {
      for (std::size_t j = 0; j < pairs; ++j) {
        const std::size_t a = base + j * stride, b = a + distance;
        token[a] = static_cast<float>(means_[a] * cosine[j] - means_[b] * sine[j]);
        token[b] = static_cast<float>(means_[b] * cosine[j] + means_[a] * sine[j]);
      }
      for (std::size_t i = base + 2 * pairs; i < base + d; ++i)
        token[i] = static_cast<float>(means_[i]);
    }
  }
}

}  // namespace kvplan::quant
