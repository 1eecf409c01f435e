// Configuration and tensors of a GGUF file, keys as llama.cpp writes them.

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <utility>

#include "models/dequantize.h"
#include "models/families.h"
#include "models/file_model.h"
#include "schemas/error.h"

namespace kvplan::models {
namespace {

constexpr const char* kRopeFactors = "rope_freqs.weight";
constexpr const char* kShortFactors = "rope_factors_short.weight";
constexpr const char* kLongFactors = "rope_factors_long.weight";
// Meta's values, the same in all Llama 3.x models; a GGUF file keeps only the factors that follow
// from them.
constexpr double kLlama3LowFreqFactor = 1, kLlama3HighFreqFactor = 4;
constexpr std::int64_t kLlama3OriginalContext = 8192;
constexpr double kDefaultBase = 10000;     // llama.cpp's, also of layers with a window
constexpr double kFactorTolerance = 1e-4;  // relative; the file holds float32

/// Typed look-ups of "{architecture}.{name}". Whatever is looked up is known; finish() refuses the
/// rest.
class Keys {
 public:
  explicit Keys(const GgufFile& gguf)
      : gguf_(gguf), prefix_(gguf.string("general.architecture") + ".") {}

  std::string full(std::string_view name) const {
    known_.emplace(name);
    return std::string(prefix_).append(name);
  }
  bool has(std::string_view name) const { return gguf_.has(full(name)); }

  int size(std::string_view name, std::int64_t max) const {
    return checked(name, gguf_.integer(full(name)), max);
  }
  int size_or(std::string_view name, std::int64_t otherwise, std::int64_t max,
              std::int64_t least = 1) const {
    return checked(name, gguf_.integer_or(full(name), otherwise), max, least);
  }
  double number(std::string_view name) const { return gguf_.number(full(name)); }
  double number_or(std::string_view name, double otherwise) const {
    return gguf_.number_or(full(name), otherwise);
  }
  std::string string_or(std::string_view name, std::string otherwise) const {
    return gguf_.string_or(full(name), std::move(otherwise));
  }
  bool boolean_or(std::string_view name, bool otherwise) const {
    return gguf_.boolean_or(full(name), otherwise);
  }
  /// Refuses what nobody looked up: it may change the forward pass.
  void finish() const {
    for (const auto& [key, value] : gguf_.metadata()) {
      if (!key.starts_with(prefix_)) continue;
      const auto name = std::string_view(key).substr(prefix_.size());
      if (!known_.contains(name) && !is_harmless_gguf_key(name))
        fail(name, "kvplan does not know this key, which may change what the model computes");
    }
  }

  [[noreturn]] void fail(std::string_view name, const std::string& message) const {
    throw InputError(gguf_.file().path().string(), full(name), message);
  }

 private:
  int checked(std::string_view name, std::int64_t value, std::int64_t max,
              std::int64_t least = 1) const {
    if (value < least || value > max) {
      fail(name, "expected " + std::to_string(least) + " to " + std::to_string(max) + ", found " +
                     std::to_string(value));
    }
    return static_cast<int>(value);
  }

