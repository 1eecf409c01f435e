// Outputs of `finish` from random partial results against sums in double.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "kernels/views.h"
#include "tests/kernels/device_layer.h"

namespace kvplan::kernels {
namespace {

using namespace kvplan::kernels::testing;
using quant::TileCode;
using quant::TileRun;

constexpr double kTolerance = 1e-5;  // of the largest number of a row
constexpr double kLogSumTolerance = 1e-5;
constexpr float kNothing = -1e30f;  // maximum of a column that reads nothing

struct Step {
  const char* name;
  int queries_per_kv;
  std::vector<int> before, after;
  int decode_blocks, block_warps;
  std::int64_t window = 0;
};

/// Random partial results of a step.
class Partials {
 public:
  Partials(const PlanBundle& bundle, const Step& step)
      : step_(step),
        layer_(bundle, 0, static_cast<int>(step.before.size()), 1000),
        random_(8, quant::StreamPurpose::kTest, 1) {
    int new_tokens = 0;
    for (std::size_t i = 0; i < step.before.size(); ++i) {
      new_tokens = std::max(new_tokens, step.after[i] - step.before[i]);
      rows_ += step.after[i] - step.before[i];
    }
    blocks_ = (new_tokens * step.queries_per_kv + kColumns - 1) / kColumns;
    segments_ = static_cast<int>(step.before.size()) * layer_.view.kv_heads * blocks_;
    for (const quant::HeadLayout& head : layer_.format.heads)
      tiles_ = std::max(tiles_, head.v.tiles);
    plain_tiles_ = plain_tiles(layer_.view.head_dim);
    const int warps = step.decode_blocks * step.block_warps;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    owner_.assign(size(warps + segments_), -1);
    state_.assign(owner_.size() * kColumns, {nan, nan});
    output_.assign(owner_.size() * size(tiles_) * 32, {nan, nan, nan, nan});
    assign_owners(warps);
    for (std::size_t slot = 0; slot < owner_.size(); ++slot) {
      if (owner_[slot] < 0) continue;
      for (int c = 0; c < kColumns; ++c) state_[slot * kColumns + size(c)] = random_state();
      for (std::size_t k = 0; k < size(tiles_) * 32; ++k)
        output_[slot * size(tiles_) * 32 + k] = random_fragment();
    }
    for (int k = 0; k < segments_ * kColumns; ++k) {
      plain_state_.push_back(random_state());
      if (plain_state_.back().y == 0) plain_state_.back() = {3, 2};  // its own token at least
    }
    for (int k = 0; k < segments_ * plain_tiles_ * 32; ++k)
      plain_output_.push_back(random_fragment());
  }

  void expect_finish() {
    const auto batch = layer_.batch(step_.before, step_.after);
    const int d = layer_.view.head_dim;
    const auto values = size(rows_) * size(layer_.view.kv_heads * step_.queries_per_kv);
    const DeviceArray<std::int32_t> owner(owner_);
    const DeviceArray<int2> warps(warps_);
    const DeviceArray<float2> state(state_), plain_state(plain_state_);
    const DeviceArray<float4> output(output_), plain_output(plain_output_);
    const DeviceArray<float> floats(values * size(d)), lse(values);
    const DeviceArray<std::uint16_t> halves(values * size(d));
    AttentionView view;
    view.layer = layer_.view;
    view.batch = batch.view;
    view.queries_per_kv = step_.queries_per_kv;
    view.column_blocks = blocks_;
    view.window = step_.window;
    view.out = halves.data();
    view.out_float = floats.data();
    view.lse = lse.data();
    view.segment_warps = warps.data();
    view.slot_owner = owner.data();
    view.slot_state = state.data();
    view.slot_output = output.data();
    view.output_tiles = tiles_;
    view.plain_state = plain_state.data();
    view.plain_output = plain_output.data();
    view.plain_tiles = plain_tiles_;
    view.decode_blocks = step_.decode_blocks;
    view.block_warps = step_.block_warps;
    ASSERT_EQ(finish(view, nullptr), cudaSuccess);
    found_ = floats.host();
    found_lse_ = lse.host();
    const auto found_halves = halves.host();
    for (std::size_t i = 0; i < found_.size(); ++i)
      ASSERT_EQ(found_halves[i], quant::to_half(found_[i])) << i;
    int first_row = 0;
    for (std::size_t i = 0; i < step_.before.size(); ++i) {
      const int tokens = step_.after[i] - step_.before[i];
      for (int head = 0; head < layer_.view.kv_heads; ++head)
        for (int column = 0; column < tokens * step_.queries_per_kv; ++column) {
          SCOPED_TRACE("sequence " + std::to_string(i) + " head " + std::to_string(head) +
                       " column " + std::to_string(column));
          const int row = (first_row + column / step_.queries_per_kv) * layer_.view.kv_heads *
                              step_.queries_per_kv +
                          head * step_.queries_per_kv + column % step_.queries_per_kv;
          const int segment =
              (static_cast<int>(i) * layer_.view.kv_heads + head) * blocks_ + column / kColumns;
          expect_row(head, segment, column % kColumns, size(row));
        }
      first_row += tokens;
    }
  }

