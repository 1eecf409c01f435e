#include "schemas/model_json.h"

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
constexpr int kMaxHeadDim = 4096;

constexpr std::array<std::string_view, 3> kRopeStyles = {"half", "interleaved", "none"};
constexpr std::array<std::string_view, 2> kScalingTypes = {"linear", "llama3"};
constexpr std::array<std::string_view, 2> kContainers = {"gguf", "hf"};
constexpr double kLeastFactor = 1e-6;  // of rotary bases and scalings, which are positive

json scaling_to_json(const std::optional<RopeScaling>& scaling) {
  if (!scaling) return nullptr;
  json out = {{"type", scaling->type}, {"factor", scaling->factor}};
  if (scaling->type == "llama3") {
    out["low_freq_factor"] = scaling->low_freq_factor;
    out["high_freq_factor"] = scaling->high_freq_factor;
    out["original_context"] = scaling->original_context;
  }
  return out;
}

RopeScaling scaling_from_json(JsonObject object) {
  RopeScaling scaling;
  scaling.type = object.choice("type", kScalingTypes);
  scaling.factor = object.number("factor", kLeastFactor);
  if (scaling.type == "llama3") {
    scaling.low_freq_factor = object.number("low_freq_factor", kLeastFactor);
    scaling.high_freq_factor = object.number("high_freq_factor", kLeastFactor);
    scaling.original_context = object.integer("original_context", 1);
  }
  object.finish();
  return scaling;
}

RopeSpec rope_from_json(JsonObject object) {
  RopeSpec rope;
  rope.style = object.choice("style", kRopeStyles);
  rope.base = object.number("base", kLeastFactor);
  if (auto scaling = object.object_or_null("scaling")) rope.scaling = scaling_from_json(*scaling);
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
  return {{"architecture", model.architecture},
          {"num_layers", model.num_layers},
          {"query_heads", model.query_heads},
          {"kv_heads", model.kv_heads},
          {"head_dim", model.head_dim},
          {"rotary_dim", model.rotary_dim},
          {"rope",
           {{"style", model.rope.style},
            {"base", model.rope.base},
            {"scaling", scaling_to_json(model.rope.scaling)}}},
          {"container", text_or_null(model.container)},
          {"kv_weights_sha256", text_or_null(model.kv_weights_sha256)}};
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
  model.rope = rope_from_json(object.object("rope"));
  model.container = object.choice_or_null("container", kContainers);
  model.kv_weights_sha256 = object.sha256_or_null("kv_weights_sha256");
  object.finish();
  return model;
}

void require_same_model(const ModelSpec& expected, const ModelSpec& found, const std::string& file,
                        bool allow_other_weights) {
  const json left = model_to_json(expected), right = model_to_json(found);
  for (const char* field : {"architecture", "num_layers", "query_heads", "kv_heads", "head_dim",
                            "rotary_dim", "rope"}) {
    require_equal(field, left[field], right[field], file);
  }
  if (allow_other_weights) return;
  for (const char* field : {"container", "kv_weights_sha256"})
    require_equal(field, left[field], right[field], file);
}

}  // namespace kvplan
