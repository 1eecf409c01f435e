// Fragments, biases and centring terms of `prepare` against sums in double.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <numbers>

#include "kernels/views.h"
#include "tests/kernels/device_layer.h"

namespace kvplan::kernels {
namespace {

using namespace kvplan::kernels::testing;
using quant::SideLayout;
using quant::TileCode;
using quant::TileRun;

constexpr double kHalfRounding = 1.0 / 1024;  // of the largest number of a column: fp16 twice over
constexpr double kFloatRounding = 1e-5;
constexpr double kScale = 0.31;

/// Sequences of a step and query heads per KV head.
struct Step {
  const char* name;
  int queries_per_kv;
  std::vector<int> new_tokens;
};

double half_of(std::uint32_t pair, int half) {
  return quant::from_half(static_cast<std::uint16_t>(pair >> 16 * half));
}
double element(const uint2& fragment, int reg, int half) {
  return half_of(reg == 0 ? fragment.x : fragment.y, half);
}

class Prepared {
 public:
  Prepared(const PlanBundle& bundle, const Step& step)
      : layer_(bundle, 0, static_cast<int>(step.new_tokens.size()), 400),
        new_tokens_(step.new_tokens),
        group_(step.queries_per_kv) {
    std::vector<int> before, after;
    for (std::size_t i = 0; i < new_tokens_.size(); ++i) {
      before.push_back(60 + static_cast<int>(i));
      after.push_back(before.back() + new_tokens_[i]);
    }
    const auto batch = layer_.batch(before, after);
    const int d = layer_.view.head_dim, heads = layer_.view.kv_heads * group_;
    q_ = random_halves(size(batch.rows) * size(heads * d), 9);
    blocks_ = (batch.view.max_new_tokens * group_ + kColumns - 1) / kColumns;
    segments_ = static_cast<int>(new_tokens_.size()) * layer_.view.kv_heads * blocks_;
    for (const quant::HeadLayout& head : layer_.format.heads)
      tiles_ = std::max(tiles_, head.k.tiles);
    plain_tiles_ = plain_tiles(d);

    const DeviceArray<std::uint16_t> q(q_);
    const DeviceArray<uint2> query(size(segments_ * tiles_) * quant::kWarpLanes);
    const DeviceArray<float2> plain_state(size(segments_) * kColumns);
    const DeviceArray<float4> plain_output(size(segments_ * plain_tiles_) * quant::kWarpLanes);
    const DeviceContents contents(layer_.contents);
    const DeviceArray<float2> bias(size(segments_) * kColumns);
    const DeviceArray<float> constant(size(segments_) * kColumns);
    const DeviceArray<float2> centre(size(segments_ * frequencies()) * kColumns + 1);
    AttentionView view;
    view.layer = layer_.view;
    contents.attach(view.layer);
    view.batch = batch.view;
    view.queries_per_kv = group_;
    view.column_blocks = blocks_;
    view.scale = static_cast<float>(kScale);
    view.q = q.data();
    view.query = query.data();
    view.query_tiles = tiles_;
    view.plain_state = plain_state.data();
    view.plain_output = plain_output.data();
    view.plain_tiles = plain_tiles_;
    view.bias = bias.data();
    view.constant = constant.data();
    view.centre = centre.data();
    EXPECT_EQ(prepare(view, nullptr), cudaSuccess);
    query_ = query.host();
    bias_ = bias.host();
    constant_ = constant.host();
    centre_ = centre.host();
  }

  void expect_all() const {
    int first_row = 0;
    for (std::size_t i = 0; i < new_tokens_.size(); ++i) {
      for (int head = 0; head < layer_.view.kv_heads; ++head)
        for (int column = 0; column < blocks_ * kColumns; ++column) {
          SCOPED_TRACE("sequence " + std::to_string(i) + " head " + std::to_string(head) +
                       " column " + std::to_string(column));
          const int segment =
              (static_cast<int>(i) * layer_.view.kv_heads + head) * blocks_ + column / kColumns;
          expect_column(head, segment, column % kColumns,
                        scaled_query(first_row, new_tokens_[i], head, column));
        }
      first_row += new_tokens_[i];
    }
  }

 private:
  int frequencies() const { return 8 * layer_.view.phase_steps; }

  /// In units of log2; zeros for a column without query.
  std::vector<double> scaled_query(int first_row, int tokens, int head, int column) const {
    const int d = layer_.view.head_dim, token = column / group_;
    std::vector<double> q(size(d));
    if (token >= tokens) return q;
    const int row =
        (first_row + token) * layer_.view.kv_heads * group_ + head * group_ + column % group_;
    for (int j = 0; j < d; ++j)
      q[size(j)] = kScale * std::numbers::log2e * quant::from_half(q_[size(row * d + j)]);
    return q;
  }

