#include "schemas/model_json.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "schemas/error.h"
#include "schemas/plan.h"

namespace kvplan {
namespace {

using nlohmann::json;

// Far above any model, low enough that products of a few of them stay inside 64 bits.
constexpr int kMaxLayers = 4096;
constexpr int kMaxHeads = 4096;
constexpr int kMaxHeadDim = 1024;  // a rotation of it takes 8 MB and a second

constexpr std::array<std::string_view, 3> kRopeStyles = {"half", "interleaved", "none"};
constexpr std::array<std::string_view, 5> kScalingTypes = {"linear", "dynamic", "llama3", "yarn",
                                                           "longrope"};
constexpr std::array<std::string_view, 2> kContainers = {"gguf", "hf"};
constexpr double kLeastFactor = 1e-6;  // of rotary bases and scalings, which are positive
constexpr int kMaxWindow = 1 << 30;    // tokens

json scaling_to_json(const std::optional<RopeScaling>& scaling) {
  if (!scaling) return nullptr;
  json out = {{"type", scaling->type}, {"factor", scaling->factor}};
  if (scaling->type != "linear") out["original_context"] = scaling->original_context;
  if (scaling->type == "llama3") {
    out["low_freq_factor"] = scaling->low_freq_factor;
    out["high_freq_factor"] = scaling->high_freq_factor;
  }
  if (scaling->type == "yarn") {
    out["beta_fast"] = scaling->beta_fast;
    out["beta_slow"] = scaling->beta_slow;
    out["truncate"] = scaling->truncate;
  }
  if (scaling->type == "longrope") {
    out["short_factors"] = scaling->short_factors;
    out["long_factors"] = scaling->long_factors;
  }
  if (scaling->type == "yarn" || scaling->type == "longrope")
    out["attention_factor"] = scaling->attention_factor;
  return out;
}

/// `pairs`: rotary_dim / 2.
RopeScaling scaling_from_json(JsonObject object, int pairs) {
  RopeScaling scaling;
  scaling.type = object.choice("type", kScalingTypes);
  scaling.factor = object.number("factor", kLeastFactor);
  if (scaling.type != "linear") scaling.original_context = object.integer("original_context", 1);
  if (scaling.type == "llama3") {
    scaling.low_freq_factor = object.number("low_freq_factor", kLeastFactor);
    scaling.high_freq_factor = object.number("high_freq_factor", kLeastFactor);
  }
  if (scaling.type == "yarn") {
    scaling.beta_fast = object.number("beta_fast", kLeastFactor);
    scaling.beta_slow = object.number("beta_slow", kLeastFactor);
    scaling.truncate = object.boolean("truncate");
  }
  if (scaling.type == "longrope") {
    const auto factors = [&](const char* name) {
      std::vector<double> values = object.numbers(name);
      if (std::ssize(values) != pairs ||
          std::ranges::any_of(values, [](double value) { return value < kLeastFactor; }))
        object.refuse(name, "expected " + std::to_string(pairs) + " positive numbers");
      return values;
    };
    scaling.short_factors = factors("short_factors");
    scaling.long_factors = factors("long_factors");
  }
  if (scaling.type == "yarn" || scaling.type == "longrope")
    scaling.attention_factor = object.number("attention_factor", kLeastFactor);
  object.finish();
  return scaling;
}

json rope_to_json(const RopeSpec& rope) {
  return {{"style", rope.style}, {"base", rope.base}, {"scaling", scaling_to_json(rope.scaling)}};
}

RopeSpec rope_from_json(JsonObject object, int pairs) {
  RopeSpec rope;
  rope.style = object.choice("style", kRopeStyles);
  rope.base = object.number("base", kLeastFactor);
  if (auto scaling = object.object_or_null("scaling"))
    rope.scaling = scaling_from_json(*scaling, pairs);
  object.finish();
  return rope;
}

std::string shown(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

void require_equal(const char* field, const json& expected, const json& found,
                   const std::string& file) {
  if (expected == found) return;
  throw InputError(file, std::string("/model/") + field,
                   "made for another model: expected " + shown(expected) +
                       " (the model at hand), found " + shown(found));
}

}  // namespace

json model_to_json(const ModelSpec& model) {
  json out = {{"architecture", model.architecture},
              {"num_layers", model.num_layers},
              {"query_heads", model.query_heads},
              {"kv_heads", model.kv_heads},
              {"head_dim", model.head_dim},
              {"rotary_dim", model.rotary_dim},
              {"rope", rope_to_json(model.rope)},
              {"container", text_or_null(model.container)},
              {"kv_weights_sha256", text_or_null(model.kv_weights_sha256)}};
  if (!model.windows.empty()) out["windows"] = model.windows;
  if (model.local_rope) out["local_rope"] = rope_to_json(*model.local_rope);
  return out;
}

ModelSpec model_from_json(JsonObject object) {
  ModelSpec model;
  model.architecture = object.text("architecture");
  model.num_layers = object.small_integer("num_layers", 1, kMaxLayers);
  model.query_heads = object.small_integer("query_heads", 1, kMaxHeads);
  model.kv_heads = object.small_integer("kv_heads", 1, model.query_heads);
  if (model.query_heads % model.kv_heads != 0) {
    object.refuse("kv_heads", "expected a divisor of query_heads " +
                                  std::to_string(model.query_heads) + ", found " +
                                  std::to_string(model.kv_heads));
  }
  model.head_dim = object.small_integer("head_dim", 1, kMaxHeadDim);
  model.rotary_dim = object.small_integer("rotary_dim", 0, model.head_dim);
  if (model.rotary_dim % 2 != 0) {
    object.refuse("rotary_dim",
                  "expected an even number, found " + std::to_string(model.rotary_dim));
  }
  const int pairs = model.rotary_dim / 2;
  model.rope = rope_from_json(object.object("rope"), pairs);
  if (object.has("local_rope"))
    model.local_rope = rope_from_json(object.object("local_rope"), pairs);
  if (object.has("windows")) {
    model.windows = object.integers("windows", 0, kMaxWindow);
    if (std::ssize(model.windows) != model.num_layers)
      object.refuse("windows", "expected one number per layer, " +
                                   std::to_string(model.num_layers) + ", found " +
                                   std::to_string(model.windows.size()));
  }
  model.container = object.choice_or_null("container", kContainers);
  model.kv_weights_sha256 = object.sha256_or_null("kv_weights_sha256");
  object.finish();
  return model;
}

void require_same_model(const ModelSpec& expected, const ModelSpec& found, const std::string& file,
                        bool allow_other_weights) {
  json left = model_to_json(expected), right = model_to_json(found);
  for (const char* field : {"architecture", "num_layers", "query_heads", "kv_heads", "head_dim",
                            "rotary_dim", "rope", "windows", "local_rope"}) {
    require_equal(field, left[field], right[field], file);
  }
  if (allow_other_weights) return;
  for (const char* field : {"container", "kv_weights_sha256"})
    require_equal(field, left[field], right[field], file);
}

}  // namespace kvplan
