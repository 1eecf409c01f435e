// Baseline policies on hand-made layer summaries.

#include "planner/policies.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <tuple>
#include <vector>

#include "schemas/error.h"

namespace kvplan::planner {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::IsEmpty;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<LayerSummary> with_weight_mse(const std::vector<double>& values) {
  std::vector<LayerSummary> layers(values.size());
  for (std::size_t l = 0; l < values.size(); ++l) layers[l].weight_mse = values[l];
  return layers;
}

std::vector<LayerSummary> with_norm_ratio(const std::vector<double>& values) {
  std::vector<LayerSummary> layers(values.size());
  for (std::size_t l = 0; l < values.size(); ++l) layers[l].norm_ratio = values[l];
  return layers;
}

TEST(UniformWidths, AreTheSameEverywhere) {
  EXPECT_THAT(uniform_widths(3, 4, 2),
              ElementsAre(SideWidths{4, 2}, SideWidths{4, 2}, SideWidths{4, 2}));
  EXPECT_THAT(uniform_widths(2, 16, 0), Each(SideWidths{16, 0}));
  for (const auto& [layers, k, v] : std::vector<std::tuple<int, int, int>>{
           {0, 3, 3}, {-1, 3, 3}, {2, 9, 3}, {2, 3, -1}, {2, 3, 17}}) {
    EXPECT_THROW(uniform_widths(layers, k, v), ArgumentError);
  }
}

struct RankRow {
  const char* name;
  std::vector<double> weight_mse;
  std::vector<int> widths;
};

class Rank432 : public testing::TestWithParam<RankRow> {};

TEST_P(Rank432, RanksByWeightMse) {
  std::vector<SideWidths> expected;
  for (int width : GetParam().widths) expected.push_back({width, width});
  EXPECT_EQ(rank432_widths(with_weight_mse(GetParam().weight_mse)), expected);
}

INSTANTIATE_TEST_SUITE_P(
    Rows, Rank432,
    testing::Values(
        RankRow{"Four", {3, 1, 4, 2}, {3, 2, 4, 3}},
        RankRow{"ThreeHaveNoQuarter", {3, 1, 4}, {3, 3, 3}},
        RankRow{"SevenRoundDown", {1, 2, 3, 4, 5, 6, 7}, {2, 3, 3, 3, 3, 3, 4}},
        RankRow{"Eight", {8, 7, 6, 5, 4, 3, 2, 1}, {4, 4, 3, 3, 3, 3, 2, 2}},
        RankRow{"TiesFavourLowerLayers", {5, 5, 5, 5, 5, 5, 5, 5}, {4, 4, 3, 3, 3, 3, 2, 2}}),
    [](const auto& row) { return row.param.name; });

TEST(Rank432, RefusesMissingFigures) {
  EXPECT_THROW(rank432_widths({}), ArgumentError);
  EXPECT_THAT([] { rank432_widths(with_weight_mse({1, 2, kNan})); },
              testing::ThrowsMessage<ArgumentError>(testing::HasSubstr("layer 2")));
}

struct RatioRow {
  const char* name;
  std::vector<double> norm_ratio;
  SideWidths widths;
};

class NormRatio : public testing::TestWithParam<RatioRow> {};

TEST_P(NormRatio, TakesTheModelsMean) {
  const std::vector<SideWidths> widths = norm_ratio_widths(with_norm_ratio(GetParam().norm_ratio));
  EXPECT_EQ(widths.size(), GetParam().norm_ratio.size());
  EXPECT_THAT(widths, Each(GetParam().widths));
}

INSTANTIATE_TEST_SUITE_P(Rows, NormRatio,
                         testing::Values(RatioRow{"Small", {1, 2}, {3, 3}},
                                         RatioRow{"MeanBelowTen", {18, 1}, {3, 3}},
                                         RatioRow{"Ten", {10, 10}, {6, 3}},
                                         RatioRow{"MeanBelowHundred", {150, 40}, {6, 3}},
                                         RatioRow{"Hundred", {100}, {8, 3}},
                                         RatioRow{"Large", {1, 600}, {8, 3}}),
                         [](const auto& row) { return row.param.name; });

TEST(NormRatio, RefusesMissingFigures) {
  EXPECT_THROW(norm_ratio_widths({}), ArgumentError);
  EXPECT_THROW(norm_ratio_widths(with_norm_ratio({kNan})), ArgumentError);
}

constexpr int kHeads = 2, kHeadDim = 16;

/// RMS 1 in every channel of one layer.
std::vector<std::vector<double>> flat_rms() { return {std::vector<double>(kHeads * kHeadDim, 1)}; }

std::vector<LayerSummary> with_outliers(std::vector<int> channels) {
  std::vector<LayerSummary> layers(1);
  layers[0].outlier_channels_k = std::move(channels);
  return layers;
}

TEST(Outlier83, PadsWithTheNextLargestRms) {
  auto rms = flat_rms();
  rms[0] = {
      9, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 1, 1, 1, 1, 1,   // head 0: outlier 0, next 8 7 6 5 4 3 2
      1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};  // head 1: none
  const auto channels = outlier83_channels(with_outliers({0}), rms, kHeads, kHeadDim);
  ASSERT_EQ(channels.size(), 1u);
  EXPECT_THAT(channels[0], ElementsAre(ElementsAre(0, 2, 3, 4, 5, 6, 7, 8), IsEmpty()));
}

TEST(Outlier83, TiesFavourLowerChannels) {
  const auto channels =
      outlier83_channels(with_outliers({31, 19, 19}), flat_rms(), kHeads, kHeadDim);
  EXPECT_THAT(channels[0], ElementsAre(IsEmpty(), ElementsAre(0, 1, 2, 3, 4, 5, 6, 15)));
}

TEST(Outlier83, FullMultipleIsNotPadded) {
  const auto channels =
      outlier83_channels(with_outliers({7, 6, 5, 4, 3, 2, 1, 0}), flat_rms(), kHeads, kHeadDim);
  EXPECT_THAT(channels[0], ElementsAre(ElementsAre(0, 1, 2, 3, 4, 5, 6, 7), IsEmpty()));
}

TEST(Outlier83, NineBecomeSixteen) {
  const auto channels =
      outlier83_channels(with_outliers({8, 7, 6, 5, 4, 3, 2, 1, 0}), flat_rms(), kHeads, kHeadDim);
  EXPECT_EQ(channels[0][0].size(), 16u);
}

TEST(Outlier83, RefusesWhatDoesNotMatch) {
  const auto good = with_outliers({0});
  EXPECT_THROW(outlier83_channels(good, {}, kHeads, kHeadDim), ArgumentError);
  EXPECT_THROW(outlier83_channels(good, {{1, 2, 3}}, kHeads, kHeadDim), ArgumentError);
  EXPECT_THROW(outlier83_channels(good, flat_rms(), kHeads, 12), ArgumentError);
  EXPECT_THROW(outlier83_channels(good, flat_rms(), 0, kHeadDim), ArgumentError);
  for (int channel : {-1, kHeads * kHeadDim}) {
    EXPECT_THROW(outlier83_channels(with_outliers({channel}), flat_rms(), kHeads, kHeadDim),
                 ArgumentError);
  }
  auto bad_rms = flat_rms();
  bad_rms[0][3] = kNan;
  EXPECT_THROW(outlier83_channels(good, bad_rms, kHeads, kHeadDim), ArgumentError);
}

}  // namespace
}  // namespace kvplan::planner
