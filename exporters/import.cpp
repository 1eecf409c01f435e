#include "exporters/import.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "exporters/import_plan.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/json_fields.h"
#include "schemas/sha256.h"

namespace kvplan::exporters {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{4} << 20;
constexpr int kPageTokens = 64;
constexpr int kMaxDepth = 64;
constexpr std::int64_t kMaxContext = 1 << 30;
constexpr int kMaxCount = 1 << 16;  // layers, heads, channels of a head

int count_or(JsonObject& object, const char* name, int otherwise) {
  return object.has(name) ? object.small_integer(name, 1, kMaxCount) : otherwise;
}

RopeScaling scaling_of(JsonObject& rope, const char* type_field, const std::string& type) {
  RopeScaling scaling{.type = type, .factor = rope.number("factor", 1e-6)};
  if (type == "llama3") {
    scaling.low_freq_factor = rope.number("low_freq_factor", 1e-6);
    scaling.high_freq_factor = rope.number("high_freq_factor", 1e-6);
    scaling.original_context = rope.integer("original_max_position_embeddings", 1);
  } else if (type != "linear") {
    rope.refuse(type_field, "expected default, linear or llama3, found \"" + type + "\"");
  }
  return scaling;
}

RopeSpec rope_of(JsonObject& config) {
  RopeSpec rope;
  if (config.has("rope_theta")) rope.base = config.number("rope_theta", 1e-6);
  for (const char* name : {"rope_scaling", "rope_parameters"}) {
    if (!config.has(name)) continue;
    auto parameters = config.object_or_null(name);
    if (!parameters) continue;
    if (parameters->has("rope_theta")) rope.base = parameters->number("rope_theta", 1e-6);
    const char* field = parameters->has("rope_type") ? "rope_type" : "type";
    const std::string type = parameters->text(field);
    if (type != "default") rope.scaling = scaling_of(*parameters, field, type);
  }
  return rope;
}

}  // namespace

ModelSpec model_of_config(std::string_view text, const std::string& file,
                          std::int64_t& max_context) {
  const nlohmann::json document = parse_json(text, file, kMaxDepth);
  JsonObject config(document, file);
  ModelSpec model;
  model.architecture = config.text("model_type");
  model.num_layers = config.small_integer("num_hidden_layers", 1, kMaxCount);
  model.query_heads = config.small_integer("num_attention_heads", 1, kMaxCount);
  model.kv_heads = count_or(config, "num_key_value_heads", model.query_heads);
  if (model.query_heads % model.kv_heads != 0)
    config.refuse("num_key_value_heads", "expected a divisor of num_attention_heads " +
                                             std::to_string(model.query_heads) + ", found " +
                                             std::to_string(model.kv_heads));
  // null counts as absent, as it does in transformers
  const bool stated = config.has("head_dim") && !document["head_dim"].is_null();
  model.head_dim = stated ? config.small_integer("head_dim", 1, kMaxCount)
                          : config.small_integer("hidden_size", 1) / model.query_heads;
  if (model.head_dim < 1) config.refuse("hidden_size", "expected a channel for each head");
  model.rotary_dim = model.head_dim / 2 * 2;
  model.rope = rope_of(config);
  max_context = config.has("max_position_embeddings")
                    ? config.integer("max_position_embeddings", 1, kMaxContext)
                    : 0;
  return model;
}

PlanBundle empty_import(std::string_view format, std::string_view tool, std::string_view text,
                        const ImportOptions& options) {
  if (options.model.num_layers < 1 || options.model.kv_heads < 1 || options.model.head_dim < 1)
    throw ArgumentError("an import needs the geometry of its model");
  PlanBundle bundle;
  Plan& plan = bundle.plan;
  plan.model = options.model;
  plan.context = options.context;
  plan.sink_tokens = 0;
  plan.page_tokens = kPageTokens;
  plan.budget.kind = "none";
  plan.policy = "import:" + std::string(format);
  plan.codec = "fp16";
  plan.group_size = options.model.head_dim;
  plan.scale_rule = "one";
  plan.norm = "fp16";
  plan.centre = false;
  plan.origin = PlanOrigin{.file_sha256 = sha256(text), .tool = std::string(tool)};
  for (int l = 0; l < options.model.num_layers; ++l) plan.layers.emplace_back().index = l;
  return bundle;
}

std::int64_t fill_side(const std::vector<Format>& heads, SidePlan& side, int head_dim) {
  std::int64_t bytes = 0;
  double total = 0;
  for (const Format& format : heads) {
    side.heads.push_back({.widths = {format.width}, .outliers = {}});
    bytes += format.bytes(head_dim);
    total += format.width;
  }
  side.bits = total / static_cast<double>(heads.size());
  const bool plain = heads.front().plain();
  side.codec = plain ? "" : heads.front().codec;
  return bytes;
}

void set_sizes(std::int64_t bytes_per_token, Plan& plan) {
  plan.bytes_per_token = bytes_per_token;
  plan.effective_bits = plan.effective_bits_at_context =
      8 * static_cast<double>(bytes_per_token) /
      static_cast<double>(elements_per_token(plan.model));
}

PlanBundle import_plan(std::string_view format, const std::filesystem::path& file,
                       const ImportOptions& options) {
  if (std::ranges::find(kImportFormats, format) == std::end(kImportFormats))
    throw ArgumentError("unknown format '" + std::string(format) +
                        "': expected kvtuner or modelopt");
  const std::string text = read_text_file(file, kMaxFileBytes);
  return format == "kvtuner" ? import_kvtuner(text, file.string(), options)
                             : import_modelopt(text, file.string(), options);
}

}  // namespace kvplan::exporters
