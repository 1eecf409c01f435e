#pragma once
// An original Hugging Face folder, as far as scales of K and V are added to it. Private to
// exporters.

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "exporters/export.h"

namespace kvplan::exporters {

inline constexpr float kFp8Max = 448;  // largest finite number of e4m3

/// 12 of "model.layers.12.self_attn.k_proj.weight", by the last "layers.N." in the name.
std::optional<int> layer_of(std::string_view name);

struct Checkpoint {
  std::filesystem::path folder;
  nlohmann::ordered_json config;                  // config.json
  std::map<std::string, std::string> weight_map;  // tensor -> file
  std::int64_t total_size = 0;                    // bytes of all tensors
  std::vector<std::string> attention;             // per layer: "model.layers.0.self_attn"; empty
                                                  // for layers without keys and values
};

/// `layers`: of the plan. InputError: files missing or broken, another number of layers, an
/// attention path that is not found for a layer with a cache.
Checkpoint read_checkpoint(const std::filesystem::path& folder, const CacheShape& shape);

/// Indented as Hugging Face writes it.
std::string json_text(const nlohmann::ordered_json& document);

/// Largest |x| of a layer and side by KV head. InputError: missing, zero, not finite.
std::vector<float> absmax_of(const PlanBundle& bundle, int layer, Side side,
                             const std::string& file);

/// How the scale tensors are named and shaped.
struct ScaleNames {
  std::string k = ".k_scale", v = ".v_scale";  // behind the attention path
  bool per_head = false;                       // [kv_heads,1,1] instead of [1]
};

/// model-kv-scales.safetensors and the index of all tensors: amax / largest of every layer with a
/// cache. Notes scales above 0.5.
std::vector<ExportFile> scale_files(const PlanBundle& bundle, const Checkpoint& checkpoint,
                                    const ScaleNames& names, const std::string& file,
                                    Projection& projection);

/// config.json's quantization_config with fp8 keys and values, and how its scales are named.
ScaleNames add_fp8_scheme(Checkpoint& checkpoint, bool per_head);

}  // namespace kvplan::exporters