  const GgufFile& gguf_;
  std::string prefix_;
  mutable std::set<std::string, std::less<>> known_;
};

void check_fixed(const Keys& keys, std::span<const GgufFixed> all) {
  for (const auto& [key, required] : all) {
    if (!keys.has(key)) continue;
    if (const auto* flag = std::get_if<bool>(&required)) {
      if (keys.boolean_or(key, *flag) != *flag) {
        keys.fail(key, std::string("only ") + (*flag ? "true" : "false") + " is supported");
      }
    } else if (const double found = keys.number(key); found != std::get<double>(required)) {
      keys.fail(key, "only " + std::to_string(std::get<double>(required)) +
                         " is supported, found " + std::to_string(found));
    }
  }
}

double scaling_factor(const Keys& keys) {
  // rope.scale_linear is the older name.
  const double factor =
      keys.number_or("rope.scaling.factor", keys.number_or("rope.scale_linear", 0));
  if (!std::isfinite(factor) || factor < 0) {
    keys.fail("rope.scaling.factor", "expected a factor above 0, found " + std::to_string(factor));
  }
  return factor == 0 ? 1 : factor;
}

/// As ggml_rope does it with ext_factor 1, which llama.cpp takes for this type.
RopeScaling yarn_scaling(const Keys& keys, const ModelConfig& config) {
  constexpr GgufFixed kFixed[] = {{"rope.scaling.yarn_ext_factor", 1.0},
                                  {"rope.scaling.yarn_attn_factor", 1.0},
                                  {"rope.scaling.yarn_log_multiplier", 0.0}};
  check_fixed(keys, kFixed);
  RopeScaling scaling{
      .type = "yarn",
      .factor = scaling_factor(keys),
      .original_context = keys.size_or("rope.scaling.original_context_length",
                                       static_cast<int>(config.max_context), kMaxContext)};
  scaling.beta_fast = keys.number_or("rope.scaling.yarn_beta_fast", scaling.beta_fast);
  scaling.beta_slow = keys.number_or("rope.scaling.yarn_beta_slow", scaling.beta_slow);
  if (!(scaling.beta_slow > 0 && scaling.beta_fast >= scaling.beta_slow &&
        std::isfinite(scaling.beta_fast)))
    keys.fail("rope.scaling.yarn_beta_fast", "expected at least yarn_beta_slow, and that above 0");
  if (scaling.factor > 1) scaling.attention_factor = 1 + 0.1 * std::log(scaling.factor);
  return scaling;
}

std::vector<double> rotary_factors(StoredTensors& tensors, const char* name,
                                   const ModelConfig& config, const std::string& file) {
  const auto found = tensors.extract(name);
  if (!found) throw InputError(file, name, "expected the rotary factors of longrope, found none");
  const StoredTensor& tensor = found.mapped();
  std::vector<float> factors(static_cast<std::size_t>(config.rotary_dim / 2));
  if (tensor.shape != std::vector<std::int64_t>{config.rotary_dim / 2})
    throw InputError(file, name, "expected " + std::to_string(factors.size()) + " rotary factors");
  read_values(tensor, factors);
  return {factors.begin(), factors.end()};
}

/// llama.cpp takes the factors of long sequences where the cache has room for more tokens than
/// original_context_length; here, as in transformers, the length of the sequence decides.
RopeScaling longrope_scaling(const Keys& keys, const ModelConfig& config, StoredTensors& tensors,
                             const std::string& file) {
  return {.type = "longrope",
          .factor = scaling_factor(keys),
          .original_context = keys.size("rope.scaling.original_context_length", kMaxContext),
          .attention_factor = keys.number_or("rope.scaling.attn_factor", 1),
          .short_factors = rotary_factors(tensors, kShortFactors, config, file),
          .long_factors = rotary_factors(tensors, kLongFactors, config, file)};
}

std::optional<RopeScaling> read_scaling(const Keys& keys, const ModelConfig& config,
                                        StoredTensors& tensors, const std::string& file) {
  const auto type = keys.string_or("rope.scaling.type", "linear");  // llama.cpp's default
  if (type == "longrope" || tensors.contains(kLongFactors))
    return longrope_scaling(keys, config, tensors, file);
  constexpr GgufFixed kFixed[] = {{"rope.scaling.attn_factor", 1.0}};
  check_fixed(keys, kFixed);
  if (type == "yarn") return yarn_scaling(keys, config);
  if (type != "none" && type != "linear") {
    keys.fail("rope.scaling.type",
              "the rotary scaling \"" + type +
                  "\" is not supported; supported are none, linear, yarn and longrope");
  }
  const double factor = scaling_factor(keys);
  if (type == "none" || factor == 1) return std::nullopt;
  return RopeScaling{.type = "linear", .factor = factor};
}

/// The scaling behind rope_freqs.weight, whose values divide the frequencies. The largest is Llama
/// 3's factor; the others must follow from it.
RopeScaling llama3_scaling(const Keys& keys, ModelConfig config, const StoredTensor& tensor) {
  const auto fail = [&](const std::string& message) {
    throw InputError(tensor.file->path().string(), tensor.stored_name, message);
  };
  const auto half = static_cast<std::size_t>(config.rotary_dim / 2);
  if (tensor.shape != std::vector<std::int64_t>{config.rotary_dim / 2}) {
    fail("expected " + std::to_string(half) + " rotary factors");
  }
  if (config.rope.scaling) fail("found rotary factors beside rope.scaling; only one is supported");
  std::vector<float> factors(half);
  read_values(tensor, factors);

  config.rope.scaling.reset();
  const auto plain = rotary_frequencies(config);
  config.rope.scaling = {.type = "llama3",
                         .factor = *std::ranges::max_element(factors),
                         .low_freq_factor = kLlama3LowFreqFactor,
                         .high_freq_factor = kLlama3HighFreqFactor,
                         .original_context = keys.size_or("rope.scaling.original_context_length",
                                                          kLlama3OriginalContext, kMaxContext)};
  const auto scaled = rotary_frequencies(config);
  for (std::size_t j = 0; j < half; ++j) {
    const double expected = plain[j] / scaled[j];
    if (!(std::abs(factors[j] - expected) <= kFactorTolerance * expected)) {
      fail("the rotary factors are not those of Llama 3 scaling: expected " +
           std::to_string(expected) + " at element " + std::to_string(j) + ", found " +
           std::to_string(factors[j]));
    }
  }
  return *config.rope.scaling;
}

StoredTensors stored_tensors(const std::shared_ptr<const GgufFile>& gguf) {
  const std::shared_ptr<const MappedFile> file(gguf, &gguf->file());
  StoredTensors tensors;
  for (const auto& [name, tensor] : gguf->tensors()) {
    if (!ggml_block(tensor.type)) {
      throw InputError(file->path().string(), name,
                       "the ggml tensor type " + std::to_string(tensor.type) +
                           " is not supported; supported are F32, F16, BF16, Q4_0 to Q8_0, Q2_K to "
                           "Q6_K and IQ4_NL");
    }
    tensors.emplace(name, StoredTensor{.stored_name = name,
                                       .file = file,
                                       .type = static_cast<GgmlType>(tensor.type),
                                       .shape = tensor.shape,
                                       .data = tensor.data});
  }
  return tensors;
}

/// Marks the rows of attn_q and attn_k (weights and biases) as interleaved.
void mark_interleaved(StoredTensors& tensors, const ModelConfig& config) {
  for (int layer = 0; layer < config.num_layers; ++layer) {
    for (const auto& [part, heads] :
         {std::pair{".attn_q.", config.query_heads}, {".attn_k.", config.kv_heads}}) {
      for (const char* kind : {"weight", "bias"}) {
        const auto found = tensors.find("blk." + std::to_string(layer) + part + kind);
        if (found == tensors.end()) continue;
        auto& tensor = found->second;
        const bool moves_elements = tensor.shape.size() == 1;
        if (moves_elements && ggml_block(static_cast<std::uint32_t>(tensor.type))->elements > 1) {
          throw InputError(tensor.file->path().string(), tensor.stored_name,
                           "expected a bias in F32, F16 or BF16, found a block format");
        }
        tensor.interleaved_heads = heads;
      }
    }
  }
}

/// Rows of the gate, then of up, under a name that says so.
void rename_fused_gates(StoredTensors& tensors, const ModelConfig& config) {
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    auto fused = tensors.extract(prefix + "ffn_up.weight");
    if (!fused) continue;
    fused.key() = prefix + "ffn_gate_up.weight";
    tensors.insert(std::move(fused));
  }
}

void read_sizes(const Keys& keys, ModelConfig& c) {
  c.num_layers = keys.size("block_count", kMaxLayers);
  c.hidden_size = keys.size("embedding_length", kMaxWidth);
  c.intermediate_size = keys.size("feed_forward_length", kMaxWidth);
  c.query_heads = keys.size("attention.head_count", kMaxWidth);
  c.kv_heads = keys.size_or("attention.head_count_kv", c.query_heads, kMaxWidth);
  if (!keys.has("attention.key_length") && c.hidden_size % c.query_heads != 0) {
    keys.fail("attention.head_count",
              "the hidden size " + std::to_string(c.hidden_size) + " is no multiple of the " +
                  std::to_string(c.query_heads) + " heads, and there is no attention.key_length");
  }
  c.head_dim = keys.size_or("attention.key_length", c.hidden_size / c.query_heads, kMaxWidth);
  if (keys.size_or("attention.value_length", c.head_dim, kMaxWidth) != c.head_dim) {
    keys.fail("attention.value_length", "keys and values of different sizes are not supported");
  }
  c.max_context = keys.size("context_length", kMaxContext);
}

void read_rope(const Keys& keys, const Family& family, StoredTensors& tensors,
               const std::string& file, ModelConfig& c) {
  if (c.rope.style == "none") return;
  c.rotary_dim = keys.size_or("rope.dimension_count", c.head_dim, kMaxWidth);
  if (family.gguf_interleaves_rotary && c.rotary_dim != c.head_dim)
    keys.fail("rope.dimension_count",
              "expected rotary embedding of all " + std::to_string(c.head_dim) +
                  " channels of a head, found " + std::to_string(c.rotary_dim));
  c.rope.base = keys.number_or("rope.freq_base", kDefaultBase);
  if (c.local_rope) c.local_rope->base = keys.number_or("rope.freq_base_swa", kDefaultBase);
  c.rope.scaling = read_scaling(keys, c, tensors, file);
  if (const auto factors = tensors.extract(kRopeFactors))
    c.rope.scaling = llama3_scaling(keys, c, factors.mapped());
}

std::vector<int> read_windows(const Keys& keys, const Family& family, const ModelConfig& c) {
  constexpr const char* kWindow = "attention.sliding_window";
  if (family.window_rule != WindowRule::kAll && family.window_rule != WindowRule::kPeriodic) {
    constexpr GgufFixed kFixed[] = {{kWindow, 0.0}};
    check_fixed(keys, kFixed);
    return {};
  }
  return windows_by_rule(family.window_rule, c.num_layers,
                         keys.size_or(kWindow, family.window_default, kMaxContext, /*least=*/0),
                         keys.size_or("attention.sliding_window_pattern",
                                      std::max(family.window_period, 1), kMaxLayers),
                         0);
}

/// Scores and logits; what llama.cpp knows of a family by its name and number of layers.
void read_scales(const Keys& keys, const Family& family, ModelConfig& c) {
  if (c.attention_scale != 0) {
    const bool wide = c.num_layers == family.gguf_wide_scale_layers;
    c.attention_scale = 1 / std::sqrt(wide ? c.hidden_size / c.query_heads : c.head_dim);
  }
  if (family.scales_embedding) c.embedding_scale = std::sqrt(c.hidden_size);
  if (family.soft_caps) {
    c.attention_soft_cap = keys.number_or("attn_logit_softcapping", c.attention_soft_cap);
    c.logit_soft_cap = keys.number_or("final_logit_softcapping", c.logit_soft_cap);
  }
}

}  // namespace

