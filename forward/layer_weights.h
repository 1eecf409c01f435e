#pragma once
// The weights of one transformer block on a device.

#include <ATen/core/Tensor.h>

#include <string>

#include "models/model.h"

namespace kvplan::forward {

/// A matrix [out, in] or the scale [channels] of a norm, and what is added; undefined where the
/// model has none.
struct Affine {
  at::Tensor weight, bias;
  bool defined() const { return weight.defined(); }
};

/// As float32.
at::Tensor read_weight(const models::ModelReader& reader, const std::string& name,
                       at::Device device);
/// "{name}.weight" and "{name}.bias", what there is of them; matrices in the type `matrices`.
Affine read_affine(const models::ModelReader& reader, const std::string& name,
                   at::ScalarType matrices, at::Device device);

/// Names as in ModelReader.
struct LayerWeights {
  Affine attn_norm, attn_q, attn_k, attn_v, attn_q_norm, attn_k_norm, attn_output;
  Affine post_attention_norm, ffn_norm, ffn_gate, ffn_up, ffn_down, post_ffw_norm;

  LayerWeights(const models::ModelReader& reader, int layer, at::ScalarType matrices,
               at::Device device);
};

}  // namespace kvplan::forward
