#pragma once
// Greedy continuation of a text on a cache stored as a plan says.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "forward/cache_runtime.h"
#include "forward/device.h"
#include "models/model.h"
#include "schemas/plan.h"
#include "schemas/run_control.h"

namespace kvplan::generation {

struct GenerateOptions {
  std::int64_t max_tokens = 128;
  std::vector<std::int32_t> stop_tokens;  // each ends the text
  int threads = 0;
  forward::WeightType weights = forward::WeightType::kFloat32;
  forward::Device device = forward::Device::kCpu;
  const PlanBundle* plan = nullptr;  // null: fp16 in LibTorch
  forward::CacheRuntime runtime;     // of the plan's pages
};

struct Generation {
  std::vector<std::int32_t> tokens;  // without the stop token
  bool stopped = false;              // by a stop token
  std::int64_t cached_tokens = 0;    // the prompt and what was fed back
  std::int64_t cache_bytes = 0;      // of these tokens: full pages packed, the others fp16
  std::int64_t fp16_bytes = 0;       // of these tokens
  double effective_bits = 16;        // of these tokens
  double prefill_seconds = 0;        // until the first token
  double decode_seconds = 0;         // from the first to the last
  std::int64_t decode_steps = 0;     // forward passes of one token
};

/// `on_token` is called with each token of the result as it is found. ArgumentError: an empty
/// prompt, ids outside the vocabulary, a plan for another geometry, more tokens than the model's
/// context. InterruptedError when control.stopping(). InputError for a plan that pages cannot hold.
Generation generate(const models::ModelReader& model, std::span<const std::int32_t> prompt,
                    const GenerateOptions& options,
                    const std::function<void(std::int32_t)>& on_token, const RunControl& control);

}  // namespace kvplan::generation
