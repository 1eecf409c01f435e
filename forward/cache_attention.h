#pragma once
// Attention of a decoder through the pages of a quant::KvCache.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>

#include "forward/cache_runtime.h"
#include "forward/decode_attention.h"
#include "forward/decoder.h"

namespace kvplan::forward {

/// The cache of one plan behind tensors. Slots are numbered like the batch of the tensors. Keys,
/// values and queries make the way to the host and back, as quant::KvCache takes host memory.
class CacheAttention {
 public:
  /// Room for `sequences` of `max_tokens` each. ArgumentError when the plan is for another geometry
  /// than `config`; else fails as the runtime does.
  CacheAttention(const CacheRuntime& runtime, const PlanBundle& bundle,
                 const models::ModelConfig& config, int sequences, std::int64_t max_tokens);

  /// Reserves what `tokens` more tokens of the first `sequences` slots need.
  void begin_step(std::int64_t sequences, std::int64_t tokens);
  /// Adds the step's keys and values, which are exact in fp16.
  void append(const LayerKv& kv);
  /// Attention of the step's tokens, q [sequences, query_heads, tokens, head_dim], at most
  /// kMaxQueryTokens of them, to what was appended. -> as q.
  at::Tensor attend(int layer, const at::Tensor& q);
  /// Attention of a prompt, which is all that slot 0 holds, as in mode decode: a query reads
  /// packed what was full at its position. q and kv [1, heads, tokens, head_dim].
  at::Tensor attend_prompt(const at::Tensor& q, const LayerKv& kv);

  /// Hidden states [sequences, tokens, hidden] after the final norm when the sequences take the ids
  /// [sequences, tokens] together in steps of a few tokens, as a runtime does. All slots are free
  /// before and after.
  at::Tensor hidden(const Decoder& decoder, const at::Tensor& ids);

  static constexpr int kMaxQueryTokens = 4;  // in one pass over the pages

 private:
  at::Tensor read_back(int layer, Side side, std::int64_t tokens) const;

  models::ModelConfig config_;
  int sink_tokens_, page_tokens_;
  std::unique_ptr<quant::KvCache> cache_;
};

}  // namespace kvplan::forward