  void expect_column(int head, int segment, int c, const std::vector<double>& q) const {
    const quant::HeadTransform& transform = layer_.format.k.heads[size(head)];
    const SideLayout& layout = layer_.format.heads[size(head)].k;
    std::vector<double> y(size(transform.coded()));
    for (std::size_t i = 0; i < y.size(); ++i)
      for (std::size_t j = 0; j < transform.channels.size(); ++j)
        y[i] += double{transform.synthesis[j * y.size() + i]} * q[size(transform.channels[j])];
    double largest = 1e-9;
    for (const double value : y) largest = std::max(largest, std::abs(value));
    for (const double value : q) largest = std::max(largest, std::abs(value));

    // Lanes of the matrix column of 16-bit numbers, and of the two of digits.
    const int half_lane = 4 * (2 * (c % 4) + c / 4);
    const float2 bias_unit = bias_[size(segment * kColumns + c)];
    int first_tile = 0;
    double bias = 0, bias_size = 0;
    for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
      const TileRun& run = layout.runs[r];
      for (int tile = 0; tile < run.tiles; ++tile)
        for (int row = 0; row < quant::kTileCoordinates; ++row) {
          const int coordinates = quant::tile_coordinates(run.half != 0);
          const int coordinate = run.coordinate + tile * coordinates + row;
          double expected = 0;
          if (row >= coordinates)
            expected = 0;
          else if (run.code == TileCode::kInteger)
            expected = q[size(transform.outliers[size(coordinate)])];
          else if (run.code == TileCode::kHalf)
            expected = q[size(coordinate)];
          else
            expected = y[size(coordinate)];
          const bool high = row >= quant::kTileCoordinates / 2;
          const uint2* const fragments =
              query_.data() + (segment * tiles_ + first_tile + tile) * 32 + row % 8 / 2;
          if (run.code != TileCode::kBytes) {
            ASSERT_NEAR(element(fragments[half_lane], high, row % 2), expected,
                        kHalfRounding * largest)
                << "run " << r << " tile " << tile << " row " << row;
            continue;
          }
          bias += run.step * run.byte_offset * expected;
          bias_size += run.step * std::abs(run.byte_offset) * largest;
          const auto digit = [&](int place) {  // 0 high, 1 low
            const uint2 f = fragments[4 * (2 * (c % 4) + place)];
            const std::uint32_t word = c < 4 ? f.x : f.y;
            return static_cast<std::int8_t>(word >> 8 * (2 * (row % 2) + high) & 0xff);
          };
          ASSERT_NEAR((256 * digit(0) + digit(1)) * double{bias_unit.y}, run.step * expected,
                      .5 * bias_unit.y + kFloatRounding * largest * run.step)
              << "run " << r << " tile " << tile << " row " << row;
        }
      first_tile += run.tiles;
    }
    EXPECT_NEAR(bias_unit.x, bias, kFloatRounding * bias_size + 1e-6);
    if (layer_.format.k.mean) expect_centre(head, segment, c, q);
  }

  /// The (a, b) give what the turned mean and the query give at a position.
  void expect_centre(int head, int segment, int c, const std::vector<double>& q) const {
    const int d = layer_.view.head_dim, position = 137;
    const quant::RotaryMean& mean = *layer_.format.k.mean;
    std::vector<float> turned(size(layer_.view.kv_heads * d));
    mean.fill(position, 1, turned);
    double expected = 0, magnitude = 1e-6;
    for (int j = 0; j < d; ++j) {
      const double product = q[size(j)] * turned[size(head * d + j)];
      expected += product;
      magnitude += std::abs(product);
    }
    if (layer_.format.k.heads[size(head)].fp16) expected = 0;
    double found = constant_[size(segment * kColumns + c)];
    for (int f = 0; f < frequencies(); ++f) {
      const float2 ab = centre_[size((segment * frequencies() + f) * kColumns + c)];
      if (size(f) >= mean.inv_freq().size()) {
        EXPECT_EQ(ab.x, 0);
        EXPECT_EQ(ab.y, 0);
        continue;
      }
      const double angle = position * mean.inv_freq()[size(f)];
      found += ab.x * std::cos(angle) - ab.y * std::sin(angle);
    }
    EXPECT_NEAR(found, expected, kFloatRounding * magnitude);
  }

  DeviceLayer layer_;
  std::vector<int> new_tokens_;
  int group_, blocks_ = 0, segments_ = 0, tiles_ = 0, plain_tiles_ = 0;
  std::vector<std::uint16_t> q_;
  std::vector<uint2> query_;
  std::vector<float> constant_;
  std::vector<float2> bias_, centre_;
};

class Prepare : public OnDevice {};

TEST_P(Prepare, FragmentsAndTermsOfAllSteps) {
  const std::vector<Step> steps{
      {"OneToken", 2, {1, 1, 1}},          {"OneQuery", 1, std::vector<int>(20, 1)},
      {"GroupOf3", 3, {1, 2, 1, 1, 2, 1}}, {"GroupOf7", 7, {1}},
      {"GroupOf16", 16, {1, 1}},           {"FourTokens", 4, {4, 1, 3}}};
  for (const Step& step : steps) {
    SCOPED_TRACE(step.name);
    Prepared(GetParam().make(), step).expect_all();
  }
}

INSTANTIATE_TEST_SUITE_P(Plans, Prepare, ::testing::ValuesIn(quant::testing::paged_plans()),
                         [](const auto& row) { return std::string(row.param.name); });

}  // namespace
}  // namespace kvplan::kernels
