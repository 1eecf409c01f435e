#include "quant/moments.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numbers>

#include "schemas/error.h"
#include "tests/quant/synthetic_profile.h"

namespace kvplan::quant {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pointwise;
using testing::Vector;

constexpr double kTwoPi = 2 * std::numbers::pi;

Vector random_matrix(std::size_t d, std::uint64_t seed) {
  RandomStream random(seed, StreamPurpose::kTest);
  return testing::normal_vector(random, d * d);
}

/// Mean of R_t X R_t^T position by position: rotate the columns, then the rows.
Vector brute_force_average(const Vector& x, std::size_t d, const Vector& inv_freq,
                           std::int64_t first, std::int64_t last) {
  Vector mean(d * d, 0);
  for (std::int64_t t = first; t <= last; ++t) {
    Vector turned(d * d);
    for (std::size_t j = 0; j < d; ++j) {
      Vector column(d);
      for (std::size_t i = 0; i < d; ++i) column[i] = x[i * d + j];
      column = testing::rotated(column, inv_freq, static_cast<double>(t));
      for (std::size_t i = 0; i < d; ++i) turned[i * d + j] = column[i];
    }
    for (std::size_t i = 0; i < d; ++i) {
      Vector row(turned.begin() + static_cast<std::ptrdiff_t>(i * d),
                 turned.begin() + static_cast<std::ptrdiff_t>((i + 1) * d));
      row = testing::rotated(row, inv_freq, static_cast<double>(t));
      for (std::size_t j = 0; j < d; ++j)
        mean[i * d + j] += row[j] / static_cast<double>(last - first + 1);
    }
  }
  return mean;
}

struct AverageCase {
  const char* name;
  int d;
  Vector inv_freq;
  std::int64_t first, last;
};

class PositionAverageTest : public ::testing::TestWithParam<AverageCase> {};

TEST_P(PositionAverageTest, EqualsSumOverPositions) {
  const AverageCase& c = GetParam();
  const auto d = static_cast<std::size_t>(c.d);
  const Vector x = random_matrix(d, 7);
  const auto exact = average_over_positions(x, c.d, static_cast<int>(2 * c.inv_freq.size()),
                                            c.inv_freq, c.first, c.last);
  EXPECT_THAT(exact,
              Pointwise(DoubleNear(2e-10), brute_force_average(x, d, c.inv_freq, c.first, c.last)));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, PositionAverageTest,
    ::testing::Values(AverageCase{"Llama", 16, testing::frequencies(16), 4, 1023},
                      AverageCase{"PartialRotary", 12, testing::frequencies(8), 4, 300},
                      AverageCase{"NoRotary", 6, {}, 0, 9},
                      AverageCase{"OnePosition", 8, testing::frequencies(8), 17, 17},
                      AverageCase{"ZeroFrequency", 4, {0.0, 0.3}, 0, 50},
                      AverageCase{"EqualFrequencies", 4, {0.3, 0.3}, 4, 63},
                      AverageCase{"TinyFrequencies", 4, {1e-9, 3e-12}, 4, 5000},
                      AverageCase{"SumIsAWholeTurn", 4, {kTwoPi / 2, kTwoPi / 2}, 3, 1000},
                      AverageCase{"LongContext", 6, {1.0, 1e-2, 1e-5}, 4, 131071}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(PositionAverage, ClosedPeriodLeavesOnlyWhatCommutesWithTheRotation) {
  constexpr std::int64_t kPeriod = 60;
  const Vector inv_freq = {kTwoPi * 2 / kPeriod, kTwoPi * 7 / kPeriod};
  const Vector x = random_matrix(4, 3);
  const auto mean = average_over_positions(x, 4, 4, inv_freq, 5, 5 + kPeriod - 1);
  for (const std::size_t j : {0u, 1u}) {
    const double half_trace = (x[j * 4 + j] + x[(j + 2) * 4 + j + 2]) / 2;
    const double turn = (x[(j + 2) * 4 + j] - x[j * 4 + j + 2]) / 2;
    EXPECT_NEAR(mean[j * 4 + j], half_trace, 1e-12);
    EXPECT_NEAR(mean[(j + 2) * 4 + j + 2], half_trace, 1e-12);
    EXPECT_NEAR(mean[(j + 2) * 4 + j], turn, 1e-12);
    EXPECT_NEAR(mean[j * 4 + j + 2], -turn, 1e-12);
  }
  for (const std::size_t a : {0u, 2u})
    for (const std::size_t b : {1u, 3u}) EXPECT_NEAR(mean[a * 4 + b], 0, 1e-12) << a << ", " << b;
}

TEST(PositionAverage, RefusesSizesThatDoNotFit) {
  const Vector x(16), frequency = {0.5};
  EXPECT_THROW(average_over_positions(x, 5, 2, frequency, 0, 1), ArgumentError);
  EXPECT_THROW(average_over_positions(x, 4, 6, Vector(3), 0, 1), ArgumentError);
  EXPECT_THROW(average_over_positions(x, 4, 3, frequency, 0, 1), ArgumentError);
  EXPECT_THROW(average_over_positions(x, 4, 4, frequency, 0, 1), ArgumentError);
  EXPECT_THROW(average_over_positions(x, 4, 2, frequency, 2, 1), ArgumentError);
  EXPECT_THROW(average_over_positions(x, 4, 2, frequency, -1, 1), ArgumentError);
}

class SideTest : public ::testing::TestWithParam<Side> {
 protected:
  static constexpr int kLayer = 1, kHead = 1;
  static testing::SyntheticSpec spec() {
    testing::SyntheticSpec s;
    s.head_dim = 12;
    s.rotary_dim = 8;
    return s;
  }
  Vector inv_freq() const { return GetParam() == Side::kKey ? testing::frequencies(8) : Vector{}; }
};

INSTANTIATE_TEST_SUITE_P(Sides, SideTest, ::testing::Values(Side::kKey, Side::kValue),
                         [](const auto& info) { return std::string(side_name(info.param)); });

TEST_P(SideTest, MomentsAreThoseOfTheTokens) {
  constexpr std::int64_t kContext = 200;
  const auto tokens = testing::draw_tokens(spec(), kLayer, GetParam(), kHead);
  const auto n = static_cast<double>(tokens.size());
  Vector mean(12, 0), second(144, 0), fisher(144, 0);
  for (const auto& token : tokens)
    for (std::size_t i = 0; i < 12; ++i) mean[i] += token.x[i] / n;
  for (const auto& token : tokens) {
    const Vector h = testing::rotated(token.h, inv_freq(), -token.position);
    for (std::size_t i = 0; i < 12; ++i)
      for (std::size_t j = 0; j < 12; ++j) {
        second[i * 12 + j] += (token.x[i] - mean[i]) * (token.x[j] - mean[j]) / n;
        fisher[i * 12 + j] += h[i] * h[j] / n;
      }
  }
  const HeadMoments moments =
      head_moments(testing::synthetic_profile(spec()), kLayer, GetParam(), kHead, kContext);
  const auto averaged = [&](const Vector& x) {
    return brute_force_average(x, 12, inv_freq(), spec().sink_tokens, kContext - 1);
  };
  EXPECT_THAT(moments.mean, Pointwise(DoubleNear(1e-12), mean));
  EXPECT_THAT(moments.second, Pointwise(DoubleNear(1e-11), averaged(second)));
  EXPECT_THAT(moments.fisher, Pointwise(DoubleNear(1e-12), averaged(fisher)));
}

TEST_P(SideTest, UncentredMomentsKeepTheMeanInside) {
  const Profile profile = testing::synthetic_profile(spec());
  const HeadMoments about_mean = head_moments(profile, kLayer, GetParam(), kHead, 100);
  const HeadMoments about_zero = head_moments(profile, kLayer, GetParam(), kHead, 100, false);
  EXPECT_THAT(about_zero.mean, Pointwise(DoubleNear(0), Vector(12, 0)));
  double difference = 0, mean_square = 0;
  for (std::size_t i = 0; i < 12; ++i) {
    difference += about_zero.second[i * 13] - about_mean.second[i * 13];
    mean_square += about_mean.mean[i] * about_mean.mean[i];
  }
  EXPECT_NEAR(difference, mean_square, 1e-10);
}

TEST_P(SideTest, CentredCrossIsTheSumOverTheWindow) {
  constexpr int kWindow = 2;
  const Profile profile = testing::synthetic_profile(spec());
  const Vector mean = head_moments(profile, kLayer, GetParam(), kHead, 100).mean;
  Vector expected(144, 0);
  for (const auto& token : testing::draw_tokens(spec(), kLayer, GetParam(), kHead)) {
    if (token.window != kWindow) continue;
    const Vector x = testing::rotated(token.x, inv_freq(), token.position);
    const Vector m = testing::rotated(mean, inv_freq(), token.position);
    for (std::size_t i = 0; i < 12; ++i)
      for (std::size_t j = 0; j < 12; ++j) expected[i * 12 + j] += token.h[i] * (x[j] - m[j]);
  }
  // Cross and phase sums are float32, added token by token.
  EXPECT_THAT(centred_cross(profile, kLayer, GetParam(), kHead, kWindow, mean),
              Pointwise(DoubleNear(1e-4), expected));
}

/// Two heads of four channels, one token each, so that every figure can be checked by hand.
Profile hand_made_profile() {
  testing::SyntheticSpec spec;
  spec.layers = 1;
  spec.head_dim = spec.rotary_dim = 4;
  spec.windows = 0;
  Profile profile = testing::synthetic_profile(spec);
  profile.tokens = profile.fisher_tokens = 2;
  LayerProfile& layer = profile.layers[0];
  layer.weight_mse = 0.25;
  const Vector gradient = {1, 0, 0, 0};
  testing::add_token(layer.k, {1, 1, 1, 1}, gradient, 0);
  testing::add_token(layer.k, {3, 1, 1, 1}, gradient, 0);
  testing::add_token(layer.k, {1, 1, 1, 10}, gradient, 1);
  testing::add_token(layer.k, {1, 1, 1, 10}, gradient, 1);
  for (const int head : {0, 1}) {
    testing::add_token(layer.v, {2, 0, 0, 0}, gradient, head);
    testing::add_token(layer.v, {-2, 0, 0, 0}, gradient, head);
  }
  return profile;
}

TEST(Summary, FiguresOfAHandMadeLayer) {
  const LayerSummary s = summarise(hand_made_profile()).at(0);
  const double key_norm = (2 + std::sqrt(12.0) + 2 * std::sqrt(103.0)) / 4;
  EXPECT_NEAR(s.key_norm, key_norm, 1e-12);
  EXPECT_NEAR(s.value_norm, 2, 1e-12);
  EXPECT_NEAR(s.norm_ratio, key_norm / 2, 1e-12);
  EXPECT_NEAR(s.mean_share_k, (4 + 3 + 103.0) / (5 + 3 + 103), 1e-12);
  EXPECT_NEAR(s.mean_share_v, 0, 1e-12);
  EXPECT_NEAR(s.sensitivity_k, 0.5, 1e-12) << "head 0 varies by 1 in channel 0, head 1 not at all";
  EXPECT_NEAR(s.sensitivity_v, 4, 1e-12);
  EXPECT_EQ(s.weight_mse, 0.25);
}

TEST(Summary, OutliersExceedTheFactorTimesTheLayerMedian) {
  const Profile profile = hand_made_profile();
  EXPECT_THAT(summarise(profile)[0].outlier_channels_k, ElementsAre(7));
  EXPECT_THAT(summarise(profile, 2)[0].outlier_channels_k, ElementsAre(0, 7));
  EXPECT_THAT(summarise(profile, 10)[0].outlier_channels_k, IsEmpty());
  EXPECT_THAT(key_channel_rms(profile)[0], ElementsAre(std::sqrt(5.0), 1, 1, 1, 1, 1, 1, 10));
}

TEST(Summary, RefusesAProfileWithoutTokens) {
  Profile profile = hand_made_profile();
  profile.tokens = 0;
  EXPECT_THROW(summarise(profile), InputError);
  EXPECT_THROW(key_channel_rms(profile), InputError);
}

}  // namespace
}  // namespace kvplan::quant
