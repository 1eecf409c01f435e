// Cost tables and plans of rotated codecs, with outlier channels.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "quant/codebook.h"
#include "quant/codec.h"
#include "quant/fit.h"
#include "quant/moments.h"
#include "schemas/error.h"
#include "tests/quant/fit_fixtures.h"

namespace kvplan::quant {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::kNoHeader;
using testing::rotated_options;
using testing::same_widths;
using testing::small_options;
using testing::small_profile;

TEST(RotatedFit, OneUnitPerHeadAndItsCost) {
  FitOptions options = rotated_options();
  options.scale_rule = "one";
  options.coherent_drop = false;
  const Fit fit(small_profile(), options);
  ASSERT_EQ(fit.costs().units.size(), 8u);
  EXPECT_EQ(fit.costs().fixed_bits, 8 * 16);
  const HeadMoments m = head_moments(small_profile(), 1, Side::kValue, 0, 40);
  double fisher_trace = 0, second_trace = 0;
  for (std::size_t i = 0; i < 32; ++i) {
    fisher_trace += m.fisher[i * 33];
    second_trace += m.second[i * 33];
  }
  const CostUnit& unit = fit.costs().units[6];
  EXPECT_EQ(unit.choices[3].size_bits, 3 * 32);
  for (const int width : {0, 1, 3, 6}) {
    const double distortion = width == 0 ? 1 : codebook("lloyd_max_byte", width).distortion;
    EXPECT_NEAR(unit.choices[static_cast<std::size_t>(width)].cost,
                distortion * fisher_trace * second_trace / 32 / 2, 1e-10)
        << width;
  }

  options.codebooks = {{3, "lloyd_max_beta"}};
  const Fit beta(small_profile(), options);
  EXPECT_LT(beta.costs().units[6].choices[3].cost, unit.choices[3].cost);
  EXPECT_EQ(beta.costs().units[6].choices[4].cost, unit.choices[4].cost);
}

TEST(RotatedFit, ShrinkageThatAllTokensShareCostsMore) {
  // Gradients that agree with the vectors: every window's sum of h x^T is 40 times the identity.
  Profile profile = small_profile();
  for (LayerProfile& layer : profile.layers) {
    for (const Side side : kSides) {
      SideSums& sums = layer.side(side);
      std::fill(sums.phase.data.begin(), sums.phase.data.end(), 0.0f);
      const auto d = static_cast<std::size_t>(layer.head_dim);
      for (std::size_t i = 0; i < sums.cross.data.size(); ++i)
        sums.cross.data[i] = i % (d * d) % (d + 1) == 0 ? 40.0f : 0.0f;
    }
  }
  const auto costs = [&](const char* rule, bool coherent) {
    FitOptions options = rotated_options();
    options.scale_rule = rule;
    options.coherent_drop = coherent;
    return Fit(profile, options).costs().units[0].choices;
  };
  const auto apart = costs("one", false), together = costs("one", true);
  const double dropped = together[0].cost - apart[0].cost;
  EXPECT_GT(dropped, apart[0].cost);
  for (std::size_t width = 1; width < together.size(); ++width) {
    const double shrunk = codebook("lloyd_max_byte", static_cast<int>(width)).distortion;
    EXPECT_NEAR(together[width].cost - apart[width].cost, shrunk * shrunk * dropped,
                1e-9 * dropped);
  }
  EXPECT_EQ(costs("unbiased", true)[2].cost, costs("unbiased", false)[2].cost);
}

TEST(RotatedFit, ScaleRulesRankAsTheirErrorsDo) {
  const auto cost = [](const char* rule) {
    FitOptions options = rotated_options();
    options.scale_rule = rule;
    return Fit(small_profile(), options).costs().units[0].choices[2].cost;
  };
  EXPECT_EQ(cost("one"), cost("biased"));
  EXPECT_LT(cost("biased"), cost("norm_corrected"));
  EXPECT_LT(cost("norm_corrected"), cost("unbiased"));
}

TEST(RotatedFit, OutlierChannelsAreStoredAndPaidFor) {
  const Fit fit(small_profile(), rotated_options());
  std::vector<Fit::LayerWidths> widths = same_widths(2, 3, 8);
  const PlanBundle plain = fit.assemble(widths, kNoHeader);
  EXPECT_EQ(plain.plan.group_size, 32);
  EXPECT_EQ(plain.plan.norm, "fp16");
  EXPECT_DOUBLE_EQ(plain.plan.effective_bits, (3 + 8) / 2.0 + 0.5);
  EXPECT_EQ(plain.plan.static_bytes, 32 * 32 * 2 + 8 * 32 * 4 + (8 + 256) * 4);
  EXPECT_THAT(plain.tensors.layers[0].k.analysis.data, IsEmpty());

  const std::vector<int> first_eight = {0, 1, 2, 3, 4, 5, 6, 7};
  widths[1].outliers_k = {first_eight, {}};
  const PlanBundle split = fit.assemble(widths, kNoHeader);
  EXPECT_EQ(split.plan.layers[1].k.heads[0].outliers, first_eight);
  EXPECT_THAT(split.plan.layers[1].k.heads[1].outliers, IsEmpty());
  EXPECT_DOUBLE_EQ(split.plan.layers[1].k.bits, ((8 * 8 + 24 * 3) / 32.0 + 3) / 2);
  EXPECT_GT(split.plan.effective_bits, plain.plan.effective_bits);
  EXPECT_LT(split.plan.predicted_kl, plain.plan.predicted_kl);
  EXPECT_EQ(split.plan.static_bytes, plain.plan.static_bytes + 24 * 24 * 2 + 8 * 4)
      << "a second Haar matrix for the rest and a list of channels";
}

TEST(RotatedFit, OffersOutlierChannelsAsChoices) {
  FitOptions options = rotated_options();
  options.outlier_counts = {8, 16};
  const Fit with(small_profile(), options), without(small_profile(), rotated_options());
  const CostTable &table = with.costs(), &plain = without.costs();
  Allocation allocation;
  for (std::size_t u = 0; u < table.units.size(); ++u) {
    const CostUnit& unit = table.units[u];
    ASSERT_EQ(unit.choices.size(), 3 * plain.units[u].choices.size());
    int chosen = -1;
    for (std::size_t c = 0; c < unit.choices.size(); ++c) {
      const CostChoice& choice = unit.choices[c];
      if (c > 0) {
        EXPECT_GE(choice.size_bits, unit.choices[c - 1].size_bits);
      }
      if (choice.width == 3 && choice.outliers == 8) chosen = static_cast<int>(c);
      if (choice.outliers == 0) {
        EXPECT_EQ(choice.cost, plain.units[u].choices[static_cast<std::size_t>(choice.width)].cost);
      }
    }
    ASSERT_GE(chosen, 0);
    allocation.choice.push_back(chosen);
    allocation.size_bits += unit.choices[static_cast<std::size_t>(chosen)].size_bits;
    allocation.cost += unit.choices[static_cast<std::size_t>(chosen)].cost;
  }
  const PlanBundle bundle = with.assemble(allocation, kNoHeader);
  EXPECT_NEAR(bundle.plan.predicted_kl, allocation.cost, 1e-12 * allocation.cost);
  EXPECT_NEAR(bundle.plan.effective_bits * static_cast<double>(table.elements),
              static_cast<double>(allocation.size_bits + table.fixed_bits), 1e-6);
  for (const LayerPlan& layer : bundle.plan.layers)
    for (const HeadPlan& head : layer.k.heads) EXPECT_EQ(head.outliers.size(), 8u);
}

TEST(RotatedFit, RefusesImpossibleOutliers) {
  const Fit rotated(small_profile(), rotated_options()),
      calibrated(small_profile(), small_options());
  const std::vector<int> eight = {0, 1, 2, 3, 4, 5, 6, 7};
  const std::vector<int> outside = {0, 1, 2, 3, 4, 5, 6, 32}, twice = {0, 1, 2, 3, 4, 5, 6, 6};
  std::vector<int> all(32);
  std::iota(all.begin(), all.end(), 0);
  for (const auto& lists :
       std::vector<std::vector<std::vector<int>>>{{eight},
                                                  {{0, 1}, {}},
                                                  {outside, {}},
                                                  {twice, {}},
                                                  {all, {}},
                                                  {{-1, 1, 2, 3, 4, 5, 6, 7}, {}}}) {
    auto widths = same_widths(2, 3, 3);
    widths[0].outliers_v = lists;
    EXPECT_THROW(rotated.assemble(widths, kNoHeader), ArgumentError)
        << ::testing::PrintToString(lists);
  }
  auto widths = same_widths(2, 3, 3);
  widths[0].outliers_v = {eight, eight};
  EXPECT_THROW(calibrated.assemble(widths, kNoHeader), ArgumentError);
}

}  // namespace
}  // namespace kvplan::quant
