// The paged cache on the CPU: pages byte for byte as the CUDA runtime stores them, attention in
// double on what they de-quantise to.

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <queue>
#include <string>
#include <unordered_map>
#include <utility>

#include "quant/cache_size.h"
#include "quant/kv_cache.h"
#include "quant/linalg.h"
#include "quant/packing.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr std::uint16_t kHalfExponent = 0x7c00;  // all ones: infinity or NaN

std::size_t index_of(Side side) { return side == Side::kKey ? 0 : 1; }

/// Blocks by number: the lowest free one is given first, a block lives as long as sequences share
/// it.
class BlockPool {
 public:
  explicit BlockPool(std::int64_t blocks) : blocks_(static_cast<std::size_t>(blocks)) {}
  std::size_t blocks() const { return blocks_; }
  std::size_t available() const { return blocks_ - references_.size() + returned_.size(); }
  std::size_t take() {
    if (returned_.empty()) {
      references_.push_back(1);
      return references_.size() - 1;
    }
    const std::size_t block = returned_.top();
    returned_.pop();
    references_[block] = 1;
    return block;
  }
  void share(std::size_t block) { ++references_[block]; }
  /// Whether the block became free.
  bool give_back(std::size_t block) {
    if (--references_[block] > 0) return false;
    returned_.push(block);
    return true;
  }

 private:
  std::size_t blocks_;
  std::vector<std::uint32_t> references_;  // of the blocks that were ever taken
  std::priority_queue<std::size_t, std::vector<std::size_t>, std::greater<>> returned_;
};

/// 64 packed tokens of all KV heads of a layer, and what they read as.
struct Block {
  std::vector<std::byte> packed;            // [block_bytes]
  std::array<std::vector<float>, 2> plain;  // k, v [64, kv_heads, head_dim]
};

struct Layer {
  std::vector<HeadLayout> heads;
  std::size_t block_bytes = 0;
  std::array<std::unique_ptr<Codec>, 2> codecs;
  std::unordered_map<std::size_t, Block> blocks;  // by number, those in use
  // Per slot k, v [sink_tokens + 64, kv_heads, head_dim]: the sinks, then the open page. Each value
  // is exact in fp16.
  std::vector<std::array<std::vector<float>, 2>> rows;
};

struct Sequence {
  std::int64_t length = 0;
  std::vector<std::size_t> blocks;  // of its full pages
};

/// A sequence's part of the step at work.
struct StepEntry {
  int slot = 0;
  std::int64_t start = 0;  // length before
  std::int64_t tokens = 0;
  std::size_t first_row = 0;  // of its tokens in what append() and attend() get
};

/// Positions first .. first + count - 1 of a sequence, stored one after the other.
struct Segment {
  std::int64_t first = 0, count = 0;
  std::array<const float*, 2> x{};  // k, v [count, kv_heads, head_dim]
};

// scores[i] = q . k row i.
KVPLAN_VECTOR_CLONES void dot_rows(const double* q, int d, const float* k, std::size_t stride,
                                   std::int64_t count, double* scores) {
  constexpr int kLanes = 16;  // partial sums, so that the loop vectorises
  for (std::int64_t row = 0; row < count; ++row, k += stride) {
    double sum[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= d; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) sum[lane] += q[i + lane] * double{k[i + lane]};
    for (; i < d; ++i) sum[0] += q[i] * double{k[i]};
    double total = 0;
    for (const double part : sum) total += part;
    scores[row] = total;
  }
}

// out += sum of weight[i] v row i.
KVPLAN_VECTOR_CLONES void add_rows(const double* weights, std::int64_t count, const float* v,
                                   std::size_t stride, int d, double* out) {
  for (std::int64_t row = 0; row < count; ++row, v += stride)
    for (int i = 0; i < d; ++i) out[i] += weights[row] * double{v[i]};
}

class ReferenceCache : public KvCache {
 public:
  ReferenceCache(const PlanBundle& bundle, const CacheGeometry& geometry);

  const CacheGeometry& geometry() const override { return geometry_; }
  std::int64_t length(int slot) const override { return sequence(slot).length; }
  void begin_step(std::span<const SequenceStep> step) override;
  void append(int layer, std::span<const std::uint16_t> k,
              std::span<const std::uint16_t> v) override;
  void attend(int layer, std::span<const std::uint16_t> q, const AttentionOptions& options,
              std::span<float> out, std::span<float> lse) override;
  void read_back(int layer, Side side, int slot, std::int64_t first, std::int64_t count,
                 std::span<float> x) const override;
  void fork(int from, int to) override;
  void release(int slot) override;
  std::size_t free_blocks() const override { return pool_.available(); }

