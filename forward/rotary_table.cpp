#include "forward/rotary_table.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

namespace kvplan::forward {

at::Tensor RotaryTable::rotate(const at::Tensor& x, int layer, std::int64_t first, bool inverse,
                               std::int64_t sequence) {
  const std::int64_t rotary_dim = config_.rotary_dim, half = rotary_dim / 2;
  if (half == 0) return x;
  const auto [cos, sin_forward] = rows(layer, first, x.size(-2), sequence);
  const at::Tensor sin = inverse ? -sin_forward : sin_forward;
  const at::Tensor a = x.narrow(-1, 0, half), b = x.narrow(-1, half, half);
  std::vector<at::Tensor> parts = {a * cos - b * sin, b * cos + a * sin};
  if (rotary_dim < config_.head_dim)
    parts.push_back(x.narrow(-1, rotary_dim, config_.head_dim - rotary_dim));
  return at::cat(parts, -1);
}

at::Tensor RotaryTable::scale(const at::Tensor& x, int layer) const {
  const double factor = models::rotary_attention_factor(config_.layer_rope(layer));
  const std::int64_t rotary_dim = config_.rotary_dim;
  if (factor == 1 || rotary_dim == 0) return x;
  if (rotary_dim == config_.head_dim) return x * factor;
  return at::cat({x.narrow(-1, 0, rotary_dim) * factor,
                  x.narrow(-1, rotary_dim, config_.head_dim - rotary_dim)},
                 -1);
}

std::pair<at::Tensor, at::Tensor> RotaryTable::rows(int layer, std::int64_t first,
                                                    std::int64_t count, std::int64_t sequence) {
  std::vector<double> inv_freq =
      models::rotary_frequencies(config_, layer, sequence > 0 ? sequence : first + count);
  const std::lock_guard lock(mutex_);
  Angles& angles = angles_[config_.window(layer) > 0 ? 1 : 0];
  if (angles.inv_freq != inv_freq) angles = {std::move(inv_freq), 0, {}, {}};
  if (angles.positions < first + count) grow(angles, std::max(first + count, 2 * angles.positions));
  return {angles.cos.narrow(0, first, count), angles.sin.narrow(0, first, count)};
}

void RotaryTable::grow(Angles& angles, std::int64_t positions) const {
  const auto half = static_cast<std::int64_t>(angles.inv_freq.size());
  const at::Tensor cosines = at::empty({positions, half}, at::kFloat),
                   sines = at::empty({positions, half}, at::kFloat);
  float* cos = cosines.data_ptr<float>();
  float* sin = sines.data_ptr<float>();
  for (std::int64_t t = 0; t < positions; ++t)
    for (const double frequency : angles.inv_freq) {
      const double angle = static_cast<double>(t) * frequency;
      *cos++ = static_cast<float>(std::cos(angle));
      *sin++ = static_cast<float>(std::sin(angle));
    }
  angles.cos = cosines.to(device_);
  angles.sin = sines.to(device_);
  angles.positions = positions;
}

}  // namespace kvplan::forward
