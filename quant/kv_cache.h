#pragma once
// A paged KV cache that stores vectors as a plan says: the interface that the CPU reference and the
// CUDA runtime implement, and the bytes that it takes.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "quant/page_layout.h"
#include "schemas/plan.h"

namespace kvplan::quant {

struct CacheGeometry {
  int query_heads = 0;          // a multiple of the plan's kv_heads
  int max_sequences = 1;        // slots
  std::int64_t max_tokens = 0;  // of one sequence
  std::int64_t blocks = 0;      // in each layer's pool, shared by the sequences; 0: enough for
                                // max_sequences of max_tokens
  int max_query_tokens = 4;     // q_len of one attend()
};

struct AttentionOptions {
  float scale = 0;          // of the scores; 0: 1 / sqrt(head_dim)
  float soft_cap = 0;       // scores become cap * tanh(score / cap); 0: none
  std::int64_t window = 0;  // a query at position t reads positions > t - window; 0: all
};

/// One sequence's part of a step: tokens that append() will bring.
struct SequenceStep {
  int slot = 0;
  int tokens = 1;
};

/// Bytes of a cache by what they hold.
struct CacheSize {
  std::size_t pages = 0;      // packed blocks of all layers
  std::size_t open = 0;       // fp16 sinks and open pages of all slots
  std::size_t tables = 0;     // page tables, arrays of the batch
  std::size_t statics = 0;    // transforms, means, level tables, layouts, rotary tables
  std::size_t workspace = 0;  // partial results and transformed queries of a decode step
  std::size_t total() const { return pages + open + tables + statics + workspace; }
};

/// Sequences live in slots 0..max_sequences-1; a slot is free while its length is 0. The first
/// sink_tokens tokens and the open page are fp16, each full page of 64 tokens is packed. A step is
/// begin_step, then for each layer append and attend; what throws changes nothing. ArgumentError
/// for a slot or layer out of range, buffers of another size, calls out of order.
class KvCache {
 public:
  virtual ~KvCache() = default;
  virtual const CacheGeometry& geometry() const = 0;
  /// Counts the tokens of a step from begin_step on.
  virtual std::int64_t length(int slot) const = 0;
  /// Reserves what the new tokens need: a block for each page that they fill. ArgumentError: slot
  /// out of range or named twice, tokens < 1, longer than max_tokens, a sequence of the step before
  /// that lacks layers. MemoryError when the pool has too few blocks left.
  virtual void begin_step(std::span<const SequenceStep> step) = 0;
  /// k, v of the step's tokens after rotary, fp16 bits [tokens of the step, kv_heads, head_dim],
  /// sequence after sequence. Once per layer and step.
  virtual void append(int layer, std::span<const std::uint16_t> k,
                      std::span<const std::uint16_t> v) = 0;
  /// Causal attention of the step's tokens over everything appended so far, q fp16 bits [tokens of
  /// the step, query_heads, head_dim], after append() of that layer. out as q, float; lse [tokens,
  /// query_heads] natural log-sum-exp of the scores, or empty. A query sees a page packed if it is
  /// full when the step ends.
  virtual void attend(int layer, std::span<const std::uint16_t> q, const AttentionOptions& options,
                      std::span<float> out, std::span<float> lse) = 0;
  /// What attend() reads for positions first..first+count-1 of a slot: plain domain, after rotary,
  /// [count, kv_heads, head_dim]. Sinks and the open page exact, pages de-quantised.
  virtual void read_back(int layer, Side side, int slot, std::int64_t first, std::int64_t count,
                         std::span<float> x) const = 0;
  /// `to` becomes a copy of `from` (full pages are shared). ArgumentError unless `to` is free, and
  /// when `from` lacks layers of the step.
  virtual void fork(int from, int to) = 0;
  /// Frees the slot and ends a step that it is part of. If layers lacked that step's tokens,
  /// release its other sequences too. A free slot stays free.
  virtual void release(int slot) = 0;
  virtual std::size_t free_blocks() const = 0;
};

/// The CPU reference: pages byte for byte as the CUDA runtime stores them; attention in double on
/// the de-quantised values. Takes steps of any length; refuses values that are not finite. Keeps a
/// copy of what it needs from `bundle`. Errors of page_format; ArgumentError for an impossible
/// geometry.
std::unique_ptr<KvCache> make_reference_cache(const PlanBundle& bundle,
                                              const CacheGeometry& geometry);

}  // namespace kvplan::quant
