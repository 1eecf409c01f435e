#pragma once
// Seeded random tensors.

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "quant/random.h"
#include "schemas/types.h"

namespace kvplan::forward {

/// Independent N(0,1), float32; another `stream`, other numbers.
inline at::Tensor normal(std::vector<std::int64_t> shape, std::uint32_t stream) {
  quant::RandomStream draws(5, quant::StreamPurpose::kTest, stream);
  Array<float> values(std::move(shape));
  for (float& x : values.data) x = static_cast<float>(draws.next_normal());
  return at::from_blob(values.data.data(), values.shape, at::kFloat).clone();
}

}  // namespace kvplan::forward
