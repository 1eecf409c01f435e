// The studies that need no model, at small scale, and the experiments they are made of.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "quant/codebook.h"
#include "schemas/error.h"
#include "studies/attention.h"
#include "studies/distortion.h"
#include "studies/study.h"
#include "studies/vectors.h"

namespace kvplan::studies {
namespace {

std::vector<Study> codec_studies() {
  std::vector<Study> studies;
  for (const auto part : {reference_table_studies, estimator_studies, rotation_studies})
    std::ranges::move(part(), std::back_inserter(studies));
  return studies;
}

StudyResult run_small(const Study& study, std::uint64_t seed = 0) {
  StudyContext context;
  context.scale = Scale::kSmall;
  context.seed = seed;
  StudyResult result(context.tolerance_factor());
  study.run(context, result);
  return result;
}

Array<float> rows(std::int64_t count, std::vector<float> values) {
  Array<float> x({count, static_cast<std::int64_t>(values.size()) / count});
  x.data = std::move(values);
  return x;
}

class CodecStudy : public testing::TestWithParam<Study> {};

TEST_P(CodecStudy, MeasuresWhatIsExpected) {
  const StudyResult result = run_small(GetParam());
  EXPECT_TRUE(std::ranges::any_of(result.checks(),
                                  [](const Check& check) { return check.role == Role::kClaim; }));
  for (const Check& check : result.checks()) {
    SCOPED_TRACE(check.name);
    if (check.role != Role::kReference) continue;
    EXPECT_TRUE(check.passed()) << check.measured << " is not in [" << check.low << ", "
                                << check.high << "]";
  }
  EXPECT_STREQ(verdict_letter(result.verdict()), verdict_letter(GetParam().info.expected));
  for (const StudyTable& table : result.tables())
    for (const auto& row : table.rows) EXPECT_EQ(row.size(), table.header.size()) << table.title;
}

std::vector<Study> without_a_model() {
  std::vector<Study> studies = codec_studies();
  std::erase_if(studies, [](const Study& study) { return study.info.needs_model; });
  return studies;
}

INSTANTIATE_TEST_SUITE_P(All, CodecStudy, testing::ValuesIn(without_a_model()),
                         [](const auto& study) { return study.param.info.id; });

TEST(CodecStudies, AreThoseOfTheClaims) {
  std::vector<std::string> expected = {"T1", "T2", "T3", "T4"};
  for (int i = 1; i <= 22; ++i) expected.push_back("A" + std::to_string(i));
  std::vector<std::string> ids, needing_a_model;
  for (const Study& study : codec_studies()) {
    ids.push_back(study.info.id);
    if (study.info.needs_model) needing_a_model.push_back(study.info.id);
  }
  EXPECT_EQ(ids, expected);
  EXPECT_EQ(needing_a_model, std::vector<std::string>{"A18"});
}

TEST(CodecStudies, DependOnTheSeedAlone) {
  const std::vector<Study> studies = codec_studies();
  const auto sampled = std::ranges::find(studies, "A12", [](const Study& s) { return s.info.id; });
  const auto measured = [&](std::uint64_t seed) {
    std::vector<double> values;
    const StudyResult result = run_small(*sampled, seed);
    for (const Check& check : result.checks()) values.push_back(check.measured);
    return values;
  };
  EXPECT_EQ(measured(3), measured(3));
  EXPECT_NE(measured(3), measured(4));
}

TEST(StudyVectors, StreamsAreApart) {
  std::set<std::uint32_t> first;
  const StudyContext context;
  for (const char* id : {"A1", "A2", "A12", "B1"})
    for (std::uint32_t draw = 0; draw < 3; ++draw)
      for (std::uint32_t part = 0; part < 3; ++part)
        first.insert(study_stream(context, id, draw, part).next_u32());
  EXPECT_EQ(first.size(), 36u);
}

TEST(StudyVectors, HaveTheirDistribution) {
  const StudyContext context;
  quant::RandomStream random = study_stream(context, "test");
  const Array<float> unit = unit_vectors(50, 16, random);
  for (std::size_t i = 0; i < 50; ++i) EXPECT_NEAR(squared_norm(unit.row(i)), 1, 1e-6);
  // Student's t with 8 degrees of freedom has variance 8/6.
  const Array<float> t = student_t_vectors(2000, 16, 8, random);
  EXPECT_NEAR(squared_norm(t.data) / static_cast<double>(t.data.size()), 8.0 / 6, .05);
}

TEST(StudyVectors, RelativeErrorIsAMeanOfRatios) {
  EXPECT_DOUBLE_EQ(relative_error(rows(2, {1, 0, 0, 2}), rows(2, {0, 0, 0, 1})), (1 + .25) / 2);
}

TEST(StudyVectors, UnknownBaselineIsRefused) {
  EXPECT_THROW(baseline_codec("turboquant:3+nothing", 128), ArgumentError);
}

TEST(Distortion, NearestCodeTakesTheLowerOfTies) {
  const quant::Codebook book = quant::lloyd_max_gaussian(3);
  for (std::size_t i = 0; i < book.boundaries.size(); ++i) {
    EXPECT_EQ(nearest_code(book, book.boundaries[i]), static_cast<int>(i));
    EXPECT_EQ(nearest_code(book, std::nextafter(book.boundaries[i], 9.f)), static_cast<int>(i) + 1);
  }
  EXPECT_EQ(nearest_code(book, -100), 0);
  EXPECT_EQ(nearest_code(book, 100), 7);
}

// One bit sends (.6, .8) to c = (l, l): x_hat = (l, l)/sqrt(2), of norm l, at cosine 1.4/sqrt(2).
TEST(Distortion, ErrorsOfAVectorByHand) {
  const quant::Codebook book = quant::lloyd_max_gaussian(1);
  const double level = std::sqrt(2 / std::acos(-1.0));
  CodebookErrors errors(book);
  errors.add(rows(1, {.6f, .8f}));
  EXPECT_NEAR(errors.norm_error(), 1 - level, 1e-6);
  EXPECT_NEAR(errors.direction_error(), 1 - 1.4 / std::sqrt(2.0), 1e-6);
  EXPECT_NEAR(errors.distortion(), 1 - 2 * level * 1.4 / std::sqrt(2.0) + level * level, 1e-6);
}

TEST(Distortion, IndexEntropyOfOneBit) {
  EXPECT_NEAR(index_entropy_bits(quant::lloyd_max_gaussian(1)), 1, 1e-12);
}

TEST(Attention, TwoKeysByHand) {
  const Array<float> logits = attention_logits(rows(1, {2, 0}), rows(2, {1, 5, 0, 7}), .5);
  EXPECT_EQ(logits.data, (std::vector<float>{1, 0}));
  const std::vector<double> p = softmax(logits.row(0));
  const double first = 1 / (1 + std::exp(-1.0));
  EXPECT_NEAR(p[0], first, 1e-12);
  EXPECT_NEAR(p[0] + p[1], 1, 1e-12);
  EXPECT_NEAR(entropy(p), -first * std::log(first) - (1 - first) * std::log(1 - first), 1e-12);
  // Against equal logits the divergence is log 2 less the entropy.
  EXPECT_NEAR(softmax_kl(logits.row(0), std::vector<float>{3, 3}), std::log(2.0) - entropy(p),
              1e-12);
  // A shift of all logits is no error; errors (-1, 0) have variance p0 p1.
  EXPECT_NEAR(half_error_variance(logits, rows(1, {4, 3})), 0, 1e-12);
  EXPECT_NEAR(half_error_variance(logits, rows(1, {0, 0})), first * (1 - first) / 2, 1e-12);
}

TEST(Attention, LargeLogitsStayFinite) {
  const Array<float> exact = rows(1, {1000, 0}), other = rows(1, {0, 1000});
  EXPECT_NEAR(attention_kl(exact, other), 1000, 1e-9);
  EXPECT_EQ(attention_kl(exact, exact), 0);
}

}  // namespace
}  // namespace kvplan::studies