 private:
  std::size_t checked_slot(int slot) const;
  std::size_t checked_layer(int layer) const;
  const Sequence& sequence(int slot) const { return sequences_[checked_slot(slot)]; }
  /// The slot's entry in a step that some layer has not got yet, or null.
  const StepEntry* unfinished_entry(int slot) const;
  std::size_t full_pages(std::int64_t length) const {
    return static_cast<std::size_t>(std::max<std::int64_t>(length - sinks_, 0) / kPageTokens);
  }
  void check_vectors(std::span<const std::uint16_t> x, int heads, const char* name) const;
  void store(Layer& layer, const StepEntry& entry, std::span<const std::uint16_t> k,
             std::span<const std::uint16_t> v) const;
  void pack(Layer& layer, std::size_t slot, std::int64_t first_position, Block& block) const;
  /// The first `length` positions of a slot in a layer, ascending.
  std::vector<Segment> segments(const Layer& layer, std::size_t slot, std::int64_t length) const;

  CacheGeometry geometry_;
  int kv_heads_, head_dim_;
  std::int64_t sinks_;
  std::size_t token_values_;  // kv_heads * head_dim
  std::vector<Layer> layers_;
  std::vector<Sequence> sequences_;
  BlockPool pool_;
  std::vector<StepEntry> step_;  // without sequences released since
  std::size_t step_rows_ = 0;
  bool step_open_ = false;
  std::vector<bool> appended_;  // per layer, in this step
};

ReferenceCache::ReferenceCache(const PlanBundle& bundle, const CacheGeometry& geometry)
    : geometry_(geometry),
      kv_heads_(bundle.plan.model.kv_heads),
      head_dim_(bundle.plan.model.head_dim),
      sinks_(bundle.plan.sink_tokens),
      token_values_(static_cast<std::size_t>(kv_heads_) * static_cast<std::size_t>(head_dim_)),
      sequences_(static_cast<std::size_t>(geometry.max_sequences)),
      pool_(pool_blocks(geometry, bundle.plan.sink_tokens)),
      appended_(bundle.plan.layers.size(), true) {
  geometry_.blocks = static_cast<std::int64_t>(pool_.blocks());
  for (LayerFormat& format : page_format(bundle)) {
    Layer& layer = layers_.emplace_back();
    layer.heads = std::move(format.heads);
    layer.block_bytes = format.block_bytes;
    layer.codecs = {make_transform_codec(std::move(format.k)),
                    make_transform_codec(std::move(format.v))};
    layer.rows.resize(sequences_.size());
  }
}

std::size_t ReferenceCache::checked_slot(int slot) const {
  if (slot < 0 || slot >= geometry_.max_sequences)
    throw ArgumentError("slot " + std::to_string(slot) + " was asked of a cache with slots 0.." +
                        std::to_string(geometry_.max_sequences - 1));
  return static_cast<std::size_t>(slot);
}

std::size_t ReferenceCache::checked_layer(int layer) const {
  if (layer < 0 || static_cast<std::size_t>(layer) >= layers_.size())
    throw ArgumentError("layer " + std::to_string(layer) + " was asked of a cache with " +
                        std::to_string(layers_.size()) + " layers");
  return static_cast<std::size_t>(layer);
}

const StepEntry* ReferenceCache::unfinished_entry(int slot) const {
  if (std::ranges::find(appended_, false) == appended_.end()) return nullptr;
  for (const StepEntry& entry : step_)
    if (entry.slot == slot) return &entry;
  return nullptr;
}

