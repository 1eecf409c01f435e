#include "models/families.h"

#include <algorithm>
#include <array>

#include "schemas/error.h"

namespace kvplan::models {
namespace {

// ---- Tensor names ----

constexpr NamePair kLlamaModel[] = {
    {"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}};
constexpr NamePair kLlamaLayer[] = {
    {"input_layernorm", "attn_norm"},    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},      {"self_attn.v_proj", "attn_v"},
    {"self_attn.q_norm", "attn_q_norm"}, {"self_attn.k_norm", "attn_k_norm"},
    {"self_attn.o_proj", "attn_output"}, {"post_attention_layernorm", "ffn_norm"},
    {"mlp.gate_proj", "ffn_gate"},       {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"}};
constexpr NamePair kGemmaPostNormLayer[] = {{"input_layernorm", "attn_norm"},
                                            {"self_attn.q_proj", "attn_q"},
                                            {"self_attn.k_proj", "attn_k"},
                                            {"self_attn.v_proj", "attn_v"},
                                            {"self_attn.q_norm", "attn_q_norm"},
                                            {"self_attn.k_norm", "attn_k_norm"},
                                            {"self_attn.o_proj", "attn_output"},
                                            {"post_attention_layernorm", "post_attention_norm"},
                                            {"pre_feedforward_layernorm", "ffn_norm"},
                                            {"post_feedforward_layernorm", "post_ffw_norm"},
                                            {"mlp.gate_proj", "ffn_gate"},
                                            {"mlp.up_proj", "ffn_up"},
                                            {"mlp.down_proj", "ffn_down"}};
constexpr NamePair kPhi2Model[] = {{"model.embed_tokens", "token_embd"},
                                   {"model.final_layernorm", "output_norm"},
                                   {"lm_head", "output"}};
constexpr NamePair kPhi2Layer[] = {{"input_layernorm", "attn_norm"},
                                   {"self_attn.q_proj", "attn_q"},
                                   {"self_attn.k_proj", "attn_k"},
                                   {"self_attn.v_proj", "attn_v"},
                                   {"self_attn.dense", "attn_output"},
                                   {"mlp.fc1", "ffn_up"},
                                   {"mlp.fc2", "ffn_down"}};
constexpr NamePair kPhi3Layer[] = {
    {"input_layernorm", "attn_norm"},    {"self_attn.qkv_proj", "attn_qkv"},
    {"self_attn.o_proj", "attn_output"}, {"post_attention_layernorm", "ffn_norm"},
    {"mlp.gate_up_proj", "ffn_gate_up"}, {"mlp.down_proj", "ffn_down"}};
constexpr NamePair kGpt2Model[] = {{"wte", "token_embd"},
                                   {"wpe", "position_embd"},
                                   {"ln_f", "output_norm"},
                                   {"lm_head", "output"}};
constexpr NamePair kGpt2Layer[] = {{"ln_1", "attn_norm"},          {"attn.c_attn", "attn_qkv"},
                                   {"attn.c_proj", "attn_output"}, {"ln_2", "ffn_norm"},
                                   {"mlp.c_fc", "ffn_up"},         {"mlp.c_proj", "ffn_down"}};

// Old checkpoints keep the frequencies that follow from config.json, and GPT-2 its causal mask.
constexpr const char* kFrequencies[] = {"rotary_emb.inv_freq"};
constexpr const char* kMasks[] = {".attn.bias", ".attn.masked_bias"};

constexpr HfTensorNames kLlamaNames = {"model.layers.", "", kLlamaModel, kLlamaLayer, kFrequencies};
constexpr HfTensorNames kGemmaPostNormNames = {"model.layers.", "", kLlamaModel,
                                               kGemmaPostNormLayer, kFrequencies};
constexpr HfTensorNames kPhi2Names = {"model.layers.", "", kPhi2Model, kPhi2Layer, kFrequencies};
constexpr HfTensorNames kPhi3Names = {"model.layers.", "", kLlamaModel, kPhi3Layer, kFrequencies};
constexpr HfTensorNames kGpt2Names = {"h.", "transformer.", kGpt2Model, kGpt2Layer, kMasks};

// ---- Families ----

const std::vector<std::pair<const char*, Activation>> kPhi2Activations = {
    {"gelu_new", Activation::kGeluTanh},
    {"gelu_pytorch_tanh", Activation::kGeluTanh},
    {"gelu", Activation::kGelu}};
// In Gemma's first files "gelu" means the approximation by tanh (transformers reads it so).
const std::vector<std::pair<const char*, Activation>> kGemmaActivations = {
    {"gelu_pytorch_tanh", Activation::kGeluTanh}, {"gelu", Activation::kGeluTanh}};
constexpr RopeSpec make_rope(double base) { return {.style = "half", .base = base, .scaling = {}}; }

const std::vector<Family>& families() {
  static const std::vector<Family> kFamilies = {
      {.name = "llama",
       .hf_name = "llama",
       .gguf_name = "llama",
       .traits = {},
       .optional_bias = true,
       .hf_tensors = &kLlamaNames,
       .hf_fixed = {{"mlp_bias", "false"}, {"rope_interleaved", "false"}},
       .gguf_interleaves_rotary = true},
      {.name = "mistral",
       .hf_name = "mistral",
       .gguf_name = nullptr,  // llama.cpp writes "llama" and leaves the window out
       .traits = {},
       .window_rule = WindowRule::kAll,
       .window_default = 4096,
       .hf_tensors = &kLlamaNames},
      {.name = "qwen2",
       .hf_name = "qwen2",
       .gguf_name = "qwen2",
       .traits = {.qkv_bias = true},
       .window_rule = WindowRule::kUpper,
       .window_default = 4096,
       .window_first = 28,
       .hf_tensors = &kLlamaNames,
       .hf_fixed = {{"use_mrope", "false"}}},
      {.name = "qwen3",
       .hf_name = "qwen3",
       .gguf_name = "qwen3",
       .traits = {.head_dim = 128, .head_norms = true},
       .optional_bias = true,
       .window_rule = WindowRule::kUpper,
       .window_default = 4096,
       .window_first = 28,
       .hf_tensors = &kLlamaNames},
      {.name = "gemma",
       .hf_name = "gemma",
       .gguf_name = "gemma",
       .traits = {.head_dim = 256, .activation = Activation::kGeluTanh, .tied_embeddings = true},
       .optional_bias = true,
       .scales_embedding = true,
       .hf_tensors = &kLlamaNames,
       .hf_norm_offset = 1,
       .hf_activations = kGemmaActivations,
       .hf_fixed = {{"hidden_activation", "\"gelu_pytorch_tanh\""},
                    {"use_bidirectional_attention", "false"}}},
      {.name = "gemma2",
       .hf_name = "gemma2",
       .gguf_name = "gemma2",
       .traits = {.head_dim = 256,
                  .attention_scale = 1.0 / 16,
                  .attention_soft_cap = 50,
                  .logit_soft_cap = 30,
                  .activation = Activation::kGeluTanh,
                  .post_norms = true,
                  .tied_embeddings = true},
       .optional_bias = true,
       .soft_caps = true,
       .scales_embedding = true,
       .window_rule = WindowRule::kPeriodic,
       .window_default = 4096,
       .window_period = 2,
       .hf = {.activation = "hidden_activation"},
       .hf_tensors = &kGemmaPostNormNames,
       .hf_norm_offset = 1,
       .hf_query_scalar = true,
       .hf_activations = kGemmaActivations,
       .hf_fixed = {{"hidden_act", "\"gelu_pytorch_tanh\""},
                    {"use_bidirectional_attention", "false"}},
       .gguf_wide_scale_layers = 46},
      {.name = "gemma3",
       .hf_name = "gemma3_text",
       .gguf_name = "gemma3",
       .traits = {.head_dim = 256,
                  .rope = make_rope(1e6),
                  .local_rope = make_rope(1e4),
                  .attention_scale = 1.0 / 16,
                  .activation = Activation::kGeluTanh,
                  .post_norms = true,
                  .head_norms = true,
                  .tied_embeddings = true},
       .optional_bias = true,
       .soft_caps = true,
       .scales_embedding = true,
       .window_rule = WindowRule::kPeriodic,
       .window_default = 4096,
       .window_period = 6,
       .hf = {.activation = "hidden_activation"},
       .hf_tensors = &kGemmaPostNormNames,
       .hf_norm_offset = 1,
       .hf_query_scalar = true,
       .hf_activations = kGemmaActivations,
       .hf_fixed = {{"hidden_act", "\"gelu_pytorch_tanh\""},
                    {"use_bidirectional_attention", "false"}},
       .gguf_wide_scale_layers = 62},
      {.name = "phi2",
       .hf_name = "phi",
       .gguf_name = "phi2",
       .traits = {.norm = NormKind::kLayer,
                  .activation = Activation::kGeluTanh,
                  .gated = false,
                  .parallel_block = true,
                  .qkv_bias = true,
                  .output_bias = true,
                  .ffn_bias = true,
                  .head_bias = true},
       .hf = {.norm_epsilon = "layer_norm_eps"},
       .hf_tensors = &kPhi2Names,
       .hf_partial_rotary = 0.5,
       .hf_activations = kPhi2Activations,
       .hf_fixed = {{"qk_layernorm", "false"}}},
      {.name = "phi3",
       .hf_name = "phi3",
       .gguf_name = "phi3",
       .traits = {},
       .window_rule = WindowRule::kAll,
       .hf_tensors = &kPhi3Names,
       .hf_partial_rotary = 1,
       .gguf_fused_gate = true},
      {.name = "gpt2",
       .hf_name = "gpt2",
       .gguf_name = "gpt2",
       .traits = {.rope = {.style = "none", .base = 10000, .scaling = {}},
                  .norm = NormKind::kLayer,
                  .activation = Activation::kGeluTanh,
                  .gated = false,
                  .learned_positions = true,
                  .tied_embeddings = true,
                  .qkv_bias = true,
                  .output_bias = true,
                  .ffn_bias = true},
       .hf = {.num_layers = "n_layer",
              .hidden_size = "n_embd",
              .intermediate_size = "n_inner",
              .query_heads = "n_head",
              .kv_heads = nullptr,
              .norm_epsilon = "layer_norm_epsilon",
              .max_context = "n_positions",
              .activation = "activation_function"},
       .hf_tensors = &kGpt2Names,
       .hf_transposed = true,
       .hf_inner_default = 4,
       .hf_activations = kPhi2Activations,
       .hf_fixed = {{"scale_attn_weights", "true"}, {"scale_attn_by_inverse_layer_idx", "false"}}},
  };
  return kFamilies;
}

[[noreturn]] void refuse_family(std::string_view name, const std::string& known,
                                const std::string& file, const char* field) {
  throw InputError(file, field,
                   "the model architecture \"" + std::string(name) +
                       "\" is not supported; supported are " + known);
}

const Family& find_family(const char* Family::* which, std::string_view name,
                          const std::string& file, const char* field) {
  std::string known;
  for (const auto& family : families()) {
    const char* own = family.*which;
    if (!own) continue;
    if (own == name) return family;
    known += (known.empty() ? "" : ", ") + std::string(own);
  }
  refuse_family(name, known, file, field);
}

template <std::size_t N>
bool contains(const std::array<std::string_view, N>& names, std::string_view name) {
  return std::ranges::find(names, name) != names.end();
}

}  // namespace

const Family& find_hf_family(std::string_view model_type, const std::string& file) {
  return find_family(&Family::hf_name, model_type, file, "/model_type");
}

const Family& find_gguf_family(std::string_view architecture, const std::string& file) {
  return find_family(&Family::gguf_name, architecture, file, "general.architecture");
}

std::span<const HfFixed> common_hf_fixed() {
  static constexpr std::array<HfFixed, 8> kFixed = {{{"quantization_config", "null"},
                                                     {"num_local_experts", "0"},
                                                     {"num_experts", "0"},
                                                     {"n_routed_experts", "0"},
                                                     {"is_encoder_decoder", "false"},
                                                     {"add_cross_attention", "false"},
                                                     {"alibi", "false"},
                                                     {"position_embedding_type", "\"absolute\""}}};
  return kFixed;
}

std::span<const GgufFixed> common_gguf_fixed() {
  static const std::vector<GgufFixed> kFixed = {
      {"expert_count", 0.0},        {"expert_used_count", 0.0},
      {"attention.clamp_kqv", 0.0}, {"attention.max_alibi_bias", 0.0},
      {"attention.scale", 0.0},     {"logit_scale", 0.0},
      {"embedding_scale", 0.0},     {"residual_scale", 0.0},
      {"attention.causal", true},   {"use_parallel_residual", false}};
  return kFixed;
}

bool is_harmless_hf_field(std::string_view field) {
  static constexpr auto kHarmless = std::to_array<std::string_view>(
      {// names, versions, what the file was made with
       "_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype",
       "transformers_version", "transformers.js_config", "finetuning_task", "task_specific_params",
       "is_llama_config", "unsloth_fixed", "unsloth_version", "name_or_path",
       // tokens and generation
       "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
       "decoder_start_token_id", "tokenizer_class", "vocab_size", "prefix", "use_cache",
       "cache_implementation", "n_ctx", "id2label", "label2id", "num_labels", "problem_type",
       // training: initial values, dropout (none when a model is run), parallelism
       "initializer_range", "initializer_factor", "attention_dropout", "attn_pdrop", "embd_pdrop",
       "resid_pdrop", "hidden_dropout", "hidden_dropout_prob", "classifier_dropout",
       "embedding_dropout", "router_aux_loss_coef", "pretraining_tp", "base_model_tp_plan",
       "gradient_checkpointing", "summary_activation", "summary_first_dropout",
       "summary_proj_to_labels", "summary_type", "summary_use_proj",
       // how it is computed, not what
       "_attn_implementation", "attn_implementation", "chunk_size_feed_forward", "return_dict",
       "is_decoder", "reorder_and_upcast_attn"});
  return contains(kHarmless, field);
}

bool is_harmless_gguf_key(std::string_view key) {
  static constexpr std::array<std::string_view, 3> kHarmless = {"vocab_size", "tensor_data_layout",
                                                                "rope.scaling.finetuned"};
  return contains(kHarmless, key);
}

std::vector<int> windows_by_rule(WindowRule rule, int num_layers, int window, int period,
                                 int first) {
  if (rule == WindowRule::kNone || window == 0) return {};
  std::vector<int> windows(static_cast<std::size_t>(num_layers));
  for (int layer = 0; layer < num_layers; ++layer) {
    const bool has_window = rule == WindowRule::kAll ||
                            (rule == WindowRule::kUpper && layer >= first) ||
                            (rule == WindowRule::kPeriodic && (layer + 1) % period != 0);
    windows[static_cast<std::size_t>(layer)] = has_window ? window : 0;
  }
  const bool any = std::ranges::any_of(windows, [](int w) { return w > 0; });
  return any ? windows : std::vector<int>();
}

std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected_tensors(
    const ModelConfig& c) {
  const std::int64_t hidden = c.hidden_size, inner = c.intermediate_size, vocab = c.vocab_size;
  const std::int64_t q = std::int64_t{c.query_heads} * c.head_dim,
                     kv = std::int64_t{c.kv_heads} * c.head_dim;
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> tensors;
  std::string prefix;
  const auto add = [&](const char* name, std::vector<std::int64_t> shape, bool bias = false) {
    tensors.emplace_back(prefix + name + ".weight", shape);
    if (bias) tensors.emplace_back(prefix + name + ".bias", std::vector{shape.front()});
  };
  const auto add_norm = [&](const char* name) { add(name, {hidden}, c.norm == NormKind::kLayer); };
  add("token_embd", {vocab, hidden});
  if (c.learned_positions) add("position_embd", {c.max_context, hidden});
  add_norm("output_norm");
  if (!c.tied_embeddings) add("output", {vocab, hidden});
  if (c.head_bias) tensors.emplace_back("output.bias", std::vector{vocab});
  for (int layer = 0; layer < c.num_layers; ++layer) {
    prefix = "blk." + std::to_string(layer) + ".";
    add_norm("attn_norm");
    add("attn_q", {q, hidden}, c.qkv_bias);
    add("attn_k", {kv, hidden}, c.qkv_bias);
    add("attn_v", {kv, hidden}, c.qkv_bias);
    if (c.head_norms) {
      add("attn_q_norm", {c.head_dim});
      add("attn_k_norm", {c.head_dim});
    }
    add("attn_output", {hidden, q}, c.output_bias);
    if (c.post_norms) add_norm("post_attention_norm");
    if (!c.parallel_block) add_norm("ffn_norm");
    if (c.gated) add("ffn_gate", {inner, hidden}, c.ffn_bias);
    add("ffn_up", {inner, hidden}, c.ffn_bias);
    add("ffn_down", {hidden, inner}, c.ffn_bias);
    if (c.post_norms) add_norm("post_ffw_norm");
  }
  return tensors;
}

std::span<const FusedTensor> fused_tensors() {
  static const std::vector<FusedTensor> kFused = {{"attn_qkv", {"attn_q", "attn_k", "attn_v"}},
                                                  {"ffn_gate_up", {"ffn_gate", "ffn_up"}}};
  return kFused;
}

std::vector<std::pair<std::string, std::string>> hf_tensor_names(const Family& family,
                                                                 const ModelConfig& config) {
  const HfTensorNames& names = *family.hf_tensors;
  std::vector<std::pair<std::string, std::string>> all;
  for (const char* kind : {".weight", ".bias"}) {
    for (const auto& [hf, gguf] : names.model)
      all.emplace_back(std::string(gguf) + kind, std::string(hf) + kind);
    for (int layer = 0; layer < config.num_layers; ++layer) {
      const std::string number = std::to_string(layer) + ".";
      for (const auto& [hf, gguf] : names.layer)
        all.emplace_back("blk." + number + gguf + kind, names.layer_prefix + number + hf + kind);
    }
  }
  return all;
}

}  // namespace kvplan::models