 private:
  float uniform() { return static_cast<float>(2 * random_.next_uniform() - 1); }
  float2 random_state() {
    if (random_.next_below(5) == 0) return {kNothing, 0};
    return {20 * uniform(), 10 + 9 * uniform()};
  }
  float4 random_fragment() { return {uniform(), uniform(), uniform(), uniform()}; }

  /// The line of kernels/partition.cuh by hand: unit after unit, each at the warp in whose piece it
  /// starts. A warp's slot goes to one of the segments with units there.
  void assign_owners(int warps) {
    struct Unit {
      int segment;
      std::uint64_t begin;
    };
    std::vector<Unit> units;
    std::uint64_t length = 0;
    for (std::size_t i = 0; i < step_.before.size(); ++i) {
      const int full = full_pages(step_.after[i], layer_.view.sink_tokens);
      const auto first =
          (step_.before[i] + 1 - step_.window - layer_.view.sink_tokens) / quant::kPageTokens;
      const int skipped =
          step_.window == 0 ? 0 : static_cast<int>(std::clamp<std::int64_t>(first, 0, full));
      const int page_units = (full - skipped + layer_.view.unit_pages - 1) / layer_.view.unit_pages;
      for (int s = 0; s < layer_.view.kv_heads * blocks_; ++s)
        for (int unit = 0; unit < 1 + page_units; ++unit) {
          const int segment = static_cast<int>(i) * layer_.view.kv_heads * blocks_ + s;
          units.push_back({segment, length});
          length += layer_.view.costs.head[size(s / blocks_)];
        }
    }
    const auto count = static_cast<std::uint64_t>(warps);
    warps_.assign(size(segments_), {-1, -1});
    for (int w = 0; w < warps; ++w) {
      std::vector<int> candidates;
      for (const Unit& unit : units)
        if (length * static_cast<std::uint64_t>(w) / count <= unit.begin &&
            unit.begin < length * static_cast<std::uint64_t>(w + 1) / count)
          candidates.push_back(unit.segment);
      for (const int segment : candidates) {
        int2& range = warps_[size(segment)];
        if (range.x < 0) range.x = w;
        range.y = w;
      }
      if (!candidates.empty() && random_.next_below(4) > 0)
        owner_[size(w)] =
            candidates[random_.next_below(static_cast<std::uint32_t>(candidates.size()))];
    }
    for (int segment = 0; segment < segments_; ++segment)
      if (random_.next_below(2) == 0) owner_[size(warps + segment)] = segment;
  }

  static double fragment_value(const std::vector<float4>& tiles, std::size_t tile, int row, int c) {
    const float4& o = tiles[tile * 32 + size(4 * (row % 8) + c % 4)];
    return c < 4 ? (row < 8 ? o.x : o.y) : (row < 8 ? o.z : o.w);
  }

  double plain_value(int segment, int channel, int c) const {
    for (int tile = 0; tile < plain_tiles_; ++tile)
      for (int row = 0; row < 16; ++row)
        if (plain_channel(tile, row) == channel)
          return fragment_value(plain_output_, size(segment * plain_tiles_ + tile), row, c);
    return std::numeric_limits<double>::quiet_NaN();
  }