void ReferenceCache::begin_step(std::span<const SequenceStep> step) {
  for (const StepEntry& entry : step_)
    if (unfinished_entry(entry.slot))
      throw ArgumentError("slot " + std::to_string(entry.slot) +
                          " lacks layers of the step before; append() every layer or release "
                          "the slots of that step");
  std::vector<StepEntry> entries;
  std::vector<bool> named(sequences_.size());
  std::size_t rows = 0, needed = 0;
  for (const SequenceStep& part : step) {
    const std::size_t slot = checked_slot(part.slot);
    if (named[slot])
      throw ArgumentError("slot " + std::to_string(part.slot) + " is named twice in a step");
    named[slot] = true;
    const std::int64_t start = sequences_[slot].length;
    if (part.tokens < 1 || part.tokens > geometry_.max_tokens - start)
      throw ArgumentError("a step brings at least 1 token and a sequence holds at most " +
                          std::to_string(geometry_.max_tokens) + "; slot " +
                          std::to_string(part.slot) + " holds " + std::to_string(start) +
                          " and was given " + std::to_string(part.tokens));
    entries.push_back({part.slot, start, part.tokens, rows});
    rows += static_cast<std::size_t>(part.tokens);
    needed += full_pages(start + part.tokens) - full_pages(start);
  }
  if (needed > pool_.available()) {
    std::size_t block_bytes = 0;
    for (const Layer& layer : layers_) block_bytes += layer.block_bytes;
    throw MemoryError(static_cast<std::int64_t>(needed * block_bytes),
                      static_cast<std::int64_t>(pool_.available() * block_bytes),
                      "the step fills " + std::to_string(needed) + " pages and the pool has " +
                          std::to_string(pool_.available()) +
                          " blocks left; release sequences or create the cache with more blocks");
  }
  for (const StepEntry& entry : entries) {
    Sequence& sequence = sequences_[static_cast<std::size_t>(entry.slot)];
    sequence.length += entry.tokens;
    while (sequence.blocks.size() < full_pages(sequence.length))
      sequence.blocks.push_back(pool_.take());
  }
  step_ = std::move(entries);
  step_rows_ = rows;
  step_open_ = true;
  appended_.assign(layers_.size(), false);
}

void ReferenceCache::check_vectors(std::span<const std::uint16_t> x, int heads,
                                   const char* name) const {
  const auto row = static_cast<std::size_t>(heads) * static_cast<std::size_t>(head_dim_);
  if (x.size() != step_rows_ * row)
    throw ArgumentError(std::string(name) + " has " + std::to_string(x.size()) +
                        " values; the step has " + std::to_string(step_rows_) + " tokens of " +
                        std::to_string(row));
  const auto bad = std::ranges::find_if(
      x, [](std::uint16_t bits) { return (bits & kHalfExponent) == kHalfExponent; });
  if (bad == x.end()) return;
  const auto i = static_cast<std::size_t>(bad - x.begin());
  const auto d = static_cast<std::size_t>(head_dim_);
  throw ArgumentError(std::string(name) + " is not finite at token " + std::to_string(i / row) +
                      " of the step, head " + std::to_string(i % row / d) + ", channel " +
                      std::to_string(i % d));
}

void ReferenceCache::append(int layer_index, std::span<const std::uint16_t> k,
                            std::span<const std::uint16_t> v) {
  const std::size_t l = checked_layer(layer_index);
  if (!step_open_ || appended_[l])
    throw ArgumentError("layer " + std::to_string(layer_index) +
                        " has no tokens to come; begin_step() comes before append()");
  check_vectors(k, kv_heads_, "k");
  check_vectors(v, kv_heads_, "v");
  for (const StepEntry& entry : step_) store(layers_[l], entry, k, v);
  appended_[l] = true;
}

void ReferenceCache::store(Layer& layer, const StepEntry& entry, std::span<const std::uint16_t> k,
                           std::span<const std::uint16_t> v) const {
  const auto slot = static_cast<std::size_t>(entry.slot);
  for (std::vector<float>& rows : layer.rows[slot])
    rows.resize(static_cast<std::size_t>(sinks_ + kPageTokens) * token_values_);
  for (std::int64_t t = 0; t < entry.tokens; ++t) {
    const std::int64_t position = entry.start + t;
    const std::int64_t row =
        position < sinks_ ? position : sinks_ + (position - sinks_) % kPageTokens;
    const std::size_t from = (entry.first_row + static_cast<std::size_t>(t)) * token_values_;
    const std::size_t to = static_cast<std::size_t>(row) * token_values_;
    for (std::size_t i = 0; i < token_values_; ++i) {
      layer.rows[slot][0][to + i] = from_half(k[from + i]);
      layer.rows[slot][1][to + i] = from_half(v[from + i]);
    }
    if (row == sinks_ + kPageTokens - 1) {
      const std::size_t page = full_pages(position + 1) - 1;
      pack(layer, slot, position + 1 - kPageTokens, layer.blocks[sequences_[slot].blocks[page]]);
    }
  }
}

