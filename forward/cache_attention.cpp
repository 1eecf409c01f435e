#include "forward/cache_attention.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <string>
#include <vector>

#include "forward/stored_cache.h"
#include "schemas/error.h"

namespace kvplan::forward {
namespace {

constexpr std::int64_t kTokenDim = 2;

/// x [sequences, heads, tokens, head_dim] as the cache takes it: fp16 on the host, [sequences,
/// tokens, heads, head_dim].
at::Tensor cache_rows(const at::Tensor& x) {
  return x.to(at::kHalf).transpose(1, kTokenDim).to(at::kCPU).contiguous();
}

std::span<const std::uint16_t> bits(const at::Tensor& rows) {
  return {static_cast<const std::uint16_t*>(rows.const_data_ptr()),
          static_cast<std::size_t>(rows.numel())};
}

std::span<float> floats(at::Tensor& x) {
  return {x.data_ptr<float>(), static_cast<std::size_t>(x.numel())};
}

/// The end of the longest step from `begin` on whose queries all read the same pages packed: the
/// token that fills a page begins a step.
std::int64_t step_end(std::int64_t begin, std::int64_t tokens, int sink_tokens, int page_tokens) {
  std::int64_t filling = sink_tokens + page_tokens - 1;
  if (begin >= filling) filling += ((begin - filling) / page_tokens + 1) * page_tokens;
  return std::min({tokens, filling, begin + CacheAttention::kMaxQueryTokens});
}

}  // namespace

CacheRuntime reference_runtime(std::string name) {
  return {std::move(name), quant::make_reference_cache};
}

CacheAttention::CacheAttention(const CacheRuntime& runtime, const PlanBundle& bundle,
                               const models::ModelConfig& config, int sequences,
                               std::int64_t max_tokens)
    : config_(config),
      sink_tokens_(bundle.plan.sink_tokens),
      page_tokens_(bundle.plan.page_tokens) {
  require_geometry(bundle.plan.model, config);
  cache_ = runtime.make_cache(bundle, {.query_heads = config.query_heads,
                                       .max_sequences = sequences,
                                       .max_tokens = max_tokens,
                                       .max_query_tokens = kMaxQueryTokens});
}

void CacheAttention::begin_step(std::int64_t sequences, std::int64_t tokens) {
  std::vector<quant::SequenceStep> step;
  for (int slot = 0; slot < sequences; ++slot) step.push_back({slot, static_cast<int>(tokens)});
  cache_->begin_step(step);
}

void CacheAttention::append(const LayerKv& kv) {
  const at::Tensor k = cache_rows(kv.k), v = cache_rows(kv.v);
  cache_->append(kv.layer, bits(k), bits(v));
}

at::Tensor CacheAttention::attend(int layer, const at::Tensor& q) {
  const at::Tensor rows = cache_rows(q);
  at::Tensor out = at::empty_like(rows, at::kFloat);
  const AttentionRule rule = attention_rule(config_, layer);
  cache_->attend(layer, bits(rows),
                 {.scale = static_cast<float>(rule.scale),
                  .soft_cap = static_cast<float>(rule.soft_cap),
                  .window = rule.window},
                 floats(out), {});
  return out.transpose(1, kTokenDim).to(q.device());
}

at::Tensor CacheAttention::attend_prompt(const at::Tensor& q, const LayerKv& kv) {
  const std::int64_t tokens = q.size(kTokenDim);
  const CachedKv packed{read_back(kv.layer, Side::kKey, tokens).to(q.device()),
                        read_back(kv.layer, Side::kValue, tokens).to(q.device())};
  return decode_attention(q, {kv.k, kv.v}, packed, sink_tokens_, page_tokens_,
                          attention_rule(config_, kv.layer));
}

/// [1, kv_heads, tokens, head_dim] of slot 0.
at::Tensor CacheAttention::read_back(int layer, Side side, std::int64_t tokens) const {
  at::Tensor rows = at::empty({1, tokens, config_.kv_heads, config_.head_dim}, at::kFloat);
  cache_->read_back(layer, side, 0, 0, tokens, floats(rows));
  return rows.transpose(1, kTokenDim);
}

at::Tensor CacheAttention::hidden(const Decoder& decoder, const at::Tensor& ids) {
  constexpr std::int64_t kIdDim = 1;
  const std::int64_t sequences = ids.size(0), tokens = ids.size(kIdDim);
  const AttentionOverride attention = [this](const at::Tensor& q, const LayerKv& kv) {
    append(kv);
    return attend(kv.layer, q);
  };
  std::vector<at::Tensor> found;
  for (std::int64_t begin = 0, end = 0; begin < tokens; begin = end) {
    end = step_end(begin, tokens, sink_tokens_, page_tokens_);
    begin_step(sequences, end - begin);
    at::Tensor x = decoder.embed(ids.narrow(kIdDim, begin, end - begin), begin);
    for (int l = 0; l < decoder.config().num_layers; ++l)
      x = decoder.layer(l, x, begin, store_as_fp16, attention, tokens);
    found.push_back(decoder.final_norm(x));
  }
  for (int slot = 0; slot < sequences; ++slot) cache_->release(slot);
  return at::cat(found, kIdDim);
}

}  // namespace kvplan::forward
