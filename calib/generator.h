#pragma once
// Greedy continuation of a prompt, token by token on a KV cache. Internal to calib.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "calib/decoder.h"
#include "calib/stored_cache.h"

namespace kvplan::calib {

/// One sequence and its cache: fp16, or as a plan stores it in mode decode (sinks and the open page
/// in fp16, full pages packed).
class Generator {
 public:
  /// `stored` null: fp16. Both are borrowed. Holds at most `max_tokens` tokens.
  Generator(const Decoder& decoder, const StoredCache* stored, std::int64_t max_tokens);

  /// The whole prompt in one pass, once, before any step. -> logits [vocab] of what follows.
  at::Tensor start(std::span<const std::int32_t> prompt);
  /// One more token. -> logits [vocab] of what follows.
  at::Tensor step(std::int32_t token);
  std::int64_t position() const { return position_; }  // tokens taken so far

 private:
  /// What one layer reads, [1, kv_heads, max_tokens, head_dim]: packed pages already decoded.
  struct LayerCache {
    at::Tensor k, v;
  };

  at::Tensor advance(std::span<const std::int32_t> tokens);
  at::Tensor attend_prompt(const at::Tensor& q, const LayerKv& kv);
  at::Tensor attend_step(const at::Tensor& q, const LayerKv& kv);

  const Decoder& decoder_;
  const StoredCache* stored_;
  std::vector<LayerCache> layers_;
  std::int64_t max_tokens_, position_ = 0;
};

inline constexpr std::int32_t kNoStopToken = -1;

/// The most likely token again and again: max_tokens of them, or up to and including `stop_token`.
/// `before_token` is called before each and may throw to end the work.
std::vector<std::int32_t> continue_greedily(Generator& generator,
                                            std::span<const std::int32_t> prompt,
                                            std::int64_t max_tokens,
                                            std::int32_t stop_token = kNoStopToken,
                                            const std::function<void()>& before_token = {});

}  // namespace kvplan::calib
