#include "quant/codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "quant/baselines.h"
#include "quant/codebook.h"
#include "quant/packing.h"
#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

ModelSpec small_model(int kv_heads = 3, int head_dim = 64) {
  ModelSpec model;
  model.architecture = "llama";
  model.num_layers = 2;
  model.query_heads = 9;
  model.kv_heads = kv_heads;
  model.head_dim = head_dim;
  model.rotary_dim = head_dim;
  return model;
}

PlanBundle baseline(std::string_view name, const ModelSpec& model = small_model()) {
  std::vector<double> inv_freq;
  for (int j = 0; j < model.rotary_dim / 2; ++j)
    inv_freq.push_back(std::pow(10000.0, -2.0 * j / model.rotary_dim));
  return baseline_plan(name, model, 4, 4096, 11, inv_freq);
}

std::vector<float> gaussian(const KvShape& shape, std::uint32_t draw = 0) {
  RandomStream random(5, StreamPurpose::kTest, draw);
  std::vector<float> x(static_cast<std::size_t>(shape.elements()));
  for (float& value : x) value = round_to_half(static_cast<float>(random.next_normal()));
  return x;
}

std::vector<float> round_trip(const Codec& codec, const KvShape& shape, std::span<const float> x,
                              std::int64_t first_position = 4) {
  std::vector<float> x_hat(x.size());
  round_trip(codec, shape, first_position, x, x_hat);
  return x_hat;
}

double relative_error(std::span<const float> x, std::span<const float> x_hat) {
  double error = 0, energy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    error += (double{x[i]} - x_hat[i]) * (double{x[i]} - x_hat[i]);
    energy += double{x[i]} * x[i];
  }
  return error / energy;
}

struct BaselineRow {
  const char* name;
  double effective_bits;
  std::int64_t bytes_per_token;  // 2 layers, 3 heads of 64, K and V: 768 elements
};

class Baselines : public testing::TestWithParam<BaselineRow> {};

TEST_P(Baselines, PackedSizeIsTheDeclaredSize) {
  const PlanBundle bundle = baseline(GetParam().name);
  EXPECT_DOUBLE_EQ(bundle.plan.effective_bits, GetParam().effective_bits);
  EXPECT_EQ(bundle.plan.bytes_per_token, GetParam().bytes_per_token);
  EXPECT_DOUBLE_EQ(measured_effective_bits(bundle), GetParam().effective_bits);
  const KvShape shape{64, 3, 64};
  std::size_t bytes = 0;
  for (int layer = 0; layer < 2; ++layer)
    for (const Side side : kSides) bytes += make_codec(bundle, layer, side)->packed_bytes(shape);
  EXPECT_DOUBLE_EQ(8.0 * static_cast<double>(bytes) / (64 * 768), GetParam().effective_bits);
}

TEST_P(Baselines, RoundTripIsFiniteAndDependsOnTheBytesAlone) {
  const PlanBundle bundle = baseline(GetParam().name);
  const KvShape shape{70, 3, 64};
  const std::vector<float> x = gaussian(shape);
  for (const Side side : kSides) {
    const auto codec = make_codec(bundle, 1, side), other = make_codec(bundle, 1, side);
    std::vector<std::byte> codes(codec->packed_bytes(shape), std::byte{0xff});
    std::vector<float> first(x.size()), second(x.size(), -1);
    codec->encode(shape, 4, x, codes);
    codec->decode(shape, 4, codes, first);
    other->decode(shape, 4, codes, second);
    EXPECT_EQ(first, second);
    EXPECT_LT(relative_error(x, first), 0.4);
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
      EXPECT_THAT(error.what(), testing::HasSubstr("token 1, head 1, channel 7"));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Names, Baselines,
    testing::Values(BaselineRow{"fp16", 16, 1536}, BaselineRow{"q8_0", 8.5, 816},
                    BaselineRow{"q4_0", 4.5, 432}, BaselineRow{"kivi:2", 3, 288},
                    BaselineRow{"kivi:4", 5, 480}, BaselineRow{"turboquant:1", 1.25, 120},
                    BaselineRow{"turboquant:3", 3.25, 312},
                    BaselineRow{"turboquant:6/3", 4.75, 456},
                    BaselineRow{"turboquant+:2", 2.25, 216}),
    [](const auto& row) {
      std::string name = row.param.name;
      for (char& c : name)
        if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
      return name;
    });

TEST(BaselinePlan, RefusesUnknownNames) {
  for (const auto* name : {"", "fp8", "kivi", "kivi:0", "kivi:2/3", "turboquant:9", "turboquant:3/",
                           "turboquant:-1", "turboquant", "q8_0:8", "kivi:2 "})
    EXPECT_THROW(baseline(name), ArgumentError) << name;
  EXPECT_THROW(baseline("q4_0", small_model(1, 80)), ArgumentError);
  EXPECT_THROW(baseline("fp16", small_model(0, 64)), ArgumentError);
}

TEST(BaselinePlan, NearestBaselinesMatchTheSize) {
  EXPECT_THAT(nearest_baselines(3.25, small_model()),
              testing::ElementsAre("q8_0", "q4_0", "turboquant:3", "kivi:2"));
  EXPECT_THAT(nearest_baselines(0.1, small_model(1, 80)),
              testing::ElementsAre("turboquant:1", "kivi:1"));
}

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
  // Python, gguf package: gguf.quants.quantize(x.reshape(1, -1),
  // gguf.GGMLQuantizationType.Q8_0).tobytes().hex() and Q4_0 with x = numpy.array([(i * 37 % 101 -
  // 50) / 16 for i in range(64)], numpy.float32)
  std::vector<float> x;
  for (int i = 0; i < 64; ++i) x.push_back(static_cast<float>(i * 37 % 101 - 50) / 16);
  for (const auto& [name, expected] : std::initializer_list<std::pair<const char*, const char*>>{
           {"q8_0",
            "4d2681df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc2c263c96f656b0106f"
            "ca29"
            "84e3439efd5db71777d1318beb4ba50565bf1f7fd93993"},
           {"q4_0", "4036e046acf258bd1379df358be046acf26820b6740fb953fd9731eb852fca640ea842fd"}}) {
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
    EXPECT_LT(relative_error(x, x_hat), name == std::string("q8_0") ? 1e-4 : 1e-2);
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
