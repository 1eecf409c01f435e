#include "calib/families.h"

#include <algorithm>
#include <array>

#include "schemas/error.h"

namespace kvplan::calib {
namespace {

const std::vector<Family>& families() {
  static const std::vector<Family> kFamilies = {
      {.name = "llama",
       .gguf_interleaves_rotary = true,
       .qkv_bias = false,
       .optional_bias = true,
       .hf_fixed = {{"mlp_bias", "false"}, {"sliding_window", "null"}},
       .gguf_fixed = {}},
      {.name = "qwen2",
       .gguf_interleaves_rotary = false,
       .qkv_bias = true,
       .optional_bias = false,
       .hf_fixed = {{"use_sliding_window", "false"}, {"use_mrope", "false"}},
       .gguf_fixed = {}},
  };
  return kFamilies;
}

/// Parts of tensor names inside a layer.
struct NamePair {
  const char* hf;
  const char* gguf;
};
constexpr std::array<NamePair, 9> kLayerNames = {{{"input_layernorm", "attn_norm"},
                                                  {"self_attn.q_proj", "attn_q"},
                                                  {"self_attn.k_proj", "attn_k"},
                                                  {"self_attn.v_proj", "attn_v"},
                                                  {"self_attn.o_proj", "attn_output"},
                                                  {"post_attention_layernorm", "ffn_norm"},
                                                  {"mlp.gate_proj", "ffn_gate"},
                                                  {"mlp.up_proj", "ffn_up"},
                                                  {"mlp.down_proj", "ffn_down"}}};
constexpr std::array<NamePair, 3> kModelNames = {
    {{"model.embed_tokens.weight", "token_embd.weight"},
     {"model.norm.weight", "output_norm.weight"},
     {"lm_head.weight", "output.weight"}}};

}  // namespace

const Family& find_family(std::string_view name, const std::string& file,
                          const std::string& field) {
  std::string known;
  for (const auto& family : families()) {
    if (family.name == name) return family;
    known += (known.empty() ? "" : ", ") + std::string(family.name);
  }
  throw InputError(file, field,
                   "the model architecture \"" + std::string(name) +
                       "\" is not supported; supported are " + known);
}

std::span<const HfFixed> common_hf_fixed() {
  static constexpr std::array<HfFixed, 9> kFixed = {{{"hidden_act", "\"silu\""},
                                                     {"quantization_config", "null"},
                                                     {"partial_rotary_factor", "1"},
                                                     {"num_local_experts", "0"},
                                                     {"num_experts", "0"},
                                                     {"n_routed_experts", "0"},
                                                     {"attn_logit_softcapping", "null"},
                                                     {"is_encoder_decoder", "false"},
                                                     {"add_cross_attention", "false"}}};
  return kFixed;
}

std::span<const GgufFixed> common_gguf_fixed() {
  static const std::vector<GgufFixed> kFixed = {{"expert_count", 0.0},
                                                {"attention.sliding_window", 0.0},
                                                {"attention.clamp_kqv", 0.0},
                                                {"attention.max_alibi_bias", 0.0},
                                                {"attention.scale", 0.0},
                                                {"logit_scale", 0.0},
                                                {"embedding_scale", 0.0},
                                                {"residual_scale", 0.0},
                                                {"attn_logit_softcapping", 0.0},
                                                {"final_logit_softcapping", 0.0},
                                                {"attention.causal", true},
                                                {"use_parallel_residual", false},
                                                {"rope.scaling.attn_factor", 1.0}};
  return kFixed;
}

std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected_tensors(
    const ModelConfig& c) {
  const std::int64_t hidden = c.hidden_size, inner = c.intermediate_size, vocab = c.vocab_size;
  const std::int64_t q = std::int64_t{c.query_heads} * c.head_dim,
                     kv = std::int64_t{c.kv_heads} * c.head_dim;
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> tensors = {
      {"token_embd.weight", {vocab, hidden}}, {"output_norm.weight", {hidden}}};
  if (!c.tied_embeddings) tensors.push_back({"output.weight", {vocab, hidden}});
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const auto add = [&](const char* name, std::vector<std::int64_t> shape) {
      tensors.emplace_back("blk." + std::to_string(layer) + "." + name, std::move(shape));
    };
    add("attn_norm.weight", {hidden});
    add("attn_q.weight", {q, hidden});
    add("attn_k.weight", {kv, hidden});
    add("attn_v.weight", {kv, hidden});
    add("attn_output.weight", {hidden, q});
    if (c.qkv_bias) {
      add("attn_q.bias", {q});
      add("attn_k.bias", {kv});
      add("attn_v.bias", {kv});
    }
    if (c.output_bias) add("attn_output.bias", {hidden});
    add("ffn_norm.weight", {hidden});
    add("ffn_gate.weight", {inner, hidden});
    add("ffn_up.weight", {inner, hidden});
    add("ffn_down.weight", {hidden, inner});
  }
  return tensors;
}

std::string hf_tensor_name(std::string_view gguf_name) {
  for (const auto& [hf, gguf] : kModelNames) {
    if (gguf_name == gguf) return hf;
  }
  // blk.{l}.{part}.{weight|bias}
  const auto layer = gguf_name.find('.') + 1, part = gguf_name.find('.', layer) + 1;
  const auto kind = gguf_name.rfind('.');
  for (const auto& [hf, gguf] : kLayerNames) {
    if (gguf_name.substr(part, kind - part) != gguf) continue;
    return std::string("model.layers.")
        .append(gguf_name.substr(layer, part - layer))
        .append(hf)
        .append(gguf_name.substr(kind));
  }
  throw InternalError("no Hugging Face name for the tensor " + std::string(gguf_name));
}

}  // namespace kvplan::calib
