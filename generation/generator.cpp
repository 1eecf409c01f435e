#include "generation/generator.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <string>

#include "forward/stored_cache.h"
#include "schemas/error.h"

namespace kvplan::generation {
namespace {

constexpr std::int64_t kTokenDim = 2;

}  // namespace

Generator::Generator(const forward::Decoder& decoder, forward::CacheAttention* pages,
                     std::int64_t max_tokens)
    : decoder_(decoder), pages_(pages), max_tokens_(max_tokens) {
  if (pages_) return;
  const models::ModelConfig& config = decoder.config();
  const auto make = [&] {
    return at::empty({1, config.kv_heads, max_tokens, config.head_dim},
                     at::TensorOptions(at::kFloat).device(decoder.device()));
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
  if (pages_) pages_->begin_step(1, count);
  const forward::AttentionOverride attend = [this](const at::Tensor& q,
                                                   const forward::LayerKv& kv) {
    return pages_ ? attend_pages(q, kv) : attend_fp16(q, kv);
  };
  at::Tensor x = decoder_.embed(forward::id_tensor(tokens), position_);
  for (int l = 0; l < decoder_.config().num_layers; ++l)
    x = decoder_.layer(l, x, position_, forward::store_as_fp16, attend);
  position_ += count;
  return decoder_.head(decoder_.final_norm(x[0][count - 1]));
}

at::Tensor Generator::attend_fp16(const at::Tensor& q, const forward::LayerKv& kv) {
  const forward::CachedKv& cache = layers_[static_cast<std::size_t>(kv.layer)];
  const std::int64_t count = q.size(kTokenDim), end = position_ + count;
  cache.k.narrow(kTokenDim, position_, count).copy_(kv.k);
  cache.v.narrow(kTokenDim, position_, count).copy_(kv.v);
  // A step takes its queries in fp16, as pages do: a plan of fp16 changes the order of sums alone.
  const at::Tensor queries = position_ == 0 ? q : q.to(at::kHalf).to(q.scalar_type());
  return forward::causal_attention(queries, cache.k.narrow(kTokenDim, 0, end),
                                   cache.v.narrow(kTokenDim, 0, end),
                                   forward::attention_rule(decoder_.config(), kv.layer), position_);
}

at::Tensor Generator::attend_pages(const at::Tensor& q, const forward::LayerKv& kv) {
  pages_->append(kv);
  return position_ == 0 ? pages_->attend_prompt(q, kv) : pages_->attend(kv.layer, q);
}

std::vector<std::int32_t> continue_greedily(Generator& generator,
                                            std::span<const std::int32_t> prompt,
                                            std::int64_t max_tokens,
                                            std::span<const std::int32_t> stop_tokens,
                                            const ContinuationHooks& hooks) {
  std::vector<std::int32_t> continuation;
  while (static_cast<std::int64_t>(continuation.size()) < max_tokens) {
    if (hooks.before_token) hooks.before_token();
    const at::Tensor logits =
        continuation.empty() ? generator.start(prompt) : generator.step(continuation.back());
    const auto token = logits.argmax().item<std::int32_t>();
    continuation.push_back(token);
    if (hooks.after_token) hooks.after_token(token);
    if (std::find(stop_tokens.begin(), stop_tokens.end(), token) != stop_tokens.end()) break;
  }
  return continuation;
}

}  // namespace kvplan::generation
