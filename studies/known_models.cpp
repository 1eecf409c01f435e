#include "studies/known_models.h"

#include <string>

namespace kvplan::studies {
namespace {

struct KnownModel {
  std::string_view name, architecture;
  int layers, query_heads, kv_heads, head_dim;
};

constexpr std::array<KnownModel, 8> kModels = {{{"SmolLM2-135M", "llama", 30, 9, 3, 64},
                                                {"Qwen2.5-0.5B", "qwen2", 24, 14, 2, 64},
                                                {"Qwen2.5-1.5B", "qwen2", 28, 12, 2, 128},
                                                {"Qwen2.5-3B", "qwen2", 36, 16, 2, 128},
                                                {"Qwen2.5-7B", "qwen2", 28, 28, 4, 128},
                                                {"Llama-3.2-1B", "llama", 16, 32, 8, 64},
                                                {"Llama-3.2-3B", "llama", 28, 24, 8, 128},
                                                {"Llama-3.1-8B", "llama", 32, 32, 8, 128}}};
/// Mistral-7B has the geometry of Llama-3.1-8B, whose rotary base is larger.
constexpr double kLlama3RotaryBase = 500000;

}  // namespace

std::string_view known_model(const ModelSpec& spec) {
  for (const KnownModel& model : kModels)
    if (model.architecture == spec.architecture && model.layers == spec.num_layers &&
        model.query_heads == spec.query_heads && model.kv_heads == spec.kv_heads &&
        model.head_dim == spec.head_dim &&
        (!model.name.starts_with("Llama-3") || spec.rope.base == kLlama3RotaryBase))
      return model.name;
  return "";
}

ModelLab::NamedBundles grid_bundles(ModelLab& lab) {
  ModelLab::NamedBundles bundles;
  for (const KvBits& bits : kGrid) {
    const std::string name = "turboquant:" + std::to_string(bits.k) + "/" + std::to_string(bits.v);
    bundles.emplace_back(name, lab.baseline(name));
  }
  return bundles;
}

}  // namespace kvplan::studies
