#include "calib/generator.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <string>

#include "calib/decode_attention.h"
#include "calib/task_model.h"
#include "schemas/error.h"

namespace kvplan::calib {
namespace {

constexpr std::int64_t kTokenDim = 2;

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  return at::scaled_dot_product_attention(q, k, v, {}, 0.0, causal, /*scale=*/std::nullopt,
                                          /*enable_gqa=*/true);
}

}  // namespace

Generator::Generator(const Decoder& decoder, const StoredCache* stored, std::int64_t max_tokens)
    : decoder_(decoder), stored_(stored), max_tokens_(max_tokens) {
  const ModelConfig& config = decoder.config();
  const auto make = [&] {
    return at::empty({1, config.kv_heads, max_tokens, config.head_dim}, at::kFloat);
  };
  for (int l = 0; l < config.num_layers; ++l) layers_.push_back({make(), make()});
}

at::Tensor Generator::start(std::span<const std::int32_t> prompt) {
  if (position_ != 0)
    throw ArgumentError("the sequence already holds " + std::to_string(position_) +
                        " tokens; a prompt begins a new one");
  if (prompt.empty()) throw ArgumentError("the prompt is empty; give at least one token");
  return advance(prompt);
}

at::Tensor Generator::step(std::int32_t token) {
  if (position_ == 0) throw ArgumentError("no prompt was given before the first step");
  return advance({&token, 1});
}

at::Tensor Generator::advance(std::span<const std::int32_t> tokens) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  if (position_ + count > max_tokens_)
    throw ArgumentError("the cache was made for " + std::to_string(max_tokens_) +
                        " tokens, asked to hold " + std::to_string(position_ + count));
  const AttentionOverride attend = [this](const at::Tensor& q, const LayerKv& kv) {
    return position_ == 0 ? attend_prompt(q, kv) : attend_step(q, kv);
  };
  at::Tensor x = decoder_.embed(id_tensor(tokens));
  for (int l = 0; l < decoder_.config().num_layers; ++l)
    x = decoder_.layer(l, x, position_, store_as_fp16, attend);
  position_ += count;
  return decoder_.head(decoder_.final_norm(x[0][count - 1]));
}

at::Tensor Generator::attend_prompt(const at::Tensor& q, const LayerKv& kv) {
  const std::int64_t tokens = kv.k.size(kTokenDim);
  LayerCache& cache = layers_[static_cast<std::size_t>(kv.layer)];
  const at::Tensor k = cache.k.narrow(kTokenDim, 0, tokens),
                   v = cache.v.narrow(kTokenDim, 0, tokens);
  k.copy_(kv.k);
  v.copy_(kv.v);
  if (!stored_) return attention(q, k, v, /*causal=*/true);

  const CachedKv packed{stored_->read_back(kv.layer, Side::kKey, kv.k),
                        stored_->read_back(kv.layer, Side::kValue, kv.v)};
  const at::Tensor mixed =
      decode_attention(q, {kv.k, kv.v}, packed, stored_->sink_tokens(), stored_->page_tokens());
  const std::int64_t sinks = stored_->sink_tokens(), page = stored_->page_tokens();
  if (const std::int64_t full = (tokens - sinks) / page * page; full > 0) {
    k.narrow(kTokenDim, sinks, full).copy_(packed.k.narrow(kTokenDim, sinks, full));
    v.narrow(kTokenDim, sinks, full).copy_(packed.v.narrow(kTokenDim, sinks, full));
  }
  return mixed;
}

at::Tensor Generator::attend_step(const at::Tensor& q, const LayerKv& kv) {
  LayerCache& cache = layers_[static_cast<std::size_t>(kv.layer)];
  cache.k.narrow(kTokenDim, position_, 1).copy_(kv.k);
  cache.v.narrow(kTokenDim, position_, 1).copy_(kv.v);
  const std::int64_t end = position_ + 1;
  // The token that fills a page already reads it packed.
  if (stored_ && end > stored_->sink_tokens() &&
      (end - stored_->sink_tokens()) % stored_->page_tokens() == 0) {
    const std::int64_t begin = end - stored_->page_tokens();
    for (auto& [x, side] : {std::pair{cache.k, Side::kKey}, {cache.v, Side::kValue}}) {
      const at::Tensor page = x.narrow(kTokenDim, begin, stored_->page_tokens());
      page.copy_(stored_->read_back(kv.layer, side, page, begin));
    }
  }
  return attention(q, cache.k.narrow(kTokenDim, 0, end), cache.v.narrow(kTokenDim, 0, end),
                   /*causal=*/false);
}

std::vector<std::int32_t> continue_greedily(Generator& generator,
                                            std::span<const std::int32_t> prompt,
                                            std::int64_t max_tokens, std::int32_t stop_token,
                                            const std::function<void()>& before_token) {
  std::vector<std::int32_t> continuation;
  while (static_cast<std::int64_t>(continuation.size()) < max_tokens) {
    if (before_token) before_token();
    const at::Tensor logits =
        continuation.empty() ? generator.start(prompt) : generator.step(continuation.back());
    continuation.push_back(logits.argmax().item<std::int32_t>());
    if (continuation.back() == stop_token) break;
  }
  return continuation;
}

}  // namespace kvplan::calib
