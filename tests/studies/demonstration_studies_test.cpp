// The studies of demonstrations, sizes, allocation, offsets and query groups at small scale, and
// the measures they are made of.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <vector>

#include "schemas/error.h"
#include "studies/absmax.h"
#include "studies/common_mode.h"
#include "studies/grouped_queries.h"
#include "studies/rank_correlation.h"
#include "studies/sensitivity.h"
#include "studies/study.h"
#include "tests/models/tiny_model.h"
#include "tests/temporary_folder.h"

namespace kvplan::studies {
namespace {

struct ExpectedVerdict {
  const char* id;
  const char* letter;
};

std::vector<Study> studies_under_test() {
  std::vector<Study> all;
  for (const auto part : {demonstration_studies, size_studies, allocation_studies})
    std::ranges::move(part(), std::back_inserter(all));
  all.push_back(offset_study());
  all.push_back(grouped_query_study());
  return all;
}

class DemonstrationStudy : public testing::TestWithParam<ExpectedVerdict> {};

TEST_P(DemonstrationStudy, ReachesItsVerdictAtSmallScale) {
  const std::vector<Study> studies = studies_under_test();
  const auto study =
      std::ranges::find_if(studies, [](const Study& s) { return s.info.id == GetParam().id; });
  ASSERT_NE(study, studies.end());
  StudyContext context;
  context.scale = Scale::kSmall;
  const Outcome outcome = run_studies({&*study}, context, 1, RunControl{}).front();
  EXPECT_STREQ(verdict_letter(outcome.verdict), GetParam().letter);
  for (const Check& check : outcome.result.checks()) {
    EXPECT_TRUE(check.role != Role::kReference || check.passed())
        << check.name << ": " << check.measured << " is not in [" << check.low << ", " << check.high
        << "]";
  }
  const bool runs = outcome.verdict != Verdict::kNotRun;
  EXPECT_EQ(runs, !study->info.needs_model);
  EXPECT_EQ(runs, !outcome.result.checks().empty());
  EXPECT_TRUE(!runs || outcome.verdict == study->info.expected);
}

INSTANTIATE_TEST_SUITE_P(Claims, DemonstrationStudy,
                         testing::Values(ExpectedVerdict{"B1", "E"}, ExpectedVerdict{"B2", "C"},
                                         ExpectedVerdict{"B3", "E"}, ExpectedVerdict{"B4", "R"},
                                         ExpectedVerdict{"B5", "R"}, ExpectedVerdict{"B6", "R"},
                                         ExpectedVerdict{"B7", "R"}, ExpectedVerdict{"B8", "E"},
                                         ExpectedVerdict{"B9", "E"}, ExpectedVerdict{"C1", "E"},
                                         ExpectedVerdict{"C2", "C"}, ExpectedVerdict{"C3", "R"},
                                         ExpectedVerdict{"C4", "R"}, ExpectedVerdict{"C5", "E"},
                                         ExpectedVerdict{"C6", "E"}, ExpectedVerdict{"C7", "R"},
                                         ExpectedVerdict{"C8", "E"}, ExpectedVerdict{"D1", "E"},
                                         ExpectedVerdict{"D2", "E"}, ExpectedVerdict{"D3", "E"},
                                         ExpectedVerdict{"D4", "-"}, ExpectedVerdict{"F2", "E"},
                                         ExpectedVerdict{"F5", "C"}),
                         [](const auto& row) { return std::string(row.param.id); });

TEST(DemonstrationStudies, AllHaveAnExpectedVerdictHere) {
  EXPECT_EQ(studies_under_test().size(), 23u);
}

TEST(DemonstrationStudies, EqualSeedsGiveEqualNumbersAndOthersDoNot) {
  const std::vector<Study> studies = studies_under_test();
  const Study& study = *std::ranges::find(studies, "B8", [](const Study& s) { return s.info.id; });
  const auto measured = [&](std::uint64_t seed) {
    StudyContext context;
    context.scale = Scale::kSmall;
    context.seed = seed;
    std::vector<double> values;
    for (const Check& check :
         run_studies({&study}, context, 1, RunControl{}).front().result.checks())
      values.push_back(check.measured);
    return values;
  };
  EXPECT_EQ(measured(3), measured(3));
  EXPECT_NE(measured(3), measured(4));
}

TEST(AllocationStudies, MeasureOnAModelToo) {
  constexpr int kWindow = 48;
  const auto window = [](std::int64_t index) {
    quant::RandomStream stream(1, quant::StreamPurpose::kTest, static_cast<std::uint32_t>(index));
    tokenizers::TextWindow text{index, 0, {}};
    for (int t = 0; t < kWindow; ++t)
      text.tokens.push_back(static_cast<std::int32_t>(stream.next_below(50)));
    return text;
  };
  models::ModelConfig config = models::tiny_config();
  config.num_layers = 4;
  config.head_dim = config.rotary_dim = 32;
  const models::TinyModel model(config, 1, 2.0);
  const TemporaryFolder folder;
  ModelLab lab(
      model, {window(0), window(1)},
      {{.name = "text", .sha256 = std::string(64, '0'), .tokens = 2 * kWindow}}, {window(2)},
      {.window = kWindow, .calibration_tokens = 2 * kWindow, .threads = 1, .folder = folder.path()},
      {});
  StudyContext context;
  context.scale = Scale::kSmall;
  context.lab = &lab;
  for (const Study& study : allocation_studies()) {
    if (!study.info.uses_model) continue;
    SCOPED_TRACE(study.info.id);
    StudyResult result(context.tolerance_factor());
    study.run(context, result);
    EXPECT_NE(result.verdict(), Verdict::kNotRun);
    for (const Check& check : result.checks())
      EXPECT_FALSE(std::isnan(check.measured)) << check.name;
    ASSERT_FALSE(result.tables().empty());
    for (const StudyTable& table : result.tables())
      for (const auto& row : table.rows) EXPECT_EQ(row.size(), table.header.size()) << table.title;
    if (study.info.id != "D3") continue;
    // Each estimator agrees with itself: name, five correlations, largest layer, seconds.
    const auto& rows = result.tables().back().rows;
    ASSERT_EQ(rows.size(), 5u);
    for (std::size_t i = 0; i < rows.size(); ++i) EXPECT_EQ(rows[i][i + 1], "1") << rows[i][0];
  }
}

TEST(NormScaling, RefutesTheRatioRule) {
  StudyContext context;
  context.scale = Scale::kSmall;
  StudyResult result(context.tolerance_factor());
  run_norm_scaling(context, result);
  EXPECT_EQ(result.verdict(), Verdict::kRefuted);
  EXPECT_EQ(result.missed_references(), 0);
}

TEST(Absmax, RoundsToStepsOfTheLargestValue) {
  const std::vector<float> x = {-8, 1.9f, 2.1f, 6, 0};
  EXPECT_EQ(absmax_round_trip(x, 2), (std::vector<float>{-8, 0, 4, 8, 0}));
  EXPECT_EQ(absmax_round_trip(std::vector<float>(3), 7), std::vector<float>(3));
  EXPECT_TRUE(absmax_round_trip({}, 7).empty());
  EXPECT_EQ(absmax(x), 8);
}

TEST(RankCorrelation, IgnoresScaleAndSharesTies) {
  const std::vector<double> a = {1, 2, 3, 4}, cubes = {1, 8, 27, 64}, falling = {9, 3, 1, 0};
  EXPECT_DOUBLE_EQ(rank_correlation(a, cubes), 1);
  EXPECT_LT(correlation(a, cubes), .96);
  EXPECT_DOUBLE_EQ(rank_correlation(a, falling), -1);
  // Ranks 0 1.5 1.5 3 against 0 1 2 3: 4.5 / sqrt(4.5 * 5).
  EXPECT_NEAR(rank_correlation(a, std::vector<double>{1, 5, 5, 6}), std::sqrt(.9), 1e-12);
  EXPECT_EQ(rank_correlation(a, std::vector<double>(4, 2.0)), 0);
  EXPECT_THROW(rank_correlation(a, std::vector<double>{1, 2}), ArgumentError);
  EXPECT_THROW(rank_correlation(std::vector<double>{1}, std::vector<double>{1}), ArgumentError);
}

TEST(Sensitivity, ReadsTheProfileSummary) {
  Profile profile;
  profile.layers.resize(2);
  EXPECT_THROW(weight_mse_sensitivity(profile), InputError);
  EXPECT_THROW(fisher_sensitivity(profile, .1), InputError);
  profile.summary.resize(2);
  profile.summary[1].weight_mse = 3;
  profile.summary[1].sensitivity_k = 2;
  profile.summary[1].sensitivity_v = 4;
  EXPECT_EQ(weight_mse_sensitivity(profile), (std::vector<double>{0, 3}));
  EXPECT_EQ(fisher_sensitivity(profile, .5), (std::vector<double>{0, 3}));
}

TEST(Sensitivity, MeasuresWhatIsReadBack) {
  calib::LayerCapture layer;
  layer.q = Array<float>({2, 3, 4}, 1);
  layer.k_pre = layer.k = layer.v = Array<float>({1, 3, 4}, 1);
  StoredLayer exact{layer.k, layer.v}, off = exact;
  for (float& value : off.k.data) value += 1;
  for (float& value : off.v.data) value += 2;
  const std::vector<calib::LayerCapture> capture = {layer, layer};
  // Per token 4 channels, each off by 1 in k and by 2 in v.
  EXPECT_EQ(activation_mse_sensitivity(capture, {exact, off}), (std::vector<double>{0, 4 + 16}));
  // All keys are alike, so attention is even and every output 1 becomes 3.
  const std::vector<double> output = output_error_sensitivity(capture, {exact, off}, 0, 1);
  EXPECT_EQ(output[0], 0);
  EXPECT_NEAR(output[1], 4, 1e-6);
  EXPECT_THROW(activation_mse_sensitivity(capture, {exact}), ArgumentError);
  EXPECT_THROW(output_error_sensitivity(capture, {exact}, 0, 1), ArgumentError);
}

}  // namespace
}  // namespace kvplan::studies