void ReferenceCache::pack(Layer& layer, std::size_t slot, std::int64_t first_position,
                          Block& block) const {
  const KvShape shape{kPageTokens, kv_heads_, head_dim_};
  block.packed.resize(layer.block_bytes);
  for (const Side side : kSides) {
    const Codec& codec = *layer.codecs[index_of(side)];
    const auto rows = std::span<const float>(layer.rows[slot][index_of(side)])
                          .subspan(static_cast<std::size_t>(sinks_) * token_values_);
    std::vector<std::byte> linear(codec.packed_bytes(shape));
    const std::size_t token_bytes = linear.size() / kPageTokens;
    codec.encode(shape, first_position, rows, linear);
    const auto for_each_head = [&](auto convert) {
      std::size_t offset = 0;
      for (const HeadLayout& head : layer.heads) {
        convert(head.side(side),
                std::span(block.packed).subspan(head.block_offset, head.page_bytes),
                std::span(linear).subspan(offset));
        offset += linear_bytes(head.side(side));
      }
    };
    for_each_head([&](const SideLayout& layout, auto page, auto head) {
      to_page(layout, side, head, token_bytes, page);
    });
    // What readers see comes from the page, so that it cannot differ from what is stored.
    std::ranges::fill(linear, std::byte{0});
    for_each_head([&](const SideLayout& layout, auto page, auto head) {
      from_page(layout, side, page, token_bytes, head);
    });
    std::vector<float>& plain = block.plain[index_of(side)];
    plain.resize(rows.size());
    codec.decode(shape, first_position, linear, plain);
  }
}

std::vector<Segment> ReferenceCache::segments(const Layer& layer, std::size_t slot,
                                              std::int64_t length) const {
  const auto& [k, v] = layer.rows[slot];
  std::vector<Segment> found;
  std::int64_t position = 0;
  const auto add = [&](std::int64_t count, const float* keys, const float* values) {
    if (count > 0) found.push_back({position, count, {keys, values}});
    position += count;
  };
  add(std::min(length, sinks_), k.data(), v.data());
  for (std::size_t page = 0; page < full_pages(length); ++page) {
    const Block& block = layer.blocks.at(sequences_[slot].blocks[page]);
    add(kPageTokens, block.plain[0].data(), block.plain[1].data());
  }
  const std::size_t open = static_cast<std::size_t>(sinks_) * token_values_;
  if (position < length) add(length - position, k.data() + open, v.data() + open);
  return found;
}

void ReferenceCache::attend(int layer_index, std::span<const std::uint16_t> q,
                            const AttentionOptions& options, std::span<float> out,
                            std::span<float> lse) {
  const std::size_t l = checked_layer(layer_index);
  if (!step_open_ || !appended_[l])
    throw ArgumentError("layer " + std::to_string(layer_index) +
                        " lacks the tokens of the step; append() comes before attend()");
  check_vectors(q, geometry_.query_heads, "q");
  const auto query_heads = static_cast<std::size_t>(geometry_.query_heads);
  const auto d = static_cast<std::size_t>(head_dim_);
  if (out.size() != q.size() || (!lse.empty() && lse.size() != step_rows_ * query_heads))
    throw ArgumentError("attention of " + std::to_string(step_rows_) + " tokens and " +
                        std::to_string(query_heads) + " query heads got room for " +
                        std::to_string(out.size()) + " outputs and " + std::to_string(lse.size()) +
                        " log-sum-exps");
  if (!std::isfinite(options.scale) || !std::isfinite(options.soft_cap) || options.soft_cap < 0 ||
      options.window < 0)
    throw ArgumentError(
        "attention needs a finite scale, and a soft cap and a window of at least 0");
  const double scale = options.scale != 0 ? options.scale : 1 / std::sqrt(double(head_dim_));
  const double cap = options.soft_cap;
  const std::size_t queries_per_kv = query_heads / static_cast<std::size_t>(kv_heads_);
  std::vector<double> query(d), scores, sum(d);
  for (const StepEntry& entry : step_) {
    const auto all =
        segments(layers_[l], static_cast<std::size_t>(entry.slot), entry.start + entry.tokens);
    for (std::int64_t t = 0; t < entry.tokens; ++t) {
      const std::int64_t end = entry.start + t + 1;
      const std::int64_t begin =
          options.window > 0 ? std::max<std::int64_t>(end - options.window, 0) : 0;
      scores.resize(static_cast<std::size_t>(end - begin));
      // The parts of the segments that the query sees: visit(segment, first row in it, rows).
      const auto for_each_seen = [&](auto visit) {
        for (const Segment& segment : all) {
          const std::int64_t from = std::max(begin, segment.first);
          const std::int64_t to = std::min(end, segment.first + segment.count);
          if (from < to)
            visit(segment, static_cast<std::size_t>(from - segment.first), to - from,
                  scores.data() + (from - begin));
        }
      };
      for (std::size_t head = 0; head < query_heads; ++head) {
        const std::size_t row =
            (entry.first_row + static_cast<std::size_t>(t)) * query_heads + head;
        const std::size_t channel = head / queries_per_kv * d;
        for (std::size_t i = 0; i < d; ++i) query[i] = scale * from_half(q[row * d + i]);
        for_each_seen(
            [&](const Segment& segment, std::size_t first, std::int64_t count, double* to) {
              dot_rows(query.data(), head_dim_, segment.x[0] + first * token_values_ + channel,
                       token_values_, count, to);
            });
        double largest = -std::numeric_limits<double>::infinity();
        for (double& score : scores) {
          if (cap > 0) score = cap * std::tanh(score / cap);
          largest = std::max(largest, score);
        }
        double mass = 0;
        for (double& score : scores) {
          score = std::exp(score - largest);
          mass += score;
        }
        std::ranges::fill(sum, 0.0);
        for_each_seen([&](const Segment& segment, std::size_t first, std::int64_t count,
                          const double* weights) {
          add_rows(weights, count, segment.x[1] + first * token_values_ + channel, token_values_,
                   head_dim_, sum.data());
        });
        for (std::size_t i = 0; i < d; ++i) out[row * d + i] = static_cast<float>(sum[i] / mass);
        if (!lse.empty()) lse[row] = static_cast<float>(largest + std::log(mass));
      }
    }
  }
}