  void expect_row(int head, int segment, int c, std::size_t row) const {
    const quant::HeadTransform& transform = layer_.format.v.heads[size(head)];
    const quant::SideLayout& layout = layer_.format.heads[size(head)].v;
    const int d = layer_.view.head_dim;
    const auto column = size(segment * kColumns + c);
    const float2 plain = plain_state_[column];
    double maximum = plain.x;
    std::vector<std::size_t> slots;
    for (std::size_t slot = 0; slot < owner_.size(); ++slot)
      if (owner_[slot] == segment) {
        slots.push_back(slot);
        maximum = std::max<double>(maximum, state_[slot * kColumns + size(c)].x);
      }
    const double plain_weight = std::exp2(plain.x - maximum);
    double packed = 0;
    std::vector<double> y(size(transform.coded())), o(size(d));
    for (int channel = 0; channel < d; ++channel)
      o[size(channel)] = plain_weight * plain_value(segment, channel, c);
    for (const std::size_t slot : slots) {
      const float2 state = state_[slot * kColumns + size(c)];
      if (state.y == 0) continue;
      const double weight = std::exp2(state.x - maximum);
      packed += weight * state.y;
      std::size_t tile = slot * size(tiles_);
      for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
        const TileRun& run = layout.runs[r];
        const int coordinates = quant::tile_coordinates(run.half != 0);
        for (int k = 0; k < run.tiles; ++k, ++tile)
          for (int i = 0; i < coordinates; ++i) {
            const auto coordinate = size(run.coordinate + k * coordinates + i);
            const double value = weight * fragment_value(output_, tile, i, c);
            if (run.code == TileCode::kInteger)
              o[size(transform.outliers[coordinate])] += value;
            else if (run.code == TileCode::kHalf)
              o[coordinate] += value;
            else
              y[coordinate] += value;
          }
      }
    }
    for (std::size_t j = 0; j < transform.channels.size(); ++j)
      for (std::size_t i = 0; i < y.size(); ++i)
        o[size(transform.channels[j])] += double{transform.synthesis[j * y.size() + i]} * y[i];
    const double total = packed + plain_weight * plain.y;
    double largest = 0;
    for (int channel = 0; channel < d; ++channel) {
      double& x = o[size(channel)];
      if (layer_.format.v.mean && !transform.fp16)
        x += layer_.format.v.mean->means()[size(head * d + channel)] * packed;
      x /= total;
      largest = std::max(largest, std::abs(x));
    }
    for (int channel = 0; channel < d; ++channel)
      ASSERT_NEAR(found_[row * size(d) + size(channel)], o[size(channel)], kTolerance * largest)
          << "channel " << channel << ", " << slots.size() << " slots";
    EXPECT_NEAR(found_lse_[row], std::log(2.0) * (maximum + std::log2(total)), kLogSumTolerance);
  }

  Step step_;
  DeviceLayer layer_;
  quant::RandomStream random_;
  int rows_ = 0, blocks_ = 0, segments_ = 0, tiles_ = 0, plain_tiles_ = 0;
  std::vector<std::int32_t> owner_;
  std::vector<int2> warps_;
  std::vector<float2> state_, plain_state_;
  std::vector<float4> output_, plain_output_;
  std::vector<float> found_, found_lse_;
};

class Finish : public OnDevice {};

TEST_P(Finish, MergesWhatTheWarpsLeft) {
  const std::vector<Step> steps{
      {"OneLongSequence", 2, {900}, {901}, 5, 12},
      {"Ragged", 4, {0, 3, 68, 300, 131}, {1, 4, 69, 301, 132}, 2, 4},
      {"FewWarps", 1, std::vector<int>(20, 70), std::vector<int>(20, 71), 1, 3},
      {"FourTokens", 7, {200, 64}, {204, 65}, 3, 4},
      {"GroupOf3", 3, {100, 200, 4, 66, 70, 80}, {101, 201, 5, 67, 71, 81}, 3, 4},
      {"Window", 2, {900, 10}, {901, 11}, 4, 3, 300}};
  for (const Step& step : steps) {
    SCOPED_TRACE(step.name);
    Partials(GetParam().make(), step).expect_finish();
  }
}

INSTANTIATE_TEST_SUITE_P(Plans, Finish, ::testing::ValuesIn(quant::testing::paged_plans()),
                         [](const auto& row) { return std::string(row.param.name); });

}  // namespace
}  // namespace kvplan::kernels
