#include "exporters/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"

namespace kvplan::exporters {
namespace {

using nlohmann::ordered_json;

constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;
constexpr std::size_t kMaxIndexBytes = std::size_t{256} << 20;
constexpr int kMaxDepth = 64;
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr const char* kWeightsFile = "model.safetensors";
constexpr const char* kScalesFile = "model-kv-scales.safetensors";
constexpr double kLargeScale = 0.5;

ordered_json read_json(const std::filesystem::path& path, std::size_t max_bytes) {
  const std::string text = read_text_file(path, max_bytes);
  try {
    return ordered_json::parse(text, [](int depth, ordered_json::parse_event_t, ordered_json&) {
      if (depth > kMaxDepth) throw ArgumentError("nested too deep");
      return true;
    });
  } catch (const ordered_json::exception& error) {
    throw InputError(path.string(), "", std::string("expected JSON: ") + error.what());
  } catch (const ArgumentError& error) {
    throw InputError(path.string(), "", error.what());
  }
}

void read_weight_map(Checkpoint& checkpoint) {
  const auto index = checkpoint.folder / kIndexFile;
  if (std::filesystem::exists(index)) {
    const ordered_json document = read_json(index, kMaxIndexBytes);
    if (!document.is_object() || !document.contains("weight_map") ||
        !document["weight_map"].is_object())
      throw InputError(index.string(), "/weight_map", "expected an object of tensor names");
    for (const auto& [name, file] : document["weight_map"].items()) {
      if (!file.is_string())
        throw InputError(index.string(), "/weight_map/" + name, "expected a file name");
      checkpoint.weight_map[name] = file.get<std::string>();
    }
    if (document.contains("metadata") && document["metadata"].is_object() &&
        document["metadata"].contains("total_size") &&
        document["metadata"]["total_size"].is_number_integer())
      checkpoint.total_size = document["metadata"]["total_size"].get<std::int64_t>();
    return;
  }
  const SafetensorsFile weights(checkpoint.folder / kWeightsFile);
  for (const auto& [name, entry] : weights.entries()) {
    checkpoint.weight_map[name] = kWeightsFile;
    checkpoint.total_size += static_cast<std::int64_t>(entry.data.size());
  }
}

void find_attention(Checkpoint& checkpoint, const CacheShape& shape) {
  checkpoint.attention.resize(shape.layers.size());
  for (const auto& [name, file] : checkpoint.weight_map)
    for (const std::string_view projection : {".k_proj.weight", ".qkv_proj.weight"}) {
      if (!name.ends_with(projection)) continue;
      const std::string path = name.substr(0, name.size() - projection.size());
      const auto layer = layer_of(name);
      if (!layer) continue;
      if (*layer >= shape.num_layers())
        throw InputError(checkpoint.folder.string(), name,
                         "the plan has " + std::to_string(shape.num_layers()) +
                             " layers; this is another model");
      checkpoint.attention[static_cast<std::size_t>(*layer)] = path;
    }
  for (int l = 0; l < shape.num_layers(); ++l)
    if (shape.layers[static_cast<std::size_t>(l)].cached() &&
        checkpoint.attention[static_cast<std::size_t>(l)].empty())
      throw InputError(checkpoint.folder.string(), "layers." + std::to_string(l),
                       "expected a k_proj.weight or qkv_proj.weight of this layer, found none");
}

const ordered_json kFp8Scheme = {{"num_bits", 8},
                                 {"type", "float"},
                                 {"symmetric", true},
                                 {"dynamic", false},
                                 {"strategy", "tensor"}};

}  // namespace

std::optional<int> layer_of(std::string_view name) {
  constexpr std::string_view kLayers = "layers.";
  const auto at = name.rfind(kLayers);
  if (at == std::string_view::npos) return std::nullopt;
  const std::string_view rest = name.substr(at + kLayers.size());
  int layer = 0;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), layer);
  if (error != std::errc() || end == rest.data() + rest.size() || *end != '.' || layer < 0)
    return std::nullopt;
  return layer;
}

Checkpoint read_checkpoint(const std::filesystem::path& folder, const CacheShape& shape) {
  Checkpoint checkpoint{.folder = folder,
                        .config = read_json(folder / "config.json", kMaxConfigBytes),
                        .weight_map = {},
                        .attention = {}};
  if (!checkpoint.config.is_object())
    throw InputError((folder / "config.json").string(), "", "expected an object");
  read_weight_map(checkpoint);
  find_attention(checkpoint, shape);
  return checkpoint;
}

std::string json_text(const ordered_json& document) { return document.dump(2) + "\n"; }