StoredModel read_gguf_model(const std::filesystem::path& path) {
  const auto gguf = std::make_shared<const GgufFile>(path);
  const auto& family = find_gguf_family(gguf->string("general.architecture"), path.string());
  const Keys keys(*gguf);
  check_fixed(keys, common_gguf_fixed());
  check_fixed(keys, family.gguf_fixed);

  StoredModel model{.path = path, .config = family.traits, .tensors = stored_tensors(gguf)};
  auto& c = model.config;
  c.architecture = family.name;
  c.container = "gguf";
  read_sizes(keys, c);
  c.norm_epsilon = keys.number(c.norm == NormKind::kRms ? "attention.layer_norm_rms_epsilon"
                                                        : "attention.layer_norm_epsilon");
  read_rope(keys, family, model.tensors, path.string(), c);
  c.windows = read_windows(keys, family, c);
  read_scales(keys, family, c);
  keys.finish();

  const auto embedding = model.tensors.find("token_embd.weight");
  if (embedding == model.tensors.end() || embedding->second.shape.size() != 2) {
    throw InputError(
        path.string(), "token_embd.weight",
        "expected a matrix [vocabulary, " + std::to_string(c.hidden_size) + "], found none");
  }
  c.vocab_size = static_cast<int>(std::min(embedding->second.shape.front(), kMaxWidth));
  c.tied_embeddings = !model.tensors.contains("output.weight");
  if (family.optional_bias) {
    c.qkv_bias = c.qkv_bias || model.tensors.contains("blk.0.attn_k.bias");
    c.output_bias = c.output_bias || model.tensors.contains("blk.0.attn_output.bias");
  }
  if (family.gguf_interleaves_rotary) mark_interleaved(model.tensors, c);
  if (family.gguf_fused_gate) rename_fused_gates(model.tensors, c);
  return model;
}

}  // namespace kvplan::models
