#include "forward/causal_attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace kvplan::forward {
namespace {

constexpr std::int64_t kTokenDim = 2;
/// Queries whose scores are held at once: 8 heads x 256 x 32k keys are 256 MiB.
constexpr std::int64_t kBlockQueries = 256;

/// 0 where the query at position first + row reads the key at position first_key + column, -inf
/// elsewhere: [queries, keys].
at::Tensor visibility(std::int64_t first, std::int64_t queries, std::int64_t first_key,
                      std::int64_t keys, std::int64_t window, const at::TensorOptions& options) {
  const auto positions = [&](std::int64_t begin, std::int64_t count) {
    return at::arange(begin, begin + count, options.dtype(at::kLong));
  };
  const at::Tensor distance =
      positions(first, queries).unsqueeze(1) - positions(first_key, keys).unsqueeze(0);
  at::Tensor hidden = distance < 0;
  if (window > 0) hidden = hidden.logical_or(distance >= window);
  return at::zeros({queries, keys}, options)
      .masked_fill(hidden, -std::numeric_limits<float>::infinity());
}

/// Grouped queries against scores written out, for what fused kernels do not know.
at::Tensor capped_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& mask, const AttentionRule& rule) {
  const std::int64_t batch = q.size(0), kv_heads = k.size(1), queries = q.size(kTokenDim);
  const at::Tensor grouped = q.reshape({batch, kv_heads, -1, queries, q.size(3)});
  at::Tensor scores = at::matmul(grouped, k.unsqueeze(2).transpose(-1, -2)) * rule.scale;
  scores = at::tanh(scores / rule.soft_cap) * rule.soft_cap + mask;
  return at::matmul(at::softmax(scores, -1), v.unsqueeze(2)).reshape(q.sizes());
}

/// On 2 cores, 1,024 tokens, 9 heads of 64: the flash kernel takes 9 ms, the plain one 61 ms;
/// enable_gqa equals expanding. On a GPU the float32 kernel wants as many K/V heads as query heads.
at::Tensor fused_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::optional<at::Tensor>& mask, bool causal, double scale) {
  const std::int64_t queries_per_kv = q.size(1) / k.size(1);
  const bool expand = q.is_cuda() && queries_per_kv > 1;
  const auto heads = [&](const at::Tensor& x) {
    if (!expand) return x;
    std::vector<std::int64_t> grouped = x.sizes().vec();
    grouped.insert(grouped.begin() + 2, queries_per_kv);
    return x.unsqueeze(2).expand(grouped).flatten(1, 2);
  };
  return at::scaled_dot_product_attention(q, heads(k), heads(v), mask, 0.0, causal, scale,
                                          /*enable_gqa=*/!expand);
}

}  // namespace

AttentionRule attention_rule(const models::ModelConfig& config, int layer) {
  return {.scale = config.attention_scale != 0
                       ? config.attention_scale
                       : 1 / std::sqrt(static_cast<double>(config.head_dim)),
          .soft_cap = config.attention_soft_cap,
          .window = config.window(layer)};
}

at::Tensor causal_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionRule& rule, std::int64_t first) {
  const std::int64_t queries = q.size(kTokenDim), keys = k.size(kTokenDim);
  const std::int64_t end = first + queries;
  const bool reads_all = rule.window == 0 || end <= rule.window;
  if (rule.soft_cap == 0 && reads_all) {
    if (first == 0 && queries == keys) return fused_attention(q, k, v, {}, true, rule.scale);
    if (queries == 1 && end == keys) return fused_attention(q, k, v, {}, false, rule.scale);
  }
  std::vector<at::Tensor> blocks;
  for (std::int64_t begin = 0; begin < queries; begin += kBlockQueries) {
    const std::int64_t count = std::min(kBlockQueries, queries - begin);
    const std::int64_t position = first + begin;
    const std::int64_t first_key =
        rule.window == 0 ? 0 : std::max<std::int64_t>(0, position - rule.window + 1);
    const std::int64_t read = position + count - first_key;
    const at::Tensor rows = q.narrow(kTokenDim, begin, count),
                     own_k = k.narrow(kTokenDim, first_key, read),
                     own_v = v.narrow(kTokenDim, first_key, read);
    const at::Tensor mask = visibility(position, count, first_key, read, rule.window, q.options());
    blocks.push_back(rule.soft_cap > 0
                         ? capped_attention(rows, own_k, own_v, mask, rule)
                         : fused_attention(rows, own_k, own_v, mask, false, rule.scale));
  }
  return blocks.size() == 1 ? blocks.front() : at::cat(blocks, kTokenDim);
}

}  // namespace kvplan::forward
