#include "forward/memory_plan.h"

#include <algorithm>
#include <limits>
#include <map>

#include "forward/token_chunks.h"
#include "models/families.h"
#include "schemas/error.h"

namespace kvplan::forward {
namespace {

/// A layer is read once for at least so many units where memory allows, so that reading does not
/// outweigh the work on them.
constexpr std::int64_t kUnitsPerRead = 8;

constexpr std::int64_t kMebibyte = std::int64_t{1} << 20;

std::string mebibytes(std::int64_t bytes) {
  return std::to_string((bytes + kMebibyte - 1) / kMebibyte) + "MiB";
}

}  // namespace

WeightBytes weight_bytes(const models::ModelReader& model, WeightType matrices) {
  std::map<int, std::int64_t> layers;
  std::int64_t vocabulary = 0, vocabulary_all = 0, other = 0, largest_matrix = 0;
  for (const auto& [name, shape] : models::expected_tensors(model.config())) {
    std::int64_t elements = 1;
    for (const std::int64_t n : shape) elements *= n;
    const std::int64_t single = elements * std::int64_t{sizeof(float)};
    if (name.starts_with("blk.")) {
      const bool half = matrices != WeightType::kFloat32 && shape.size() == 2;
      layers[std::stoi(name.substr(4))] += half ? single / 2 : single;
      if (half) largest_matrix = std::max(largest_matrix, single);
    } else if (shape.size() == 2) {
      vocabulary = std::max(vocabulary, single);
      vocabulary_all += single;
    } else {
      other += single;
    }
  }
  std::int64_t all = 0, largest = 0;
  for (const auto& [layer, bytes] : layers) {
    all += bytes;
    largest = std::max(largest, bytes);
  }
  // A half matrix is converted from a float32 copy, on the thread that reads ahead.
  return {.all = all + vocabulary_all + other + largest_matrix,
          .streamed = largest + std::max(largest, vocabulary) + other + largest_matrix};
}

MemoryPlan plan_memory(std::int64_t limit, const WeightBytes& weights, const Workload& work) {
  if (limit <= 0)
    return {.stream = false, .units = 1, .memory_bytes = std::numeric_limits<std::int64_t>::max()};
  if (weights.all + work.fixed_bytes + work.unit_bytes + work.boundary_bytes <= limit)
    return {.stream = false, .units = 1, .memory_bytes = work.boundary_bytes};
  const std::int64_t smallest = weights.streamed + work.fixed_bytes + work.unit_bytes;
  if (smallest > limit)
    throw MemoryError(
        smallest, limit,
        "--memory " + mebibytes(limit) + " is too little: two layers of weights take " +
            mebibytes(weights.streamed) + ", the process and its statistics " +
            mebibytes(work.fixed_bytes) + ", the windows that go together " +
            mebibytes(work.unit_bytes) + "; the smallest that works is --memory " +
            mebibytes(smallest) +
            " (less with a smaller --batch, --window or --coherent, or --dtype bf16)");
  const std::int64_t rest = limit - weights.streamed - work.fixed_bytes;
  const std::int64_t unspilled = rest / (work.unit_bytes + work.boundary_bytes);
  const std::int64_t units =
      std::min(work.units, std::max(unspilled, std::min(kUnitsPerRead, rest / work.unit_bytes)));
  return {.stream = true, .units = units, .memory_bytes = rest - units * work.unit_bytes};
}

std::int64_t layer_bytes(const models::ModelConfig& config, std::int64_t tokens, bool gradients) {
  const std::int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const std::int64_t heads =
      std::int64_t{config.query_heads + 2 * config.kv_heads} * config.head_dim;
  const std::int64_t inner_tokens = std::min(tokens, kTokensAtOnce);
  // Tensors alive at a time, counted in decoder.cpp: as wide as the residual stream, as the heads,
  // as the inside of the feed-forward part. A graph keeps what its derivatives need.
  const std::int64_t channels = gradients ? 12 * hidden + 6 * heads : 6 * hidden + 4 * heads;
  return std::int64_t{sizeof(float)} *
         (tokens * channels + inner_tokens * (gradients ? 6 : 3) * inner);
}

}  // namespace kvplan::forward
