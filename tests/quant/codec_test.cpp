#include "quant/codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "quant/codebook.h"
#include "schemas/error.h"
#include "tests/quant/codec_fixtures.h"

namespace kvplan::quant {
namespace {

using namespace kvplan::quant::testing;

TEST(Fp16Codec, IsExactForHalves) {
  const KvShape shape{33, 3, 64};
  const std::vector<float> x = gaussian(shape);
  EXPECT_EQ(round_trip(*make_codec(baseline("fp16"), 0, Side::kValue), shape, x), x);
}

TEST(RotatedCodec, MeetsTheTheoreticalDistortionOfGaussianData) {
  const KvShape shape{4000, 1, 64};
  const std::vector<float> x = gaussian(shape);
  double previous = 1;
  for (int bits = 1; bits <= 6; ++bits) {
    const auto codec =
        make_codec(baseline("turboquant:" + std::to_string(bits), small_model(1)), 0, Side::kKey);
    const double error = relative_error(x, round_trip(*codec, shape, x));
    EXPECT_NEAR(error / lloyd_max_beta(bits, 64).distortion, 1, 0.02) << bits;
    EXPECT_LT(error, previous);
    previous = error;
  }
}

TEST(RotatedCodec, SpreadsASpikeEvenly) {
  const KvShape shape{1, 1, 64};
  std::vector<float> spike(64);
  spike[5] = 100;
  const auto codec = make_codec(baseline("turboquant:4", small_model(1)), 0, Side::kKey);
  EXPECT_LT(relative_error(spike, round_trip(*codec, shape, spike)), 0.02);
}

TEST(RotatedCodec, ScaleRulesDoWhatTheyPromise) {
  const KvShape shape{3000, 1, 64};
  const std::vector<float> x = gaussian(shape);
  PlanBundle bundle = baseline("turboquant:2", small_model(1));
  const double distortion = lloyd_max_beta(2, 64).distortion;
  for (const auto& [rule, slope] : std::initializer_list<std::pair<const char*, double>>{
           {"one", 1 - distortion},
           {"norm_corrected", std::sqrt(1 - distortion)},
           {"biased", 1 - distortion},
           {"unbiased", 1}}) {
    bundle.plan.scale_rule = rule;
    const auto x_hat = round_trip(*make_codec(bundle, 0, Side::kKey), shape, x);
    double product = 0, energy = 0, energy_hat = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      product += double{x[i]} * x_hat[i];
      energy += double{x[i]} * x[i];
      energy_hat += double{x_hat[i]} * x_hat[i];
    }
    EXPECT_NEAR(product / energy, slope, 0.01) << rule;
    if (rule == std::string("norm_corrected")) {
      EXPECT_NEAR(energy_hat / energy, 1, 1e-3);
    }
  }
}

TEST(RotatedCodec, KeepsOutlierChannelsAtEightBits) {
  PlanBundle bundle = baseline("turboquant:3", small_model(1));
  const std::vector<int> outliers = {0, 3, 9, 20, 21, 40, 62, 63};
  for (LayerPlan& layer : bundle.plan.layers)
    for (const Side side : kSides) layer.side(side).heads[0].outliers = outliers;
  const auto codec = make_codec(bundle, 0, Side::kKey);
  EXPECT_DOUBLE_EQ(codec->bits_per_token(), 16 + 16 + 8 * 8 + 3 * 56);
  const KvShape shape{100, 1, 64};
  std::vector<float> x = gaussian(shape);
  for (std::size_t token = 0; token < 100; ++token)
    for (const int channel : outliers)
      x[64 * token + static_cast<std::size_t>(channel)] =
          round_to_half(300 * x[64 * token + static_cast<std::size_t>(channel)]);
  const auto x_hat = round_trip(*codec, shape, x);
  double error = 0;
  for (std::size_t token = 0; token < 100; ++token) {
    float largest = 0;
    for (const int channel : outliers)
      largest = std::max(largest, std::abs(x[64 * token + static_cast<std::size_t>(channel)]));
    for (std::size_t channel = 0; channel < 64; ++channel) {
      const std::size_t i = 64 * token + channel;
      if (std::find(outliers.begin(), outliers.end(), static_cast<int>(channel)) !=
          outliers.end()) {
        EXPECT_LE(std::abs(x[i] - x_hat[i]), largest * (0.501f / 127)) << i;
      } else {
        error += (x[i] - x_hat[i]) * (x[i] - x_hat[i]) / (100.0 * 56);
      }
    }
  }
  EXPECT_NEAR(error, 0.0334, 0.003);
}

TEST(RotatedCodec, CentresKeysByTheRotatedMean) {
  PlanBundle bundle = baseline("turboquant:2", small_model(1));
  bundle.plan.centre = true;
  EXPECT_THROW(make_codec(bundle, 0, Side::kKey), InputError);  // no means
  Array<float> mean({1, 64});
  for (std::size_t i = 0; i < 64; ++i) mean.data[i] = static_cast<float>(i % 7) - 3;
  for (LayerTensors& layer : bundle.tensors.layers) layer.k.mean = layer.v.mean = mean;
  const KvShape shape{200, 1, 64};
  std::vector<float> keys(200 * 64), values(200 * 64);
  for (std::size_t t = 0; t < 200; ++t)
    for (std::size_t j = 0; j < 32; ++j) {
      const double angle = static_cast<double>(t + 50) * bundle.tensors.layers[0].inv_freq[j];
      const double a = mean.data[j], b = mean.data[j + 32];
      keys[64 * t + j] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
      keys[64 * t + j + 32] = static_cast<float>(b * std::cos(angle) + a * std::sin(angle));
      values[64 * t + j] = mean.data[j];
      values[64 * t + j + 32] = mean.data[j + 32];
    }
  const auto key_hat = round_trip(*make_codec(bundle, 0, Side::kKey), shape, keys, 50);
  for (std::size_t i = 0; i < keys.size(); ++i) ASSERT_NEAR(key_hat[i], keys[i], 0.005) << i;
  EXPECT_EQ(round_trip(*make_codec(bundle, 0, Side::kValue), shape, values, 50), values);
  bundle.tensors.layers[0].inv_freq.pop_back();
  EXPECT_THROW(make_codec(bundle, 0, Side::kKey), InputError);
}

TEST(BlockCodecs, MatchGgml) {
  // Printed by tests/quant/make_block_golden.py.
  std::vector<float> x;
  for (int i = 0; i < 64; ++i) x.push_back(static_cast<float>(i * 37 % 101 - 50) / 16);
  for (const auto& [name, expected] : std::initializer_list<std::pair<const char*, const char*>>{
           {"q8_0",
            "4d2681df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc2c263c96f656b0106f"
            "ca2984e3439efd5db71777d1318beb4ba50565bf1f7fd93993"},
           {"q4_0", "4036e046acf258bd1379df358be046acf26820b6740fb953fd9731eb852fca640ea842fd"},
           {"q4_1",
            "ab3640c2d0369bf257bd1369ce258ae0469cf258773600c29bf157ad0368ce248ad0469bf257bd13"},
           {"q5_0",
            "4032a4a52d6dc07c38f3bf6b26e2ae5a15d18d49f4c020b296b6b4a4d81d61a5fa3e72b7fb3f84c80c50"
            "94e9"},
           {"q5_1",
            "743240c2a4a52d6db07b37e3af6a26d29d5905c18c48f4b0423200c269494b5b27e2ae5a15d19d4904c0"
            "7c38f3bf6b26"},
           {"iq4_nl",
            "5526e035acf147ce1269df249bf036bdf15836a6630fc942fea721ec751fda530eb832fd"}}) {
    const auto codec = make_codec(baseline(name, small_model(1)), 0, Side::kKey);
    std::vector<std::byte> codes(codec->packed_bytes({1, 1, 64}));
    codec->encode({1, 1, 64}, 0, x, codes);
    std::string hex;
    for (const std::byte byte : codes) {
      hex += "0123456789abcdef"[std::to_integer<int>(byte >> 4)];
      hex += "0123456789abcdef"[std::to_integer<int>(byte & std::byte{15})];
    }
    EXPECT_EQ(hex, expected) << name;
    std::vector<float> x_hat(64);
    codec->decode({1, 1, 64}, 0, codes, x_hat);
    EXPECT_LT(relative_error(x, x_hat), name == std::string("q8_0") ? 1e-4 : 1e-2) << name;
  }
}

TEST(KiviCodec, KeepsConstantChannelsAndRestTokensExactly) {
  const auto codec = make_codec(baseline("kivi:2", small_model(1)), 0, Side::kKey);
  EXPECT_EQ(codec->token_multiple(), 32);
  const KvShape shape{40, 1, 64};
  std::vector<float> x = gaussian(shape);
  for (std::size_t t = 0; t < 40; ++t) x[64 * t + 3] = 7.25f;
  EXPECT_EQ(codec->packed_bytes(shape), 64u * (4 + 8) + 8 * 128);
  const auto x_hat = round_trip(*codec, shape, x);
  for (std::size_t t = 0; t < 40; ++t) EXPECT_EQ(x_hat[64 * t + 3], 7.25f);
  for (std::size_t i = 32 * 64; i < x.size(); ++i) EXPECT_EQ(x_hat[i], x[i]);
}

TEST(KiviCodec, KeysShareScalesOverTokensAndValuesOverChannels) {
  const KvShape shape{32, 1, 64};
  std::vector<float> by_channel(32 * 64), by_token(32 * 64);
  for (std::size_t t = 0; t < 32; ++t)
    for (std::size_t i = 0; i < 64; ++i) {
      by_channel[64 * t + i] = static_cast<float>(i);
      by_token[64 * t + i] = static_cast<float>(t);
    }
  const PlanBundle bundle = baseline("kivi:1", small_model(1));
  const auto keys = make_codec(bundle, 0, Side::kKey), values = make_codec(bundle, 0, Side::kValue);
  EXPECT_EQ(round_trip(*keys, shape, by_channel), by_channel);
  EXPECT_EQ(round_trip(*values, shape, by_token), by_token);
  EXPECT_GT(relative_error(by_token, round_trip(*keys, shape, by_token)), 0.01);
  EXPECT_GT(relative_error(by_channel, round_trip(*values, shape, by_channel)), 0.01);
}

TEST(MakeCodec, RefusesWhatThisVersionDoesNotKnow) {
  const auto refuses = [](auto change) {
    PlanBundle bundle = baseline("turboquant:3");
    change(bundle.plan);
    EXPECT_THROW(make_codec(bundle, 0, Side::kKey), InputError);
  };
  refuses([](Plan& plan) { plan.codec = "nf4"; });
  refuses([](Plan& plan) { plan.code = "tcq"; });
  refuses([](Plan& plan) { plan.codec = "q4_0", plan.code = "polar"; });
  refuses([](Plan& plan) { plan.code = "polar", plan.norm = "fp16_std"; });
  refuses([](Plan& plan) { plan.code = "polar", plan.scale_rule = "unbiased"; });
  refuses([](Plan& plan) { plan.variant.norm_block = 48; });
  refuses([](Plan& plan) { plan.variant.norm_block = -8; });
  refuses([](Plan& plan) { plan.variant.norm_block = 4; });  // too small for a Beta book
  refuses([](Plan& plan) { plan.variant = {.sketch = "gaussian", .sketch_rows = 0}; });
  refuses([](Plan& plan) {
    plan.variant = {.sketch = "gaussian", .sketch_rows = 64};
    plan.layers[0].k.heads[1].widths = {0};
  });
  refuses([](Plan& plan) {
    plan.variant.outlier_bits = 1;
    plan.layers[0].k.heads[1].outliers = {5};
  });
  refuses([](Plan& plan) { plan.norm = "log8", plan.variant.norm_block = 32; });
  refuses([](Plan& plan) { plan.scale_rule = "best"; });
  refuses([](Plan& plan) { plan.norm = "fp8"; });
  refuses([](Plan& plan) { plan.layers[0].k.heads.pop_back(); });
  refuses([](Plan& plan) { plan.layers[0].k.heads[1].widths = {3, 16}; });
  refuses([](Plan& plan) { plan.layers[0].k.heads[1].widths = {3, 2}; });
  refuses([](Plan& plan) { plan.layers[0].k.heads[1].widths = {9}; });
  refuses([](Plan& plan) { plan.layers[0].k.heads[1].widths = {}; });
  refuses([](Plan& plan) { plan.layers[0].k.heads[1].outliers = {5, 5}; });
  refuses([](Plan& plan) { plan.layers[0].k.heads[1].outliers = {64}; });
  EXPECT_THROW(make_codec(baseline("fp16"), 2, Side::kKey), ArgumentError);
  EXPECT_THROW(make_codec(baseline("fp16"), -1, Side::kKey), ArgumentError);
}

}  // namespace
}  // namespace kvplan::quant
