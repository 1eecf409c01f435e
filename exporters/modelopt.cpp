// ModelOpt: a map from attention layers to cache formats, schema version 1.

#include <algorithm>
#include <charconv>
#include <set>

#include "exporters/checkpoint.h"
#include "exporters/writers.h"
#include "schemas/error.h"

namespace kvplan::exporters {
namespace {

using nlohmann::ordered_json;

const ordered_json kProducer = {{"name", "modelopt"}, {"version", "0.0.0+export"}};

/// vLLM up to 0.33.0 raises on these files.
void refuse_old_vllm(const std::string& version, const std::string& file) {
  constexpr std::string_view kVllm = "vllm-";
  constexpr int kLast[] = {0, 33, 0};
  if (!version.starts_with(kVllm)) return;
  std::string_view rest = std::string_view(version).substr(kVllm.size());
  for (const int last : kLast) {
    int part = 0;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), part);
    if (error != std::errc())
      throw ArgumentError("--target-version: expected vllm-MAJOR.MINOR.PATCH, found '" + version +
                          "'");
    if (part > last) return;
    if (part < last) break;
    rest.remove_prefix(static_cast<std::size_t>(end - rest.data()));
    if (rest.starts_with('.')) rest.remove_prefix(1);
    if (rest.empty()) break;
  }
  throw InputError(file, "/layers",
                   version +
                       " raises on maps of cache formats, as every release up to vllm-0.33.0 "
                       "does; export --target vllm or kv-scales for it");
}

std::string algorithm(const Projection& p, int layer) {
  const Format &k = p.format(layer, Side::kKey), &v = p.format(layer, Side::kValue);
  if (k.plain()) return {};
  if (k.name == v.name) return k.name == "nvfp4" ? "NVFP4" : "FP8";
  return "FP8_K_NVFP4_V";
}

/// The keys of a quantization section that say how keys and values are stored.
void set_cache_formats(ordered_json& section, const ordered_json& map, const std::string& name) {
  section["kv_cache_quant_algo"] = name.empty() ? ordered_json(nullptr) : ordered_json(name);
  section["kv_cache_quantized_layers"] = map;
  section["kv_cache_schema_version"] = 1;
}

}  // namespace

std::vector<ExportFile> write_modelopt(const PlanBundle& bundle, const ExportOptions& options,
                                       Projection& projection) {
  refuse_old_vllm(options.target_version, options.file);
  Checkpoint checkpoint;
  if (!options.model.empty()) checkpoint = read_checkpoint(options.model, projection.shape);

  ordered_json map = ordered_json::object();
  std::set<std::string> names;
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    if (!projection.cached(l)) continue;
    const std::string name = algorithm(projection, l);
    names.insert(name);
    if (name.empty()) continue;
    map[options.model.empty() ? "model.layers." + std::to_string(l) + ".self_attn"
                              : checkpoint.attention[static_cast<std::size_t>(l)]] = {
        {"quant_algo", name}};
  }
  // One name for the whole cache stands at the top, nothing for an empty map.
  const std::string top = names.size() == 1 ? *names.begin() : "MIXED_PRECISION";

  ordered_json quantization = {{"quant_algo", nullptr}};
  ordered_json* existing = nullptr;
  if (checkpoint.config.contains("quantization_config") &&
      !checkpoint.config["quantization_config"].is_null()) {
    existing = &checkpoint.config["quantization_config"];
    if (!existing->is_object() || existing->value("quant_method", ordered_json()) != "modelopt")
      throw InputError((options.model / "config.json").string(), "/quantization_config",
                       "expected weights that are not quantised, or quantised by ModelOpt");
    if (existing->contains("quant_algo")) quantization["quant_algo"] = (*existing)["quant_algo"];
  }
  set_cache_formats(quantization, map, top);
  std::vector<ExportFile> files;
  if (options.model.empty()) {
    projection.report.note("SCALES", "without --model no scale tensors and no config.json");
  } else {
    ordered_json config = {{"quant_method", "modelopt"}, {"producer", kProducer}};
    if (existing) config = *existing;
    if (top == "FP8" && !existing) {
      config["kv_cache_scheme"] = {{"dynamic", false}, {"num_bits", 8}, {"type", "float"}};
    } else {
      set_cache_formats(config, map, top);
    }
    if (top == "NVFP4")
      projection.report.note("UNVERIFIED", "the form of a cache that is all NVFP4");
    checkpoint.config["quantization_config"] = config;
    files = scale_files(bundle, checkpoint, {.k = ".k_proj.k_scale", .v = ".v_proj.v_scale"},
                        options.file, projection);
    files.push_back({"config.json", json_text(checkpoint.config)});
  }
  files.push_back({"hf_quant_config.json",
                   json_text({{"producer", kProducer}, {"quantization", quantization}})});
  return files;
}

}  // namespace kvplan::exporters
