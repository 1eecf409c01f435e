#include "models/hf_config.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <string>

#include "models/file_model.h"
#include "models/hf_fields.h"

namespace kvplan::models {

using nlohmann::json;

namespace {

constexpr const char* kFullAttention = "full_attention";
constexpr const char* kSlidingAttention = "sliding_attention";
constexpr std::size_t kMaxJsonBytes = std::size_t{64} << 20;

void check_fixed(const HfObject& fields, std::span<const HfFixed> all) {
  for (const auto& [field, required] : all) {
    const auto* found = fields.find(field);
    if (!found || *found == json::parse(required)) continue;
    fields.fail(field, std::string("only ") + required + " is supported, found " +
                           found->dump().substr(0, kShownCharacters));
  }
}

/// null is `none`, absent is `otherwise`.
double optional_number(const HfObject& fields, const char* name, double otherwise) {
  return fields.contains(name) ? fields.number_or(name, 0) : otherwise;
}

// ---- Rotary embedding ----

/// What a rotary scaling may take from outside its object.
struct RopeContext {
  std::int64_t max_context = 0;
  std::int64_t original_context = 0;  // 0: not given
};

double factor_or_ratio(const HfObject& rope, const RopeContext& context,
                       std::int64_t original_context) {
  return rope.number_or(
      "factor", static_cast<double>(context.max_context) / static_cast<double>(original_context));
}

std::int64_t original_context(const HfObject& rope, const RopeContext& context) {
  const std::int64_t outside =
      context.original_context ? context.original_context : context.max_context;
  // A value beside the object has precedence in transformers.
  const int inside =
      rope.size_or("original_max_position_embeddings", static_cast<int>(outside), kMaxContext);
  return context.original_context ? context.original_context : inside;
}

RopeScaling read_llama3(const HfObject& rope) {
  RopeScaling scaling{
      .type = "llama3",
      .factor = rope.number("factor"),
      .low_freq_factor = rope.number("low_freq_factor"),
      .high_freq_factor = rope.number("high_freq_factor"),
      .original_context = rope.size("original_max_position_embeddings", kMaxContext)};
  if (!(scaling.low_freq_factor > 0 && scaling.high_freq_factor > scaling.low_freq_factor)) {
    rope.fail("high_freq_factor", "expected a value above low_freq_factor, and that above 0");
  }
  return scaling;
}

RopeScaling read_yarn(const HfObject& rope, const RopeContext& context) {
  RopeScaling scaling{.type = "yarn", .original_context = original_context(rope, context)};
  scaling.factor = factor_or_ratio(rope, context, scaling.original_context);
  scaling.beta_fast = rope.number_or("beta_fast", scaling.beta_fast);
  scaling.beta_slow = rope.number_or("beta_slow", scaling.beta_slow);
  if (!(scaling.beta_slow > 0 && scaling.beta_fast >= scaling.beta_slow &&
        std::isfinite(scaling.beta_fast)))
    rope.fail("beta_fast", "expected a value of at least beta_slow, and that above 0");
  scaling.truncate = rope.flag_or("truncate", true);
  const auto growth = [&](double weight) {
    return scaling.factor <= 1 ? 1.0 : 0.1 * weight * std::log(scaling.factor) + 1;
  };
  const double mscale = rope.number_or("mscale", 0), all = rope.number_or("mscale_all_dim", 0);
  scaling.attention_factor = rope.number_or(
      "attention_factor", mscale != 0 && all != 0 ? growth(mscale) / growth(all) : growth(1));
  return scaling;
}

RopeScaling read_longrope(const HfObject& rope, const RopeContext& context) {
  RopeScaling scaling{.type = "longrope", .original_context = original_context(rope, context)};
  scaling.factor = factor_or_ratio(rope, context, scaling.original_context);
  scaling.short_factors = rope.numbers("short_factor");
  scaling.long_factors = rope.numbers("long_factor");
  const double growth =
      scaling.factor <= 1
          ? 1
          : std::sqrt(1 + std::log(scaling.factor) /
                              std::log(static_cast<double>(scaling.original_context)));
  scaling.attention_factor = rope.number_or("attention_factor", growth);
  return scaling;
}

/// `rope`: the object rope_parameters (transformers 5) or rope_scaling (before).
std::optional<RopeScaling> read_scaling(const HfObject& rope, const RopeContext& context) {
  const char* name = rope.find("rope_type") ? "rope_type" : "type";
  const auto type = rope.text(name);
  if (rope.find("rope_type")) rope.find("type");  // written beside it, for old programs
  std::optional<RopeScaling> scaling;
  if (type == "default") {
    return std::nullopt;
  } else if (type == "linear") {
    scaling = RopeScaling{.type = type, .factor = rope.number("factor")};
  } else if (type == "dynamic") {
    scaling = RopeScaling{
        .type = type, .factor = rope.number("factor"), .original_context = context.max_context};
  } else if (type == "llama3") {
    scaling = read_llama3(rope);
  } else if (type == "yarn") {
    scaling = read_yarn(rope, context);
  } else if (type == "longrope" || type == "su") {  // "su": its first name
    scaling = read_longrope(rope, context);
  } else {
    rope.fail(name, "the rotary scaling \"" + type +
                        "\" is not supported; supported are default, linear, dynamic, llama3, yarn "
                        "and longrope");
  }
  if (!(std::isfinite(scaling->factor) && scaling->factor > 0))
    rope.fail("factor", "expected a factor above 0");
  return scaling;
}

/// One object of rotary settings; `rope` comes with the defaults.
void read_rope_object(const HfObject& object, const RopeContext& context, bool partial,
                      RopeSpec& rope, double& partial_factor) {
  if (partial) {
    partial_factor = object.number_or("partial_rotary_factor", partial_factor);
  } else {
    constexpr HfFixed kWholeHead[] = {{"partial_rotary_factor", "1"}};
    check_fixed(object, kWholeHead);
  }
  rope.base = object.number_or("rope_theta", rope.base);
  rope.scaling = read_scaling(object, context);
  object.finish([](std::string_view) { return false; });
}

void read_rope(const HfObject& fields, const Family& family, ModelConfig& c) {
  if (c.rope.style == "none") return;
  if (fields.find("rope_scaling") && fields.find("rope_parameters")) {
    fields.fail("rope_scaling", "expected this or rope_parameters, found both");
  }
  const bool partial = family.hf_partial_rotary > 0;
  if (!partial) {
    constexpr HfFixed kWholeHead[] = {{"partial_rotary_factor", "1"}};
    check_fixed(fields, kWholeHead);
  }
  double partial_factor =
      partial ? fields.number_or("partial_rotary_factor", family.hf_partial_rotary) : 1;
  const RopeContext context{
      .max_context = c.max_context,
      .original_context = fields.find("original_max_position_embeddings")
                              ? fields.size("original_max_position_embeddings", kMaxContext)
                              : 0};
  const auto read = [&](const HfObject& object, RopeSpec& rope) {
    read_rope_object(object, context, partial, rope, partial_factor);
  };
  c.rope.base = fields.number_or("rope_theta", c.rope.base);
  if (c.local_rope)
    c.local_rope->base = fields.number_or("rope_local_base_freq", c.local_rope->base);
  if (fields.find("rope_scaling")) read(fields.object("rope_scaling"), c.rope);
  if (fields.find("rope_parameters")) {
    const auto parameters = fields.object("rope_parameters");
    if (c.local_rope && parameters.find(kFullAttention)) {
      read(parameters.object(kFullAttention), c.rope);
      if (parameters.find(kSlidingAttention))
        read(parameters.object(kSlidingAttention), *c.local_rope);
      parameters.finish([](std::string_view) { return false; });
    } else {
      read(parameters, c.rope);
    }
  }
  c.rotary_dim = static_cast<int>(std::clamp(c.head_dim * partial_factor, 0.0, 1.0 * kMaxWidth));
}

// ---- Windows ----

/// The list layer_types of transformers 5.
std::vector<int> listed_windows(const HfObject& fields, const ModelConfig& c, int window) {
  const json& types = *fields.find("layer_types");
  if (!types.is_array() || std::ssize(types) != c.num_layers)
    fields.fail("layer_types", "expected one name per layer, " + std::to_string(c.num_layers));
  std::vector<int> windows;
  for (const json& type : types) {
    const bool slides = type == kSlidingAttention;
    if (!slides && type != kFullAttention)
      fields.fail("layer_types",
                  "only \"full_attention\" and \"sliding_attention\" are supported, "
                  "found " +
                      type.dump().substr(0, kShownCharacters));
    if (slides && window == 0)
      fields.fail("layer_types", "found \"sliding_attention\" in a model without a window");
    windows.push_back(slides ? window : 0);
  }
  const bool any = std::ranges::any_of(windows, [](int w) { return w > 0; });
  return any ? windows : std::vector<int>();
}

std::vector<int> read_windows(const HfObject& fields, const Family& family, const ModelConfig& c) {
  int window = 0, first = 0, period = family.window_period;
  if (family.window_rule != WindowRule::kNone) {
    // null is no window, absent is the default.
    window =
        fields.size_or("sliding_window",
                       fields.contains("sliding_window") ? 0 : family.window_default, kMaxContext);
  }
  if (family.window_rule == WindowRule::kUpper) {
    first = fields.size_or("max_window_layers", family.window_first, kMaxLayers, /*least=*/0);
    if (!fields.flag_or("use_sliding_window", false)) window = 0;
  }
  if (family.window_rule == WindowRule::kPeriodic)
    for (const char* name : {"sliding_window_pattern", "_sliding_window_pattern"})
      period = fields.size_or(name, period, kMaxLayers);
  const auto by_rule = windows_by_rule(family.window_rule, c.num_layers, window, period, first);
  if (!fields.find("layer_types")) return by_rule;
  const auto listed = listed_windows(fields, c, window);
  // Mistral's forward in transformers does not look at the list.
  if (family.window_rule == WindowRule::kAll && listed != by_rule)
    fields.fail("layer_types", "expected a window in every layer, as sliding_window says");
  return listed;
}

// ---- The rest ----

Activation read_activation(const HfObject& fields, const Family& family) {
  const char* name = family.hf.activation;
  if (!fields.find(name)) return family.hf_activations.front().second;
  const auto text = fields.text(name);
  std::string known;
  for (const auto& [own, activation] : family.hf_activations) {
    if (own == text) return activation;
    known += (known.empty() ? "\"" : ", \"") + std::string(own) + "\"";
  }
  fields.fail(name, "only " + known + " is supported, found \"" + text + "\"");
}

int read_head_dim(const HfObject& fields, const Family& family, const ModelConfig& c) {
  const int otherwise =
      family.traits.head_dim ? family.traits.head_dim : c.hidden_size / c.query_heads;
  if (!fields.find("head_dim") && !family.traits.head_dim && c.hidden_size % c.query_heads != 0) {
    fields.fail(family.hf.query_heads,
                "the hidden size " + std::to_string(c.hidden_size) + " is no multiple of the " +
                    std::to_string(c.query_heads) + " heads, and there is no head_dim");
  }
  return fields.size_or("head_dim", otherwise, kMaxWidth);
}

void read_sizes(const HfObject& fields, const Family& family, ModelConfig& c) {
  const HfFields& names = family.hf;
  c.num_layers = fields.size(names.num_layers, kMaxLayers);
  c.hidden_size = fields.size(names.hidden_size, kMaxWidth);
  c.intermediate_size = family.hf_inner_default == 0
                            ? fields.size(names.intermediate_size, kMaxWidth)
                            : fields.size_or(names.intermediate_size,
                                             family.hf_inner_default * c.hidden_size, kMaxWidth);
  c.vocab_size = fields.size("vocab_size", kMaxWidth);
  c.query_heads = fields.size(names.query_heads, kMaxWidth);
  c.kv_heads =
      names.kv_heads ? fields.size_or(names.kv_heads, c.query_heads, kMaxWidth) : c.query_heads;
  c.head_dim = read_head_dim(fields, family, c);
  c.max_context = fields.size(names.max_context, kMaxContext);
}

ModelConfig read_config(const HfObject& fields, const Family& family) {
  check_fixed(fields, common_hf_fixed());
  check_fixed(fields, family.hf_fixed);
  ModelConfig c = family.traits;
  c.architecture = family.name;
  c.container = "hf";
  read_sizes(fields, family, c);
  read_rope(fields, family, c);
  c.windows = read_windows(fields, family, c);
  c.norm_epsilon = fields.number(family.hf.norm_epsilon);
  c.activation = read_activation(fields, family);
  c.tied_embeddings = fields.flag_or("tie_word_embeddings", c.tied_embeddings);
  if (family.optional_bias && fields.flag_or("attention_bias", false))
    c.qkv_bias = c.output_bias = true;
  if (family.scales_embedding) c.embedding_scale = std::sqrt(c.hidden_size);
  if (family.hf_query_scalar) {
    const double scalar =
        fields.number_or("query_pre_attn_scalar", 1 / (c.attention_scale * c.attention_scale));
    if (!(scalar > 0)) fields.fail("query_pre_attn_scalar", "expected a number above 0");
    c.attention_scale = 1 / std::sqrt(scalar);
  }
  if (family.soft_caps) {
    c.attention_soft_cap = optional_number(fields, "attn_logit_softcapping", c.attention_soft_cap);
    c.logit_soft_cap = optional_number(fields, "final_logit_softcapping", c.logit_soft_cap);
  }
  fields.finish(is_harmless_hf_field);
  return c;
}

}  // namespace

json parse_hf_json(const std::filesystem::path& path) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  if (bytes.size() > kMaxJsonBytes) {
    throw InputError(path.string(), "",
                     "expected at most " + std::to_string(kMaxJsonBytes) +
                         " bytes of JSON, found " + std::to_string(bytes.size()));
  }
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  try {
    return json::parse(text, text + bytes.size());
  } catch (const json::exception& e) {
    throw InputError(path.string(), "", std::string("no valid JSON: ") + e.what());
  }
}

HfConfig read_hf_config(const std::filesystem::path& file) {
  const json document = parse_hf_json(file);
  const HfObject fields(document, file.string());
  const Family& family = find_hf_family(fields.text("model_type"), file.string());
  return {&family, read_config(fields, family)};
}

}  // namespace kvplan::models
