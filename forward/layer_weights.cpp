#include "forward/layer_weights.h"

#include <ATen/ops/empty.h>

#include <span>

namespace kvplan::forward {

at::Tensor read_weight(const models::ModelReader& reader, const std::string& name,
                       at::Device device) {
  at::Tensor weight = at::empty(reader.shape(name), at::kFloat);
  reader.read(name, {weight.data_ptr<float>(), static_cast<std::size_t>(weight.numel())});
  return weight.to(device);
}

Affine read_affine(const models::ModelReader& reader, const std::string& name,
                   at::ScalarType matrices, at::Device device) {
  Affine out;
  if (reader.has(name + ".weight")) {
    out.weight = read_weight(reader, name + ".weight", device);
    if (out.weight.dim() == 2) out.weight = out.weight.to(matrices);
  }
  if (reader.has(name + ".bias")) out.bias = read_weight(reader, name + ".bias", device);
  return out;
}

LayerWeights::LayerWeights(const models::ModelReader& reader, int layer, at::ScalarType matrices,
                           at::Device device) {
  const auto read = [&](const char* name) {
    return read_affine(reader, "blk." + std::to_string(layer) + "." + name, matrices, device);
  };
  attn_norm = read("attn_norm");
  attn_q = read("attn_q");
  attn_k = read("attn_k");
  attn_v = read("attn_v");
  attn_q_norm = read("attn_q_norm");
  attn_k_norm = read("attn_k_norm");
  attn_output = read("attn_output");
  post_attention_norm = read("post_attention_norm");
  ffn_norm = read("ffn_norm");
  ffn_gate = read("ffn_gate");
  ffn_up = read("ffn_up");
  ffn_down = read("ffn_down");
  post_ffw_norm = read("post_ffw_norm");
}

}  // namespace kvplan::forward
