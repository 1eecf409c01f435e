#pragma once
// A step of attention over one layer, given to the kernel as the runtime gives it, on grids of any
// size; and the same step in double over the vectors that the codecs decode.

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "quant/kv_cache.h"
#include "tests/kernels/device_layer.h"

namespace kvplan::kernels::testing {

struct AttentionStep {
  const char* name;
  int queries_per_kv;
  std::vector<int> before, after;  // tokens of the sequences
  quant::AttentionOptions options = {};
  int max_query_tokens = 0;  // of the cache; 0: as many as the step brings
};

struct AttentionResult {
  std::vector<float> out, lse;  // [rows][query heads][head_dim], [rows][query heads]
  friend bool operator==(const AttentionResult&, const AttentionResult&) = default;
};

/// How far a result is from what it should be.
struct AttentionError {
  double out = 0;    // of an output, over the weighted mean of the norms of the values it sums
  double score = 0;  // of a log-sum-exp, over scale * |q| * the largest |k|
};

class AttentionOnLayer {
 public:
  AttentionOnLayer(PlanBundle bundle, AttentionStep what)
      : step_(std::move(what)),
        layer_(std::move(bundle), 0, static_cast<int>(step_.before.size()),
               std::max(*std::ranges::max_element(step_.after), 64)),
        batch_(layer_.batch(step_.before, step_.after)),
        query_heads_(layer_.view.kv_heads * step_.queries_per_kv) {
    const auto token = size(layer_.view.kv_heads) * d();
    for (std::size_t i = 0; i < step_.before.size(); ++i) {
      const int slot = layer_.slot(static_cast<int>(i)), length = step_.after[i];
      const auto draw = static_cast<std::uint32_t>(3 * i);
      const std::vector<std::uint16_t> x[2] = {random_halves(size(length) * token, draw),
                                               random_halves(size(length) * token, draw + 1)};
      layer_.store(slot, length, x);
      for (int side = 0; side < 2; ++side) decoded_[side].push_back(decode(side, length, x[side]));
    }
    q_ = random_halves(size(batch_.rows * query_heads_) * d(), 2);
    device_.emplace(layer_.contents);
    query_.emplace(q_);
    geometry_.query_heads = query_heads_;
    geometry_.max_sequences = static_cast<int>(step_.before.size());
    geometry_.max_tokens = *std::ranges::max_element(step_.after);
    geometry_.max_query_tokens = std::max(step_.max_query_tokens, batch_.view.max_new_tokens);
  }

  const DeviceLayer& layer() const { return layer_; }
  void set_options(const quant::AttentionOptions& options) {
    step_.options = options;
    rows_.clear();
  }
  float scale() const {
    return step_.options.scale != 0
               ? step_.options.scale
               : static_cast<float>(1 / std::sqrt(static_cast<double>(layer_.view.head_dim)));
  }

  DecodeShape shape(int blocks) const {
    const int columns = std::min(kColumns, geometry_.max_query_tokens * step_.queries_per_kv);
    return decode_shape(layer_.format, layer_.view.head_dim, quant::phase_steps(layer_.format),
                        needs_split_tile(layer_.bundle, layer_.format, 0), columns, blocks);
  }

  /// With a workspace of NaN that is exactly as large as the runtime's. `warps`: of a block, 0: as
  /// many as fit.
  AttentionResult attend(int blocks, int warps = 0) const {
    const DecodeShape shape = this->shape(blocks);
    const quant::SharedBuffers bytes = quant::shared_buffers(
        layer_.formats, layer_.view.sink_tokens, geometry_, {.blocks = blocks});
    const DeviceArray<std::int32_t> arrived(std::vector<std::int32_t>(bytes.arrived / 4, 0));
    const Guarded<float2> part_state(bytes.part_state), plain_state(bytes.plain_state);
    const Guarded<float> part_output(bytes.part_output), plain_output(bytes.plain_output);
    const auto rows = size(batch_.rows * query_heads_);
    const DeviceArray<float> out(rows * d()), lse(rows);
    const DeviceArray<std::uint16_t> halves(rows * d());
    AttentionView view;
    view.layer = layer_.view;
    device_->attach(view.layer);
    view.layer.uniform = shape.uniform;
    view.layer.mixed = shape.mixed;
    view.layer.shared = shape.shared;
    view.layer.shared_bytes = shape.shared_bytes;
    view.batch = batch_.view;
    view.queries_per_kv = step_.queries_per_kv;
    view.column_blocks =
        (batch_.view.max_new_tokens * step_.queries_per_kv + kColumns - 1) / kColumns;
    view.scale = scale();
    view.soft_cap = step_.options.soft_cap;
    view.window = step_.options.window;
    view.q = query_->data();
    view.out = halves.data();
    view.out_float = out.data();
    view.lse = lse.data();
    view.arrived = arrived.data();
    view.part_state = part_state.data();
    view.part_output = part_output.data();
    for (const quant::HeadLayout& head : layer_.format.heads)
      view.output_tiles = std::max(view.output_tiles, head.v.tiles);
    view.plain_state = plain_state.data();
    view.plain_output = plain_output.data();
    view.plain_chunks = quant::plain_chunks(layer_.view.sink_tokens);
    view.decode_blocks = shape.blocks;
    view.block_warps = warps > 0 ? warps : shape.block_warps;
    check(configure_decode(shape.shared_bytes), "shared memory");
    check(kernels::attend(view, nullptr), "attention");

    AttentionResult result{out.host(), lse.host()};
    const std::vector<std::uint16_t> rounded = halves.host();
    std::size_t rounded_otherwise = 0;
    for (std::size_t i = 0; i < rounded.size(); ++i)
      rounded_otherwise += rounded[i] != quant::to_half(result.out[i]);
    EXPECT_EQ(rounded_otherwise, 0u);
    EXPECT_THAT(arrived.host(), ::testing::Each(0));
    EXPECT_TRUE(part_state.is_whole() && plain_state.is_whole() && part_output.is_whole() &&
                plain_output.is_whole())
        << "written past the end of the workspace";
    return result;
  }

