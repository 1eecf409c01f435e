// ModelOpt's maps of cache formats, in hf_quant_config.json or in config.json.

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "exporters/checkpoint.h"
#include "exporters/import_plan.h"
#include "exporters/stack_tables.h"
#include "schemas/error.h"
#include "schemas/json_fields.h"

namespace kvplan::exporters {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 64;

struct Algorithm {
  std::string_view name;
  std::string_view codec;  // of a plan that has nothing else
  Format k, v;
  bool in_maps;
};

const std::vector<Algorithm>& algorithms() {
  Format int8 = fp8_format("int:8");
  int8.name = "int8";
  static const std::vector<Algorithm> all = {
      {"FP8", "fp8_e4m3", fp8_format("fp8_e4m3+tensor"), fp8_format("fp8_e4m3+tensor"), true},
      {"NVFP4", "nvfp4", nvfp4_format(), nvfp4_format(), true},
      {"FP8_K_NVFP4_V", "", fp8_format("fp8_e4m3+tensor"), nvfp4_format(), true},
      {"INT8", "int", int8, int8, false},
      {"NVFP4_AFFINE", "nvfp4", nvfp4_format(), nvfp4_format(), false}};
  return all;
}

const Algorithm& algorithm(const std::string& name, bool in_map, const std::string& file,
                           const std::string& pointer) {
  std::string known;
  for (const Algorithm& a : algorithms()) {
    if (in_map && !a.in_maps) continue;
    if (a.name == name) return a;
    known += (known.empty() ? "" : ", ") + std::string(a.name);
  }
  throw InputError(file, pointer, "expected " + known + ", found \"" + name.substr(0, 40) + "\"");
}

class Section {
 public:
  Section(const json& value, std::string file, std::string pointer)
      : value_(value), file_(std::move(file)), pointer_(std::move(pointer)) {
    if (!value_.is_object()) refuse("", "expected an object");
  }

  const json* find(const char* name) const {
    const auto found = value_.find(name);
    return found == value_.end() || found->is_null() ? nullptr : &*found;
  }
  [[noreturn]] void refuse(const std::string& field, const std::string& message) const {
    throw InputError(file_, pointer_ + field, message);
  }

  void check_version() const {
    const json* version = find("kv_cache_schema_version");
    if (version && *version != 1)
      refuse("/kv_cache_schema_version", "expected 1, found " + version->dump().substr(0, 40));
  }

  /// The one name for the whole cache; empty when there is none.
  std::string global_name() const {
    if (const json* name = find("kv_cache_quant_algo")) {
      if (!name->is_string()) refuse("/kv_cache_quant_algo", "expected a name or null");
      return name->get<std::string>();
    }
    const json* scheme = find("kv_cache_scheme");
    if (!scheme) return {};
    const auto is = [&](const char* field, const json& expected) {
      return scheme->is_object() && scheme->contains(field) && (*scheme)[field] == expected;
    };
    if (!is("num_bits", 8) || !(is("type", "float") || is("type", "int")))
      refuse("/kv_cache_scheme", "expected 8 bits of type float or int");
    return is("type", "float") ? "FP8" : "INT8";
  }

  /// By layer; nothing without a map.
  std::optional<std::map<int, const Algorithm*>> map(int num_layers) const {
    const json* entries = find("kv_cache_quantized_layers");
    if (!entries) return std::nullopt;
    if (!entries->is_object()) refuse("/kv_cache_quantized_layers", "expected an object");
    std::map<int, const Algorithm*> out;
    for (const auto& [path, entry] : entries->items()) {
      const std::string field = "/kv_cache_quantized_layers/" + path;
      const auto layer = layer_of(path);
      if (!layer || *layer >= num_layers)
        refuse(field, "expected a module of a layer 0.." + std::to_string(num_layers - 1) +
                          ", such as model.layers.0.self_attn");
      if (!entry.is_object() || !entry.contains("quant_algo") || !entry["quant_algo"].is_string())
        refuse(field, "expected an object with quant_algo");
      const Algorithm& own = algorithm(entry["quant_algo"].get<std::string>(), true, file_,
                                       pointer_ + field + "/quant_algo");
      if (!out.emplace(*layer, &own).second)
        refuse(field, "layer " + std::to_string(*layer) + " stands here twice");
    }
    return out;
  }

 private:
  const json& value_;
  std::string file_, pointer_;
};

}  // namespace

PlanBundle import_modelopt(std::string_view text, const std::string& file,
                           const ImportOptions& options) {
  const json document = parse_json(text, file, kMaxDepth);
  const char* field = document.is_object() && document.contains("quantization")
                          ? "quantization"
                          : "quantization_config";
  if (!document.is_object() || !document.contains(field))
    throw InputError(file, "",
                     "expected \"quantization\" or \"quantization_config\", as in "
                     "ModelOpt's hf_quant_config.json and config.json");
  const Section section(document[field], file, std::string("/") + field);
  section.check_version();
  PlanBundle bundle = empty_import("modelopt", "ModelOpt", text, options);
  Plan& plan = bundle.plan;

  const std::string name = section.global_name();
  auto map = section.map(plan.model.num_layers);
  if (!map) {
    if (name.empty())
      section.refuse("",
                     "expected kv_cache_quantized_layers, kv_cache_quant_algo or "
                     "kv_cache_scheme: the cache is not quantised");
    const Algorithm& all =
        algorithm(name, false, file, std::string("/") + field + "/kv_cache_quant_algo");
    map.emplace();
    for (int l = 0; l < plan.model.num_layers; ++l) map->emplace(l, &all);
  } else if (!name.empty() && name != "MIXED_PRECISION") {
    for (const auto& [l, own] : *map)
      if (own->name != name)
        section.refuse("/kv_cache_quant_algo",
                       "expected MIXED_PRECISION, as layer " + std::to_string(l) + " has " +
                           std::string(own->name) + "; found " + name.substr(0, 40));
  }

  const bool uniform =
      std::ssize(*map) == plan.model.num_layers && !map->begin()->second->codec.empty() &&
      std::ranges::all_of(*map,
                          [&](const auto& entry) { return entry.second == map->begin()->second; });
  const Format plain = plain_format("none");
  std::int64_t bytes = 0;
  for (LayerPlan& layer : plan.layers) {
    const auto own = map->find(layer.index);
    for (const Side side : kSides) {
      const Format& format = own == map->end()    ? plain
                             : side == Side::kKey ? own->second->k
                                                  : own->second->v;
      const std::vector<Format> heads(static_cast<std::size_t>(plan.model.kv_heads), format);
      bytes += fill_side(heads, layer.side(side), plan.model.head_dim);
      if (uniform) layer.side(side).codec.clear();
    }
  }
  if (uniform) plan.codec = map->begin()->second->codec;
  set_sizes(bytes, plan);
  return bundle;
}

}  // namespace kvplan::exporters