void ReferenceCache::read_back(int layer_index, Side side, int slot, std::int64_t first,
                               std::int64_t count, std::span<float> x) const {
  const std::size_t l = checked_layer(layer_index);
  const StepEntry* const entry = appended_[l] ? nullptr : unfinished_entry(slot);
  const std::int64_t length = entry ? entry->start : sequence(slot).length;
  if (first < 0 || count < 0 || first > length || count > length - first ||
      x.size() != static_cast<std::size_t>(count) * token_values_)
    throw ArgumentError("positions " + std::to_string(first) + ".." +
                        std::to_string(first + count - 1) + " were asked of the " +
                        std::to_string(length) + " that slot " + std::to_string(slot) +
                        " holds, with room for " + std::to_string(x.size()) + " values");
  for (const Segment& segment : segments(layers_[l], checked_slot(slot), length)) {
    const std::int64_t from = std::max(first, segment.first);
    const std::int64_t to = std::min(first + count, segment.first + segment.count);
    if (from < to)
      std::copy_n(segment.x[index_of(side)] +
                      static_cast<std::size_t>(from - segment.first) * token_values_,
                  static_cast<std::size_t>(to - from) * token_values_,
                  x.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(from - first) *
                                                          token_values_));
  }
}

void ReferenceCache::fork(int from, int to) {
  const std::size_t source = checked_slot(from), target = checked_slot(to);
  if (sequences_[target].length > 0)
    throw ArgumentError("slot " + std::to_string(to) + " holds " +
                        std::to_string(sequences_[target].length) +
                        " tokens; fork into a free slot or release it first");
  if (unfinished_entry(from))
    throw ArgumentError("slot " + std::to_string(from) +
                        " lacks layers of the step; append() every layer before a fork");
  sequences_[target] = sequences_[source];
  for (const std::size_t block : sequences_[target].blocks) pool_.share(block);
  for (Layer& layer : layers_) layer.rows[target] = layer.rows[source];
}

void ReferenceCache::release(int slot) {
  Sequence& sequence = sequences_[checked_slot(slot)];
  for (const std::size_t block : sequence.blocks)
    if (pool_.give_back(block))
      for (Layer& layer : layers_) layer.blocks.erase(block);
  sequence = {};
  const auto in_step = [&](const StepEntry& entry) { return entry.slot == slot; };
  if (std::erase_if(step_, in_step) > 0) step_open_ = false;
}

}  // namespace

std::unique_ptr<KvCache> make_reference_cache(const PlanBundle& bundle,
                                              const CacheGeometry& geometry) {
  require_geometry(bundle.plan, geometry);
  return std::make_unique<ReferenceCache>(bundle, geometry);
}

}  // namespace kvplan::quant