  /// The largest errors of a result; infinite where it is no number.
  AttentionError error_of(const AttentionResult& found) {
    if (rows_.empty()) attend_in_double();
    AttentionError error;
    const auto take = [](double& worst, double x) {
      worst = std::isfinite(x) ? std::max(worst, x) : INFINITY;
    };
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      double distance = 0;
      for (std::size_t c = 0; c < d(); ++c)
        distance += std::pow(found.out[row * d() + c] - rows_[row].out[c], 2);
      take(error.out, std::sqrt(distance) / rows_[row].magnitude);
      take(error.score, std::abs(found.lse[row] - rows_[row].lse) / rows_[row].largest_score);
    }
    return error;
  }

 private:
  /// NaN, and some behind the end that has to stay.
  template <class T>
  class Guarded {
   public:
    explicit Guarded(std::size_t bytes) : bytes_(bytes), memory_(bytes + kGuard) {}
    T* data() const { return reinterpret_cast<T*>(memory_.data()); }
    bool is_whole() const {
      const std::vector<std::byte> all = memory_.host();
      return std::all_of(all.end() - kGuard, all.end(),
                         [](std::byte b) { return b == std::byte{0xff}; });
    }

   private:
    static constexpr std::ptrdiff_t kGuard = 4096;
    std::size_t bytes_;
    DeviceArray<std::byte> memory_;
  };

  struct Row {
    std::vector<double> out;
    double lse = 0;
    double magnitude = 0;      // weighted mean of the norms of values
    double largest_score = 0;  // that the norms of query and keys allow
  };

  std::size_t d() const { return size(layer_.view.head_dim); }
  /// What a sequence holds of a side: [length][kv_heads][head_dim].
  std::vector<float> decode(int side, int length, const std::vector<std::uint16_t>& x) const {
    std::vector<float> decoded;
    for (const std::uint16_t half : x) decoded.push_back(quant::from_half(half));
    const quant::KvShape page_shape{quant::kPageTokens, layer_.view.kv_heads, layer_.view.head_dim};
    for (int page = 0; page < full_pages(length, layer_.view.sink_tokens); ++page) {
      const int first = layer_.view.sink_tokens + page * quant::kPageTokens;
      layer_.codecs[size(side)]->decode(
          page_shape, first, layer_.linear(page, side, x),
          std::span(decoded).subspan(size(first) * size(layer_.view.kv_heads) * d(),
                                     size(page_shape.elements())));
    }
    return decoded;
  }

  void attend_in_double() {
    rows_.resize(size(batch_.rows * query_heads_));
    int first_row = 0;
    for (std::size_t i = 0; i < step_.before.size(); ++i) {
      for (int t = 0; t < step_.after[i] - step_.before[i]; ++t)
        for (int h = 0; h < query_heads_; ++h)
          rows_[size((first_row + t) * query_heads_ + h)] =
              attend_in_double(i, step_.before[i] + t, h / step_.queries_per_kv,
                               size((first_row + t) * query_heads_ + h));
      first_row += step_.after[i] - step_.before[i];
    }
  }

  Row attend_in_double(std::size_t sequence, int last, int head, std::size_t row) const {
    const auto vector = [&](int side, int position) {
      return std::span(decoded_[side][sequence])
          .subspan(size(position * layer_.view.kv_heads + head) * d(), d());
    };
    const auto [_, cap, window] = step_.options;
    const int first = window > 0 ? std::max(0, last + 1 - static_cast<int>(window)) : 0;
    const auto dot = [](auto a, auto b) {
      return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
    };
    std::vector<double> q, scores;
    for (std::size_t c = 0; c < d(); ++c) q.push_back(quant::from_half(q_[row * d() + c]));
    double energy = 0;
    for (int position = first; position <= last; ++position) {
      const std::span<const float> key = vector(0, position);
      const double score = scale() * dot(q, key);
      energy = std::max(energy, dot(key, key));
      scores.push_back(cap > 0 ? cap * std::tanh(score / cap) : score);
    }
    const double most = *std::ranges::max_element(scores);
    Row result;
    result.out.resize(d());
    double total = 0;
    for (int position = first; position <= last; ++position) {
      const double weight = std::exp(scores[size(position - first)] - most);
      const std::span<const float> value = vector(1, position);
      total += weight;
      for (std::size_t c = 0; c < d(); ++c) result.out[c] += weight * value[c];
      result.magnitude += weight * std::sqrt(dot(value, value));
    }
    for (double& x : result.out) x /= total;
    result.magnitude = std::max(result.magnitude / total, 1e-30);
    result.lse = most + std::log(total);
    result.largest_score = scale() * std::sqrt(dot(q, q) * energy) + 1e-3;
    return result;
  }

  AttentionStep step_;
  DeviceLayer layer_;
  DeviceLayer::Batch batch_;
  int query_heads_;
  quant::CacheGeometry geometry_;
  std::vector<std::vector<float>> decoded_[2];  // of each sequence
  std::vector<std::uint16_t> q_;
  std::optional<DeviceContents> device_;
  std::optional<DeviceArray<std::uint16_t>> query_;
  std::vector<Row> rows_;
};

}  // namespace kvplan::kernels::testing
