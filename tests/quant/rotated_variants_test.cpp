// Rotated plans with options beyond TransformCodec, against the bounds of the published estimators
// (tables T1 and T2 of the claims).

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <string>

#include "quant/codebook.h"
#include "schemas/error.h"
#include "tests/quant/codec_fixtures.h"

namespace kvplan::quant {
namespace {

using namespace kvplan::quant::testing;

constexpr double kHalfPi = std::numbers::pi / 2;

TEST(VectorCodec, WritesWhatTheTransformCodecWrites) {
  const KvShape shape{100, 3, 64};
  const std::vector<float> x = gaussian(shape);
  for (const auto* rule : {"one", "nc", "biased", "unbiased"})
    for (const auto* options : {"", "+rht", "+gauss+heads"}) {
      const std::string name = "turboquant:3+" + std::string(rule) + options;
      const auto fast = make_codec(baseline(name), 1, Side::kValue);
      const auto plain = make_codec(baseline(name + "+block=64"), 1, Side::kValue);
      EXPECT_EQ(encoded(*fast, shape, x), encoded(*plain, shape, x)) << name;
      EXPECT_EQ(round_trip(*fast, shape, x), round_trip(*plain, shape, x)) << name;
    }
}

struct Estimate {
  double error = 0, slope = 0;
};

/// Over several draws of rotation and sketch.
Estimate measured(const std::string& name, int d) {
  constexpr int kDraws = 8;
  const KvShape shape{300, 1, d};
  const std::vector<float> x = gaussian(shape);
  Estimate mean;
  for (std::uint64_t seed = 0; seed < kDraws; ++seed) {
    const auto codec = make_codec(baseline(name, small_model(1, d), nullptr, seed), 0, Side::kKey);
    const auto x_hat = round_trip(*codec, shape, x);
    mean.error += relative_error(x, x_hat) / kDraws;
    mean.slope += slope(x, x_hat) / kDraws;
  }
  return mean;
}

TEST(SketchedCodec, MeetsTheVarianceOfTheEstimatorAndIsUnbiased) {
  constexpr int kD = 128;
  for (int bits = 1; bits <= 4; ++bits) {
    const double base = bits == 1 ? 1 : lloyd_max_beta(bits - 1, kD).distortion;
    const std::string prod = "turboquant:" + std::to_string(bits) + "+prod";
    const Estimate random = measured(prod + (bits % 2 == 0 ? "" : "+rademacher"), kD);
    EXPECT_NEAR(random.error / ((kHalfPi - 1.0 / kD) * base), 1, 0.04) << prod;
    EXPECT_NEAR(random.slope, 1, 0.015) << prod;
    const Estimate orthogonal = measured(prod + "+orthogonal", kD);
    EXPECT_NEAR(orthogonal.error / ((kHalfPi - 1) * base), 1, 0.02) << prod;
    EXPECT_NEAR(orthogonal.slope, 1, 0.01) << prod;
  }
}

TEST(SketchedCodec, VarianceFallsWithTheRows) {
  const double base = lloyd_max_beta(2, 64).distortion;
  for (const auto& [rows, share] : std::initializer_list<std::pair<const char*, double>>{
           {"d/2", 2}, {"d", 1}, {"2d", .5}, {"256", .25}})
    EXPECT_NEAR(
        measured("turboquant:3+prod+m=" + std::string(rows), 64).error / (kHalfPi * share * base),
        1, 0.06)
        << rows;
}

TEST(SketchedCodec, TouchesOnlyItsSides) {
  const KvShape shape{50, 3, 64};
  const std::vector<float> x = gaussian(shape);
  const PlanBundle plain = baseline("turboquant:3"), prod = baseline("turboquant:3+prod");
  EXPECT_EQ(encoded(*make_codec(plain, 0, Side::kValue), shape, x),
            encoded(*make_codec(prod, 0, Side::kValue), shape, x));
  EXPECT_NE(encoded(*make_codec(plain, 0, Side::kKey), shape, x),
            encoded(*make_codec(prod, 0, Side::kKey), shape, x));
}

TEST(RotatedPlans, RotateOnlyTheirSides) {
  PlanBundle bundle = baseline("turboquant:2", small_model(1));
  bundle.plan.rotation.sides = "v";
  std::vector<float> spike(64);
  spike[5] = 100;
  const auto error = [&](Side side) {
    return relative_error(spike, round_trip(*make_codec(bundle, 0, side), {1, 1, 64}, spike));
  };
  EXPECT_GT(error(Side::kKey), 0.5);
  EXPECT_LT(error(Side::kValue), 0.2);
}

TEST(RotatedPlans, ScopeTellsHowManyRotationsThereAre) {
  const KvShape shape{20, 2, 64};
  std::vector<float> x = gaussian(shape);
  for (std::size_t t = 0; t < 20; ++t)
    for (std::size_t i = 0; i < 64; ++i) x[t * 128 + 64 + i] = x[t * 128 + i];  // equal heads
  const auto heads_agree = [&](const char* name) {
    const auto x_hat =
        round_trip(*make_codec(baseline(name, small_model(2)), 0, Side::kKey), shape, x);
    return std::equal(x_hat.begin(), x_hat.begin() + 64, x_hat.begin() + 64);
  };
  for (const auto* option : {"", "+rht", "+rht2", "+prod", "+block=32"}) {
    const std::string name = "turboquant:3" + std::string(option);
    EXPECT_TRUE(heads_agree(name.c_str())) << name;
    EXPECT_FALSE(heads_agree((name + "+heads").c_str())) << name;
  }
}

TEST(RotatedPlans, BlockNormsFollowTheEnergyOfTheirBlock) {
  // Without a rotation the halves keep their own size: one norm for both drowns the small one.
  const KvShape shape{500, 1, 64};
  std::vector<float> x = gaussian(shape);
  for (std::size_t i = 0; i < x.size(); ++i)
    if (i % 64 >= 32) x[i] = round_to_half(x[i] / 64);
  const auto small_half_error = [&](const char* name) {
    const auto x_hat =
        round_trip(*make_codec(baseline(name, small_model(1)), 0, Side::kKey), shape, x);
    double error = 0, energy = 0;
    for (std::size_t i = 0; i < x.size(); ++i)
      if (i % 64 >= 32) {
        error += (x[i] - x_hat[i]) * (x[i] - x_hat[i]);
        energy += x[i] * x[i];
      }
    return error / energy;
  };
  EXPECT_GT(small_half_error("turboquant:3+none"), 1);
  EXPECT_NEAR(small_half_error("turboquant:3+none+block=32"), lloyd_max_beta(3, 32).distortion,
              0.002);
}

TEST(RotatedPlans, CodesOfEveryHostileVectorStayFinite) {
  const KvShape shape{4, 1, 64};
  std::vector<float> x(256);
  for (std::size_t i = 64; i < 128; ++i) x[i] = i % 2 ? 65504.0f : -65504.0f;
  for (std::size_t i = 128; i < 192; ++i) x[i] = 0x1p-24f;
  x[200] = 65504;
  for (const auto* name : {"turboquant:3+prod", "turboquant:1+prod", "turboquant:3+std",
                           "turboquant:2+unbiased+block=8", "polar:2", "int:2", "mxfp4", "nvfp4",
                           "fp8_e4m3", "fp8_e5m2", "iq4_nl", "q5_1", "q4_1", "q5_0"}) {
    const auto codec = make_codec(baseline(name, small_model(1)), 0, Side::kKey);
    const auto x_hat = round_trip(*codec, shape, x);
    for (std::size_t i = 0; i < x.size(); ++i) {
      ASSERT_TRUE(std::isfinite(x_hat[i])) << name << " " << i;
      if (i < 64) {
        ASSERT_EQ(x_hat[i], 0) << name;
      }
    }
  }
}

TEST(RotatedPlans, HaveNoTransformedDomainBeyondTheTransformCodec) {
  const auto codec = make_codec(baseline("turboquant:3+prod", small_model(1)), 0, Side::kKey);
  std::vector<std::byte> codes(codec->packed_bytes({1, 1, 64}));
  std::vector<float> y(64);
  EXPECT_THROW(codec->decode_transformed({1, 1, 64}, codes, y), ArgumentError);
}

}  // namespace
}  // namespace kvplan::quant
