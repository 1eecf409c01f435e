#include "quant/baselines.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "quant/codebook.h"
#include "schemas/error.h"
#include "tests/quant/codec_fixtures.h"
#include "tests/quant/synthetic_profile.h"
#include "tests/temporary_folder.h"

namespace kvplan::quant {
namespace {

using namespace kvplan::quant::testing;

/// Sizes at two layers of three heads of 64; errors relative, of N(0,1) vectors. Those of rotated
/// codecs are the distortion D_b of claims T1 and, with a sketch, (pi/2 - 1/d) D_(b-1); those of
/// polar pairs 2 (1 - sin h / h) with h = pi / 2^b; the others were measured once.
struct BaselineRow {
  const char* name;
  double effective_bits;
  double key_error, value_error;
  double tolerance = 0.03;  // relative; more for one draw of a sketch
};

class Baselines : public ::testing::TestWithParam<BaselineRow> {};

TEST_P(Baselines, PackedSizeIsTheDeclaredSize) {
  const PlanBundle bundle = baseline(GetParam().name);
  EXPECT_DOUBLE_EQ(bundle.plan.effective_bits, GetParam().effective_bits);
  EXPECT_EQ(bundle.plan.bytes_per_token, std::ceil(GetParam().effective_bits * 768 / 8));
  EXPECT_DOUBLE_EQ(measured_effective_bits(bundle), GetParam().effective_bits);
  EXPECT_EQ(bundle.plan.policy, GetParam().name);
  const KvShape shape{64, 3, 64};
  std::size_t bytes = 0;
  for (int layer = 0; layer < 2; ++layer)
    for (const Side side : kSides) bytes += make_codec(bundle, layer, side)->packed_bytes(shape);
  EXPECT_DOUBLE_EQ(8.0 * static_cast<double>(bytes) / (64 * 768), GetParam().effective_bits);
}

TEST_P(Baselines, SurvivesItsFileAndErrsAsExpected) {
  const PlanBundle bundle = baseline(GetParam().name);
  const TemporaryFolder folder;
  write_plan(bundle, folder.path() / "plan");
  const PlanBundle read = read_plan(folder.path() / "plan");
  const KvShape shape{704, 3, 64};
  const std::vector<float> x = gaussian(shape);
  for (const Side side : kSides) {
    const auto codec = make_codec(bundle, 1, side), other = make_codec(read, 1, side);
    std::vector<std::byte> codes(codec->packed_bytes(shape), std::byte{0xff});
    std::vector<float> first(x.size()), second(x.size(), -1);
    codec->encode(shape, 4, x, codes);
    codec->decode(shape, 4, codes, first);
    other->decode(shape, 4, codes, second);
    EXPECT_EQ(first, second);
    const double expected = side == Side::kKey ? GetParam().key_error : GetParam().value_error;
    EXPECT_NEAR(relative_error(x, first), expected, GetParam().tolerance * expected)
        << side_name(side);
  }
}

TEST_P(Baselines, TakesNoTokensAndRefusesBadInput) {
  const auto codec = make_codec(baseline(GetParam().name), 0, Side::kKey);
  EXPECT_EQ(codec->packed_bytes({0, 3, 64}), 0u);
  codec->encode({0, 3, 64}, 0, {}, {});
  EXPECT_THROW(codec->packed_bytes({-1, 3, 64}), ArgumentError);
  EXPECT_THROW(codec->packed_bytes({std::numeric_limits<std::int64_t>::max(), 3, 64}),
               ArgumentError);
  EXPECT_THROW(codec->packed_bytes({1, 2, 64}), ArgumentError);
  EXPECT_THROW(codec->packed_bytes({1, 3, 128}), ArgumentError);
  const KvShape shape{2, 3, 64};
  std::vector<float> x = gaussian(shape);
  std::vector<std::byte> codes(codec->packed_bytes(shape));
  EXPECT_THROW(codec->encode(shape, -1, x, codes), ArgumentError);
  EXPECT_THROW(codec->encode(shape, 0, std::span(x).first(383), codes), ArgumentError);
  EXPECT_THROW(codec->encode(shape, 0, x, std::span(codes).subspan(1)), ArgumentError);
  EXPECT_THROW(codec->decode(shape, 0, std::span(codes).subspan(1), x), ArgumentError);
  for (const float bad : {NAN, INFINITY, -65520.0f}) {  // the last overflows fp16
    x[64 * 4 + 7] = bad;
    try {
      codec->encode(shape, 0, x, codes);
      FAIL() << bad;
    } catch (const ArgumentError& error) {
      EXPECT_THAT(error.what(), ::testing::HasSubstr("token 1, head 1, channel 7"));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Names, Baselines,
    ::testing::Values(
        BaselineRow{"fp16", 16, 0, 0}, BaselineRow{"q8_0", 8.5, 2.9e-5, 2.9e-5},
        BaselineRow{"q4_0", 4.5, .00736, .00736}, BaselineRow{"q4_1", 5, .00612, .00612},
        BaselineRow{"q5_0", 5.5, .00182, .00182}, BaselineRow{"q5_1", 6, .00143, .00143},
        BaselineRow{"iq4_nl", 4.5, .00619, .00619}, BaselineRow{"nvfp4", 4.5, .00902, .00902},
        BaselineRow{"mxfp4", 4.25, .01324, .01324}, BaselineRow{"fp8_e4m3", 8, .000702, .000702},
        BaselineRow{"fp8_e5m2", 8, .00279, .00279}, BaselineRow{"kivi:2", 3, .1544, .1544},
        BaselineRow{"kivi:4", 5, .0061, .0061}, BaselineRow{"int:2", 2.25, .515, .515},
        BaselineRow{"int:8/4", 6.25, 3.5e-5, .01156}, BaselineRow{"int:4+g32", 4.5, .00942, .00942},
        BaselineRow{"turboquant:1", 1.25, .358387, .358387},
        BaselineRow{"turboquant:6/3", 4.75, .000616, .033391},
        BaselineRow{"turboquant:3+gauss", 3.25, .033391, .033391},
        BaselineRow{"turboquant:3+uniform+one", 3.25, .0362, .0362},
        BaselineRow{"turboquant:3+rht2+heads", 3.25, .033391, .033391},
        BaselineRow{"turboquant:3+hadamard", 3.25, .033391, .033391},
        BaselineRow{"turboquant:2+nc+none", 2.25, .1165, .1165},
        BaselineRow{"turboquant:3+block=32", 3.5, .0323, .0323},
        BaselineRow{"turboquant:3+std", 3.5, .0334, .0334},
        BaselineRow{"turboquant:1+prod", 1.25, 1.555, .358387, .1},
        BaselineRow{"turboquant:2+prodkv+heads", 2.5, .5573, .5573, .1},
        BaselineRow{"turboquant:3+prod+rademacher", 3.375, .178, .033391, .1},
        BaselineRow{"turboquant:4+prod+m=2d", 4.875, .0260, .009132, .1},
        BaselineRow{"turboquant:2+prod+orthogonal", 2.375, .2046, .114526},
        BaselineRow{"polar:1", 8.5, .7268, .7268}, BaselineRow{"polar:3+rht", 9.5, .0510, .0510},
        BaselineRow{"polar:3+edge", 9.5, .1994, .1994}, BaselineRow{"q6_0", 6.5, .000453, .000453},
        BaselineRow{"q4_0+wht=64", 4.5, .00736, .00736},
        BaselineRow{"fp8_e4m3+unit", 8, .000702, .000702},
        BaselineRow{"nvfp4+unit", 4.5, .00905, .00905},
        BaselineRow{"int8_per_token_head", 8.5, 3.5e-05, 3.5e-05},
        BaselineRow{"int4_per_token_head", 4.5, .00829, .00829},
        BaselineRow{"turboquant_k8v4", 6.25, .000702, .00804},
        BaselineRow{"turboquant_4bit_nc", 4.375, .00887, .00804},
        BaselineRow{"turboquant_k3v4_nc", 3.875, .0329, .00804},
        BaselineRow{"turboquant_3bit_nc", 3.375, .0329, .0369},
        BaselineRow{"kvtuner:2", 3, .164, .165},
        BaselineRow{"kvtuner:4+pertoken", 5, .00648, .00648},
        BaselineRow{"hf:4+g64", 5, .00804, .00804},
        BaselineRow{"lmdeploy_int8", 8.5, 2.9e-05, 2.9e-05},
        BaselineRow{"lmdeploy_int4", 4.5, .00804, .00804},
        BaselineRow{"lmdeploy_turbo", 3.375, .0123, .115}),
    [](const auto& row) { return test_name(row.param.name); });

TEST(BaselinePlan, RefusesUnknownNames) {
  for (const auto* name : {"",
                           "fp8",
                           "kivi",
                           "kivi:0",
                           "kivi:2/3",
                           "kivi:2+nc",
                           "kivi:2 ",
                           "q8_0:8",
                           "q4_0+g32",
                           "int:1",
                           "int:9",
                           "int:4+g0",
                           "int:4+g48",
                           "int:4+g32+g16",
                           "turboquant",
                           "turboquant:9",
                           "turboquant:3/",
                           "turboquant:-1",
                           "turboquant+:2",
                           "turboquant:3+",
                           "turboquant:3+g32",
                           "turboquant:3+rht+haar",
                           "turboquant:3+nc+one",
                           "turboquant:3+block=48",
                           "turboquant:3+block=",
                           "turboquant:3+m=2d",
                           "turboquant:3+orthogonal",
                           "turboquant:3+prod+m=0",
                           "turboquant:3+prod+m=9d",
                           "turboquant:3+prod+m=d/0",
                           "turboquant:3+prod+prodkv",
                           "turboquant:8+split=8",
                           "turboquant:3/2+split=8",
                           "turboquant:3+split=64",
                           "turboquant:3+split=0",
                           "turboquant:3+split=8+outliers=8",
                           "polar:0",
                           "polar:2/3",
                           "polar:3+nc",
                           "polar:3+prod"})
    EXPECT_THROW(baseline(name), ArgumentError) << name;
  EXPECT_THROW(baseline("q4_0", small_model(1, 80)), ArgumentError);
  EXPECT_THROW(baseline("fp16", small_model(0, 64)), ArgumentError);
  try {
    baseline("turboquant:3+fast");
    FAIL();
  } catch (const ArgumentError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("\"fast\" is no option of turboquant"));
    EXPECT_THAT(error.what(), ::testing::HasSubstr("turboquant:K/V"));
  }
}

TEST(BaselinePlan, CountsWhatARuntimeKeepsBesideTheCache) {
  for (const auto& [name, bytes] : std::initializer_list<std::pair<const char*, std::int64_t>>{
           {"q4_0", 0},
           {"turboquant:3", 64 * 64 * 2 + 8 * 4},
           {"turboquant:6/3", 64 * 64 * 2 + (64 + 8) * 4},
           {"turboquant:3+heads", 2 * 2 * 3 * 64 * 64 * 2 + 8 * 4},
           {"turboquant:3+rht", 8 * 4},
           {"turboquant:3+rht+prodkv+m=2d", 2 * 64 * 64 * 2 + 4 * 4},
           {"turboquant:3+rht+prodkv+rademacher", 64 * 64 / 8 + 4 * 4},
           {"polar:3", 64 * 64 * 2}})
    EXPECT_EQ(baseline(name).plan.static_bytes, bytes) << name;
}

/// Heads of 64 whose channels 5 and 40 of keys and 9 of values are twenty times the others.
Profile profile_with_outliers() {
  Profile profile = synthetic_profile({.kv_heads = 2, .head_dim = 64, .rotary_dim = 0});
  for (LayerProfile& layer : profile.layers)
    for (std::size_t head = 0; head < 2; ++head) {
      for (const std::size_t channel : {5, 40}) layer.k_rotated_sumsq.row(head)[channel] *= 400;
      layer.v.outer.row(head)[9 * 64 + 9] *= 400;
    }
  return profile;
}

TEST(BaselinePlan, TakesOutlierChannelsFromTheProfile) {
  const Profile profile = profile_with_outliers();
  for (const auto* name :
       {"turboquant:3+split=8", "turboquant:3+outliers=8", "turboquant:3+centre"})
    EXPECT_THROW(baseline(name, profile.model), ArgumentError) << name;  // no profile
  const PlanBundle absmax = baseline("turboquant:3+outliers=2", profile.model, &profile);
  for (const LayerPlan& layer : absmax.plan.layers) {
    EXPECT_THAT(layer.k.heads[1].outliers, ::testing::ElementsAre(5, 40));
    EXPECT_THAT(layer.v.heads[0].outliers, ::testing::Contains(9));
  }
  EXPECT_EQ(absmax.plan.provenance.calibration_tokens, profile.tokens);
  // norm, scale, two bytes, 62 codes of 3 bits in whole bytes
  EXPECT_DOUBLE_EQ(absmax.plan.effective_bits, 8.0 * (2 + 2 + 2 + 24) / 64);

  const PlanBundle split = baseline("turboquant:2+split=16", profile.model, &profile);
  EXPECT_EQ(split.plan.variant.outlier_bits, 3);
  EXPECT_DOUBLE_EQ(split.plan.layers[0].k.bits, 2.25);
  EXPECT_DOUBLE_EQ(split.plan.effective_bits, 2.25 + 2 * 16.0 / 64);  // two norms
  const KvShape shape{2000, 2, 64};
  std::vector<float> x = gaussian(shape);
  const double expected =
      (48 * lloyd_max_beta(2, 48).distortion + 16 * lloyd_max_beta(3, 16).distortion) / 64;
  EXPECT_NEAR(relative_error(x, round_trip(*make_codec(split, 0, Side::kKey), shape, x)), expected,
              0.02 * expected);
  const TemporaryFolder folder;
  write_plan(split, folder.path() / "plan");
  const PlanBundle read = read_plan(folder.path() / "plan");
  EXPECT_EQ(encoded(*make_codec(read, 1, Side::kValue), shape, x),
            encoded(*make_codec(split, 1, Side::kValue), shape, x));
}

TEST(BaselinePlan, TakesScalesAndMeansFromTheProfile) {
  const Profile profile = profile_with_outliers();
  const PlanBundle scaled = baseline("fp8_e4m3", profile.model, &profile);
  const auto absmax = profile.layers[1].k.absmax.row(1);
  EXPECT_EQ(scaled.tensors.layers[1].k.absmax.data[1],
            *std::max_element(absmax.begin(), absmax.end()));
  const PlanBundle centred = baseline("turboquant:2+centre", profile.model, &profile);
  EXPECT_TRUE(centred.plan.centre);
  std::vector<float> x(128);
  for (std::size_t i = 0; i < 128; ++i)
    x[i] =
        static_cast<float>(profile.layers[0].v.sum.data[i] / static_cast<double>(profile.tokens));
  const auto x_hat = round_trip(*make_codec(centred, 0, Side::kValue), {1, 2, 64}, x);
  for (std::size_t i = 0; i < 128; ++i) EXPECT_NEAR(x_hat[i], x[i], 2e-3) << i;
  ModelSpec other = profile.model;
  other.kv_heads = 3;
  EXPECT_THROW(baseline("q8_0", other, &profile), ArgumentError);
}

TEST(BaselinePlan, NearestBaselinesMatchTheSize) {
  EXPECT_THAT(nearest_baselines(3.25, small_model()),
              ::testing::ElementsAre("q8_0", "q4_0", "turboquant:3", "kivi:2"));
  EXPECT_THAT(nearest_baselines(0.1, small_model(1, 80)),
              ::testing::ElementsAre("turboquant:1", "kivi:1"));
}

}  // namespace
}  // namespace kvplan::quant
