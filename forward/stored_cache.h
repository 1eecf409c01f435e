#pragma once
// What attention reads back when a cache is stored by a plan.

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <vector>

#include "forward/decoder.h"
#include "quant/codec.h"
#include "schemas/plan.h"

namespace kvplan::forward {

/// x rounded to fp16, in float32.
at::Tensor round_to_fp16(const at::Tensor& x);

/// The fp16 cache: what every plan is compared with.
void store_as_fp16(LayerKv& kv);

/// ArgumentError when a plan's model has another number of layers, KV heads or channels than
/// `config`.
void require_geometry(const ModelSpec& plan_model, const models::ModelConfig& config);

/// How one pass through a decoder treats keys and values.
struct AttentionPath {
  KvHook hook;
  AttentionOverride attention;  // null: causal attention
};

/// The codecs of a plan, made once.
class StoredCache {
 public:
  /// ArgumentError when the plan is for another number of layers, heads or channels than `config`,
  /// or its pages cut through the token groups of its codec.
  StoredCache(const PlanBundle& bundle, const models::ModelConfig& config, int threads);

  int sink_tokens() const { return sink_tokens_; }
  int page_tokens() const { return page_tokens_; }
  /// x [1, kv_heads, tokens, head_dim] as read back once packed; the sinks in fp16. A codec that
  /// shares scales over tokens wants first_position at the begin of a page, or 0.
  at::Tensor read_back(int layer, Side side, const at::Tensor& x,
                       std::int64_t first_position = 0) const;
  /// What a decoder needs to store and attend as in a mode; `config` of the decoder and this
  /// cache must outlive it.
  AttentionPath worst() const;
  AttentionPath decode(const models::ModelConfig& config) const;
  /// Hidden states [1, tokens, hidden] after the final norm with every vector behind the sinks
  /// quantised as produced.
  at::Tensor hidden_worst(const Decoder& decoder, const at::Tensor& ids) const;
  /// The same with pages packed when they are full, as the runtime does.
  at::Tensor hidden_decode(const Decoder& decoder, const at::Tensor& ids) const;

 private:
  int sink_tokens_, page_tokens_, threads_;
  std::vector<std::array<std::unique_ptr<quant::Codec>, 2>> codecs_;  // [layer][side]
};

}  // namespace kvplan::forward
