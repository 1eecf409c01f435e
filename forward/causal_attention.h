#pragma once
// Softmax attention of a layer: causal, with its scale, soft cap and window.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "models/model.h"

namespace kvplan::forward {

struct AttentionRule {
  double scale = 1;         // of the scores
  double soft_cap = 0;      // scores become cap * tanh(score / cap); 0: none
  std::int64_t window = 0;  // a query at position t reads positions > t - window; 0: all
};
AttentionRule attention_rule(const models::ModelConfig& config, int layer);

/// q [batch, query_heads, queries, head_dim] at positions first .. first + queries - 1 over k and v
/// [batch, kv_heads, keys, head_dim] of positions 0 .. keys - 1 -> as q. Scores are held for
/// a block of queries at a time, and not at all without soft cap and window.
at::Tensor causal_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionRule& rule, std::int64_t first = 0);

}  // namespace kvplan::forward
