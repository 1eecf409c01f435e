#pragma once
// Greedy continuation of a prompt, token by token on a KV cache.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "forward/cache_attention.h"
#include "forward/decoder.h"

namespace kvplan::generation {

/// One sequence and its cache: the framework's in fp16, or a plan's pages.
class Generator {
 public:
  /// `pages` null: fp16; else all its slots are free. Both are borrowed. Holds at most `max_tokens`
  /// tokens.
  Generator(const forward::Decoder& decoder, forward::CacheAttention* pages,
            std::int64_t max_tokens);

  /// The whole prompt in one pass, once, before any step. -> logits [vocab] of what follows.
  at::Tensor start(std::span<const std::int32_t> prompt);
  /// One more token. -> logits [vocab] of what follows.
  at::Tensor step(std::int32_t token);
  std::int64_t position() const { return position_; }  // tokens taken so far

 private:
  at::Tensor advance(std::span<const std::int32_t> tokens);
  at::Tensor attend_fp16(const at::Tensor& q, const forward::LayerKv& kv);
  at::Tensor attend_pages(const at::Tensor& q, const forward::LayerKv& kv);

  const forward::Decoder& decoder_;
  forward::CacheAttention* pages_;
  std::vector<forward::CachedKv> layers_;  // fp16: [1, kv_heads, max_tokens, head_dim]
  std::int64_t max_tokens_, position_ = 0;
};

/// What a continuation calls; either may throw to end the work.
struct ContinuationHooks {
  std::function<void()> before_token;
  std::function<void(std::int32_t)> after_token;
};

/// The most likely token again and again: max_tokens of them, or up to and including the first of
/// `stop_tokens`.
std::vector<std::int32_t> continue_greedily(Generator& generator,
                                            std::span<const std::int32_t> prompt,
                                            std::int64_t max_tokens,
                                            std::span<const std::int32_t> stop_tokens = {},
                                            const ContinuationHooks& hooks = {});

}  // namespace kvplan::generation
