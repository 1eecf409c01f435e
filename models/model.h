#pragma once
// Model files: configuration and weights of a GGUF file or a Hugging Face folder behind one
// interface. Torch-free.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "schemas/types.h"

namespace kvplan::models {

enum class NormKind { kRms, kLayer };  // kLayer has biases
enum class Activation { kSilu, kGelu, kGeluTanh };

/// What the forward pass needs to know; a family is a set of these values (models/families.cpp),
/// not code of its own.
struct ModelConfig {
  std::string architecture = {};  // name of the family: "llama", "gemma2"
  int num_layers = 0, hidden_size = 0, intermediate_size = 0, vocab_size = 0;
  int query_heads = 0, kv_heads = 0, head_dim = 0;
  int rotary_dim = 0;  // first channels of a head that turn; 0: no rotary embedding
  RopeSpec rope = {};
  std::optional<RopeSpec> local_rope = {};  // of the layers with a window; none: `rope`
  std::vector<int> windows = {};            // as in ModelSpec
  double attention_scale = 0;               // of the scores; 0: 1 / sqrt(head_dim)
  double attention_soft_cap = 0;            // scores become cap * tanh(score / cap); 0: none
  double logit_soft_cap = 0;                // the same of the logits
  double embedding_scale = 1;
  NormKind norm = NormKind::kRms;
  double norm_epsilon = 1e-5;
  Activation activation = Activation::kSilu;
  bool gated = true;               // down(act(gate x) * up x), else down(act(up x))
  bool parallel_block = false;     // attention and feed-forward read the same norm, no ffn_norm
  bool post_norms = false;         // post_attention_norm, post_ffw_norm: of what a block adds
  bool head_norms = false;         // attn_q_norm, attn_k_norm: of each head, before rotary
  bool learned_positions = false;  // position_embd, added to the embedding
  bool tied_embeddings = false;    // no output.weight
  bool qkv_bias = false;           // attn_{q,k,v}.bias present
  bool output_bias = false;        // attn_output.bias present
  bool ffn_bias = false;           // ffn_{up,down}.bias (and gate) present
  bool head_bias = false;          // output.bias present
  std::int64_t max_context = 0;
  std::string container = {};  // "gguf" | "hf"

  /// Positions that a query of the layer reads, its own included; 0: all.
  int window(int layer) const {
    return windows.empty() ? 0 : windows.at(static_cast<std::size_t>(layer));
  }
  const RopeSpec& layer_rope(int layer) const {
    return local_rope && window(layer) > 0 ? *local_rope : rope;
  }
};

/// Tensor names are GGUF's for both containers: token_embd.weight, position_embd.weight,
/// output_norm.weight, output.weight, blk.{l}.attn_norm.weight, blk.{l}.attn_{q,k,v}.{weight,bias},
/// blk.{l}.attn_output.weight, blk.{l}.ffn_norm.weight, blk.{l}.ffn_{gate,up,down}.weight and so on
/// (models/families.h lists them). The parts of a fused tensor have names of their own. Rotary
/// pairs are always half-split (llama GGUF's interleaving of q and k is undone on read), norm
/// weights are what multiplies (the 1 that Gemma's files leave out is added).
class ModelReader {
 public:
  virtual ~ModelReader() = default;
  virtual const ModelConfig& config() const = 0;
  virtual bool has(std::string_view name) const = 0;
  /// Row-major, output dimension first ([out, in] for matrices). InputError if absent.
  virtual std::vector<std::int64_t> shape(std::string_view name) const = 0;
  /// De-quantised to float; out.size() = product of shape. InputError{file, tensor} on NaN or Inf,
  /// naming the first element as stored.
  virtual void read(std::string_view name, std::span<float> out) const = 0;
  /// Fingerprint with kv_weights_sha256.
  virtual const ModelSpec& spec() const = 0;
  virtual std::filesystem::path path() const = 0;
};

/// Opens a .gguf file or a folder with config.json. All shapes are checked against the
/// configuration before this returns. InputError: missing or truncated file, unsupported
/// architecture, tensor type or feature (by name), wrong shape.
std::unique_ptr<ModelReader> open_model(const std::filesystem::path& path);

/// Rotary frequencies theta_j of a layer in a sequence of `sequence` tokens, scaling applied,
/// [rotary_dim/2]. The length matters to "dynamic" and "longrope" alone, as in transformers: beyond
/// original_context the frequencies of all positions change.
std::vector<double> rotary_frequencies(const ModelConfig& config, int layer = 0,
                                       std::int64_t sequence = 0);

/// What multiplies the rotary channels of queries and keys (YaRN, LongRoPE); 1 without scaling. It
/// counts as part of the vectors before rotary, so that rotary is a rotation: k = R_t k_pre.
double rotary_attention_factor(const RopeSpec& rope);

}  // namespace kvplan::models
