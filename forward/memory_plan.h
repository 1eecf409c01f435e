#pragma once
// How work on a model is cut so that it stays below a limit of memory.

#include <cstdint>
#include <string>

#include "forward/device.h"
#include "models/model.h"

namespace kvplan::forward {

/// Bytes of a model's weights in memory: all of them, or the most that is there at a time when
/// layers are streamed (Residency::kStream).
struct WeightBytes {
  std::int64_t all = 0, streamed = 0;
};
WeightBytes weight_bytes(const models::ModelReader& model, WeightType matrices);

/// What a pass over windows holds beside weights. A unit is what goes through a layer at once.
struct Workload {
  std::int64_t units = 1;
  std::int64_t fixed_bytes = 0;     // however many units go together
  std::int64_t unit_bytes = 0;      // of each of them, always in memory
  std::int64_t boundary_bytes = 0;  // of each: activations between layers, which may be spilled
};

/// How it is done.
struct MemoryPlan {
  bool stream = false;            // layers are read when they are used
  std::int64_t units = 1;         // go through a layer before the next is read
  std::int64_t memory_bytes = 0;  // for boundaries; more is spilled
};

/// `limit` 0: none. With all weights in memory if they fit, one unit at a time. MemoryError says
/// what the smallest limit is.
MemoryPlan plan_memory(std::int64_t limit, const WeightBytes& weights, const Workload& work);

/// What `tokens` tokens need while one layer works on them: forward alone, or with the graph and
/// the gradients of a backward pass.
std::int64_t layer_bytes(const models::ModelConfig& config, std::int64_t tokens, bool gradients);

/// Of the process itself: LibTorch, its threads, tokenizer.
inline constexpr std::int64_t kProcessBytes = std::int64_t{192} << 20;

}  // namespace kvplan::forward