std::vector<float> absmax_of(const PlanBundle& bundle, int layer, Side side,
                             const std::string& file) {
  const std::string name = "layers." + std::to_string(layer) + "." + side_name(side) + ".absmax";
  const auto& layers = bundle.tensors.layers;
  if (static_cast<std::size_t>(layer) >= layers.size() ||
      layers[static_cast<std::size_t>(layer)].side(side).absmax.empty())
    throw InputError(file, name,
                     "static scales need the largest magnitudes of a profile, the plan has none; "
                     "plan from a profile");
  const auto& values = layers[static_cast<std::size_t>(layer)].side(side).absmax.data;
  for (const float value : values)
    if (!std::isfinite(value) || value <= 0)
      throw InputError(file, name,
                       "expected finite magnitudes above 0, found " + std::to_string(value));
  return values;
}

std::vector<ExportFile> scale_files(const PlanBundle& bundle, const Checkpoint& checkpoint,
                                    const ScaleNames& names, const std::string& file,
                                    Projection& projection) {
  SafetensorsWriter writer;
  ordered_json weight_map = ordered_json::object();
  std::map<std::string, std::string> map = checkpoint.weight_map;
  std::int64_t added = 0;
  std::vector<int> large;
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    if (!projection.cached(l)) continue;
    for (const Side side : kSides) {
      std::vector<float> scales = absmax_of(bundle, l, side, file);
      if (!names.per_head) scales = {std::ranges::max(scales)};
      for (float& scale : scales) scale /= kFp8Max;
      if (std::ranges::max(scales) > kLargeScale && (large.empty() || large.back() != l))
        large.push_back(l);
      const std::string name = checkpoint.attention[static_cast<std::size_t>(l)] +
                               (side == Side::kKey ? names.k : names.v);
      if (map.contains(name))
        throw InputError(checkpoint.folder.string(), name,
                         "the checkpoint has scales already; take one without");
      map[name] = kScalesFile;
      const auto count = static_cast<std::int64_t>(scales.size());
      Array<float> tensor;
      tensor.shape =
          names.per_head ? std::vector<std::int64_t>{count, 1, 1} : std::vector<std::int64_t>{1};
      tensor.data = std::move(scales);
      writer.add(name, std::move(tensor));
      added += count * static_cast<std::int64_t>(sizeof(float));
    }
  }
  if (!large.empty()) projection.report.note("SCALES", "a scale above 0.5", large);
  for (const auto& [name, where] : map) weight_map[name] = where;
  const ordered_json index = {{"metadata", {{"total_size", checkpoint.total_size + added}}},
                              {"weight_map", weight_map}};
  const std::vector<std::byte> bytes = writer.bytes();
  return {{kScalesFile, std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size())},
          {kIndexFile, json_text(index)}};
}

ScaleNames add_fp8_scheme(Checkpoint& checkpoint, bool per_head) {
  ordered_json scheme = kFp8Scheme;
  if (per_head) scheme["strategy"] = "attn_head";
  ScaleNames names{.per_head = per_head};
  ordered_json& config = checkpoint.config;
  if (!config.contains("quantization_config") || config["quantization_config"].is_null()) {
    config["quantization_config"] = {
        {"quant_method", "compressed-tensors"}, {"format", "dense"},
        {"quantization_status", "compressed"},  {"config_groups", ordered_json::object()},
        {"ignore", ordered_json::array()},      {"kv_cache_scheme", scheme}};
    return names;
  }
  ordered_json& existing = config["quantization_config"];
  const std::string file = (checkpoint.folder / "config.json").string();
  const std::string method =
      existing.is_object() ? existing.value("quant_method", ordered_json()).dump() : "";
  if (method == "\"compressed-tensors\"") {
    existing["kv_cache_scheme"] = scheme;
    return names;
  }
  const bool fp8_kv =
      method == "\"modelopt\"" &&
      (existing.value("kv_cache_quant_algo", ordered_json()) == "FP8" ||
       (existing.contains("kv_cache_scheme") && existing["kv_cache_scheme"].is_object() &&
        existing["kv_cache_scheme"].value("num_bits", ordered_json()) == 8));
  if (!fp8_kv || per_head)
    throw InputError(file, "/quantization_config",
                     "scales go into checkpoints of compressed-tensors, of ModelOpt with FP8 keys "
                     "and values (one scale per tensor), or without quantised weights; found " +
                         (method.empty() ? "no method" : method));
  names.k = ".k_proj.k_scale";
  names.v = ".v_proj.v_scale";
  return names;
}

}  // namespace kvplan::exporters
