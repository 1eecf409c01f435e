#pragma once
// A model of a few kilobytes with seeded random weights behind the ModelReader interface.

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "models/model.h"
#include "quant/random.h"
#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan::models {

inline ModelConfig tiny_config() {
  ModelConfig config;
  config.architecture = "llama";
  config.num_layers = 2;
  config.hidden_size = 24;
  config.intermediate_size = 32;
  config.vocab_size = 50;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 16;
  config.rotary_dim = 16;
  config.container = "hf";
  config.tied_embeddings = true;
  return config;
}

/// Every weight is normal with standard deviation `spread` / sqrt(inputs); norm weights are 1.
class TinyModel : public ModelReader {
 public:
  explicit TinyModel(const ModelConfig& config, std::uint64_t seed = 1, double spread = 1.0)
      : config_(config), seed_(seed), spread_(spread) {
    const std::int64_t hidden = config.hidden_size, inner = config.intermediate_size;
    const std::int64_t q = std::int64_t{config.query_heads} * config.head_dim;
    const std::int64_t kv = std::int64_t{config.kv_heads} * config.head_dim;
    add("token_embd.weight", {config.vocab_size, hidden});
    if (!config.tied_embeddings) add("output.weight", {config.vocab_size, hidden});
    add("output_norm.weight", {hidden});
    if (config.learned_positions) add("position_embd.weight", {config.max_context, hidden});
    for (int l = 0; l < config.num_layers; ++l) {
      const std::string prefix = "blk." + std::to_string(l) + ".";
      add(prefix + "attn_norm.weight", {hidden});
      add(prefix + "attn_q.weight", {q, hidden});
      add(prefix + "attn_k.weight", {kv, hidden});
      add(prefix + "attn_v.weight", {kv, hidden});
      add(prefix + "attn_output.weight", {hidden, q});
      if (config.qkv_bias)
        for (const auto& [name, size] : {std::pair{"q", q}, {"k", kv}, {"v", kv}})
          add(prefix + "attn_" + name + ".bias", {size});
      if (config.output_bias) add(prefix + "attn_output.bias", {hidden});
      add(prefix + "ffn_norm.weight", {hidden});
      add(prefix + "ffn_gate.weight", {inner, hidden});
      add(prefix + "ffn_up.weight", {inner, hidden});
      add(prefix + "ffn_down.weight", {hidden, inner});
    }
    spec_ = {.architecture = config.architecture,
             .num_layers = config.num_layers,
             .query_heads = config.query_heads,
             .kv_heads = config.kv_heads,
             .head_dim = config.head_dim,
             .rotary_dim = config.rotary_dim,
             .rope = config.rope,
             .container = config.container,
             .kv_weights_sha256 = sha256("tiny " + std::to_string(seed))};
  }

  /// Sets one element to `value`.
  void spoil(const std::string& name, std::size_t element, float value) {
    tensors_.at(name).data.at(element) = value;
  }

  const ModelConfig& config() const override { return config_; }
  bool has(std::string_view name) const override { return tensors_.contains(std::string(name)); }
  std::vector<std::int64_t> shape(std::string_view name) const override { return at(name).shape; }
  void read(std::string_view name, std::span<float> out) const override {
    const auto& data = at(name).data;
    if (out.size() != data.size()) throw ArgumentError("size of " + std::string(name));
    std::copy(data.begin(), data.end(), out.begin());
  }
  const ModelSpec& spec() const override { return spec_; }
  std::filesystem::path path() const override { return "tiny"; }

 private:
  const Array<float>& at(std::string_view name) const {
    const auto found = tensors_.find(std::string(name));
    if (found == tensors_.end()) throw InputError("tiny", std::string(name), "no such tensor");
    return found->second;
  }

  void add(const std::string& name, std::vector<std::int64_t> shape) {
    Array<float> tensor(std::move(shape), 1.0f);
    if (!name.ends_with("norm.weight")) {
      quant::RandomStream stream(seed_, quant::StreamPurpose::kTest,
                                 static_cast<std::uint32_t>(tensors_.size()));
      const double scale =
          spread_ /
          std::sqrt(static_cast<double>(name == "token_embd.weight" ? 4 : tensor.shape.back()));
      for (float& x : tensor.data) x = static_cast<float>(scale * stream.next_normal());
    }
    tensors_.emplace(name, std::move(tensor));
  }

  ModelConfig config_;
  std::uint64_t seed_;
  double spread_;
  ModelSpec spec_;
  std::map<std::string, Array<float>> tensors_;
};

}  // namespace kvplan::models
