#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "quant/codebook.h"
#include "quant/codec.h"
#include "quant/packing.h"
#include "quant/random.h"
#include "quant/rotation.h"
#include "quant/trellis.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kDim = 64;

// A plan of one layer and one head: A = diag(s) Q with s from 1/2 to 2, lambda falling by group.
PlanBundle calibrated(std::vector<int> widths, int group_size = 16) {
  PlanBundle bundle;
  Plan& plan = bundle.plan;
  plan.model.num_layers = 1;
  plan.model.kv_heads = 1;
  plan.model.head_dim = plan.model.rotary_dim = kDim;
  plan.group_size = group_size;
  for (const int width : widths)
    if (width > 0 && width <= 8) bundle.tensors.levels[width] = codebook("lloyd_max", width).levels;
  LayerTensors& tensors = bundle.tensors.layers.emplace_back();
  for (int j = 0; j < kDim / 2; ++j) tensors.inv_freq.push_back(std::pow(10000.0, -j / 32.0));
  const auto q = haar_rotation(kDim, 3, 0, 0, 0, false);
  SideTensors side;
  side.analysis = side.synthesis = Array<float>({1, kDim, kDim});
  side.lambda = side.mean = Array<float>({1, kDim});
  for (std::size_t i = 0; i < kDim; ++i) {
    const double s = std::exp2(1 - 2.0 * static_cast<double>(i) / (kDim - 1));
    side.lambda.data[i] = std::exp2(-static_cast<float>(i / static_cast<std::size_t>(group_size)));
    side.mean.data[i] = static_cast<float>(i % 5) - 2;
    for (std::size_t j = 0; j < kDim; ++j) {
      side.analysis.data[i * kDim + j] = static_cast<float>(s * q[i * kDim + j]);
      side.synthesis.data[j * kDim + i] = static_cast<float>(q[i * kDim + j] / s);
    }
  }
  tensors.k = tensors.v = side;
  LayerPlan& layer = plan.layers.emplace_back();
  for (const Side s : kSides) layer.side(s).heads = {{widths, {}}};
  return bundle;
}

// Vectors whose transformed coordinates are standard normal: x = A^-1 y + mean.
std::vector<float> white_vectors(const PlanBundle& bundle, std::size_t tokens) {
  const SideTensors& side = bundle.tensors.layers[0].v;
  RandomStream random(8, StreamPurpose::kTest);
  std::vector<float> x(tokens * kDim);
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t i = 0; i < kDim; ++i) x[t * kDim + i] = side.mean.data[i];
    for (std::size_t j = 0; j < kDim; ++j) {
      const auto y = static_cast<float>(random.next_normal());
      for (std::size_t i = 0; i < kDim; ++i)
        x[t * kDim + i] += side.synthesis.data[i * kDim + j] * y;
    }
  }
  return x;
}

// A (x - mean) in double.
std::vector<double> transform(const PlanBundle& bundle, std::span<const float> x) {
  const SideTensors& side = bundle.tensors.layers[0].v;
  std::vector<double> y(x.size());
  for (std::size_t t = 0; t < x.size() / kDim; ++t)
    for (std::size_t i = 0; i < kDim; ++i)
      for (std::size_t j = 0; j < kDim; ++j)
        y[t * kDim + i] += double{side.analysis.data[i * kDim + j]} *
                           (round_to_half(x[t * kDim + j]) - side.mean.data[j]);
  return y;
}

KvShape shape_of(std::size_t tokens) { return {static_cast<std::int64_t>(tokens), 1, kDim}; }

std::vector<std::byte> encode(const Codec& codec, std::span<const float> x) {
  std::vector<std::byte> codes(codec.packed_bytes(shape_of(x.size() / kDim)));
  codec.encode(shape_of(x.size() / kDim), 4, x, codes);
  return codes;
}

struct Layout {
  const char* name;
  std::vector<int> widths;
  int group_size;
  const char* norm;
  std::size_t bytes;  // of one vector
};

class CalibratedLayout : public testing::TestWithParam<Layout> {};

// Reads the bytes as docs/formats/packing.md says, without the codec's own decoder.
TEST_P(CalibratedLayout, IsTheDocumentedOne) {
  const auto& [name, widths, group_size, norm_name, bytes] = GetParam();
  PlanBundle bundle = calibrated(widths, group_size);
  bundle.plan.norm = norm_name;
  const auto codec = make_codec(bundle, 0, Side::kValue);
  const std::vector<float> x = white_vectors(bundle, 70);
  const std::vector<double> y = transform(bundle, x);
  const std::vector<std::byte> codes = encode(*codec, x);
  ASSERT_EQ(codes.size(), 70 * bytes);
  EXPECT_EQ(codec->bits_per_token(), 8.0 * static_cast<double>(bytes));
  std::vector<float> transformed(x.size());
  codec->decode_transformed(shape_of(70), codes, transformed);
  for (std::size_t t = 0; t < 70; ++t) {
    BitReader reader(std::span<const std::byte>(codes).subspan(t * bytes, bytes));
    const bool log8 = bundle.plan.norm == "log8";
    const auto stored = static_cast<std::uint16_t>(reader.get(log8 ? 8 : 16));
    const double norm =
        log8 ? std::exp2(static_cast<std::int8_t>(stored) / 32.0) : from_half(stored);
    double yy = 0, lyy = 0, lyc = 0;
    int coded = 0;
    for (std::size_t i = 0; i < kDim; ++i)
      if (widths[i / static_cast<std::size_t>(group_size)] > 0) {
        yy += y[t * kDim + i] * y[t * kDim + i];
        ++coded;
      }
    const double n = std::sqrt(yy / coded);
    for (std::size_t i = 0; i < kDim; ++i) {
      const int width = widths[i / static_cast<std::size_t>(group_size)];
      const double coordinate = y[t * kDim + i];
      if (width == 0) {
        EXPECT_EQ(transformed[t * kDim + i], 0);
        continue;
      }
      const std::vector<float>& levels = bundle.tensors.levels[width];
      const double level = levels[reader.get(width)];
      EXPECT_NEAR(transformed[t * kDim + i], level * norm, 1e-5);
      for (const double other : levels)
        EXPECT_LE(std::abs(coordinate / n - level), std::abs(coordinate / n - other) + 1e-5);
      const double lambda = bundle.tensors.layers[0].v.lambda.data[i];
      lyy += lambda * coordinate * coordinate;
      lyc += lambda * coordinate * level;
    }
    // The stored norm is n S = sum lambda y^2 / sum lambda y c, to half a step of the format.
    EXPECT_NEAR(std::log2(norm / (lyy / lyc)), 0, log8 ? 0.5 / 32 + 1e-5 : 0x1p-10);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Rows, CalibratedLayout,
    testing::Values(
        Layout{"mixed_log8", {6, 4, 3, 0}, 16, "log8", 1 + 26},
        Layout{"mixed_fp16", {6, 4, 3, 0}, 16, "fp16", 2 + 26},
        Layout{"groups_of_8", {8, 7, 5, 4, 3, 2, 1, 1}, 8, "log8", 1 + 31},
        Layout{"groups_of_4", {7, 5, 5, 5, 3, 3, 3, 3, 1, 1, 1, 1, 1, 0, 0, 0}, 4, "log8", 1 + 20},
        Layout{"one_bit", {1, 0, 0, 0}, 16, "log8", 1 + 2}),
    [](const auto& row) { return row.param.name; });

PlanBundle trellis_plan(std::vector<int> widths, int group_size = 16) {
  PlanBundle bundle = calibrated(widths, group_size);
  bundle.plan.code = "tcq";
  for (int width = 1; width <= kMaxTrellisWidth; ++width) {
    const auto& values = trellis_table(width).values;
    bundle.tensors.trellis[width].assign(values.begin(), values.end());
  }
  return bundle;
}

class TrellisLayout : public testing::TestWithParam<Layout> {};

// Reads the bytes as docs/formats/packing.md says, without the codec's own decoder.
TEST_P(TrellisLayout, IsTheDocumentedOne) {
  const auto& [name, widths, group_size, norm_name, bytes] = GetParam();
  PlanBundle bundle = trellis_plan(widths, group_size);
  bundle.plan.norm = norm_name;
  const auto codec = make_codec(bundle, 0, Side::kValue);
  const std::vector<float> x = white_vectors(bundle, 40);
  const std::vector<double> y = transform(bundle, x);
  std::vector<std::byte> codes = encode(*codec, x);
  ASSERT_EQ(codes.size(), 40 * bytes);
  const auto width_of = [&](std::size_t i) {
    return widths[i / static_cast<std::size_t>(group_size)];
  };
  std::size_t first = 0, end = 0, first_bit = 8 * (bundle.plan.norm == "log8" ? 1 : 2);
  while (width_of(first) > kMaxTrellisWidth)
    first_bit += static_cast<std::size_t>(width_of(first++));
  std::size_t end_bit = first_bit;
  for (end = first; end < kDim && width_of(end) > 0; ++end)
    end_bit += static_cast<std::size_t>(width_of(end));
  ASSERT_EQ((end_bit + 7) / 8, bytes);

  std::vector<float> transformed(x.size());
  codec->decode_transformed(shape_of(40), codes, transformed);
  for (std::size_t t = 0; t < 40; ++t) {
    const auto own = std::span<const std::byte>(codes).subspan(t * bytes, bytes);
    const auto bit = [&](std::size_t at) { return static_cast<int>(own[at / 8] >> at % 8) & 1; };
    const double norm = bundle.plan.norm == "log8"
                            ? std::exp2(static_cast<std::int8_t>(own[0]) / 32.0)
                            : from_half(static_cast<std::uint16_t>(static_cast<int>(own[1]) << 8 |
                                                                   static_cast<int>(own[0])));
    double yy = 0, lyy = 0, lyc = 0;
    for (std::size_t i = 0; i < end; ++i) yy += y[t * kDim + i] * y[t * kDim + i];
    const double n = std::sqrt(yy / static_cast<double>(end));
    std::size_t position = 8 * (bundle.plan.norm == "log8" ? 1 : 2);
    for (std::size_t i = 0; i < end; ++i) {
      const bool trellis = i >= first;
      std::size_t index = 0;
      for (std::size_t k = 0; k < (trellis ? 8 : static_cast<std::size_t>(width_of(i))); ++k) {
        std::size_t at = position + k;
        if (trellis && at >= end_bit) at -= end_bit - first_bit;
        index |= static_cast<std::size_t>(bit(at)) << k;
      }
      position += static_cast<std::size_t>(width_of(i));
      const double level = trellis ? bundle.tensors.trellis[width_of(i)][index]
                                   : bundle.tensors.levels[width_of(i)][index];
      EXPECT_NEAR(transformed[t * kDim + i], level * norm, 1e-5) << t << ", " << i;
      const double lambda = bundle.tensors.layers[0].v.lambda.data[i];
      lyy += lambda * y[t * kDim + i] * y[t * kDim + i];
      lyc += lambda * y[t * kDim + i] * level;
    }
    for (std::size_t i = end; i < kDim; ++i) EXPECT_EQ(transformed[t * kDim + i], 0);
    const double scale = std::clamp(lyy / (n * lyc), 0.5, 4.0);
    EXPECT_NEAR(std::log2(norm / (n * scale)), 0,
                bundle.plan.norm == "log8" ? 0.5 / 32 + 1e-5 : 0x1p-10);
  }

  // Bits behind the last code mean nothing.
  if (end_bit % 8 == 0) return;
  std::vector<float> again(x.size());
  for (std::size_t t = 0; t < 40; ++t) codes[t * bytes + bytes - 1] |= std::byte{0x80};
  codec->decode_transformed(shape_of(40), codes, again);
  EXPECT_EQ(again, transformed);
}

INSTANTIATE_TEST_SUITE_P(
    Rows, TrellisLayout,
    testing::Values(
        Layout{"mixed_log8", {6, 4, 3, 0}, 16, "log8", 1 + 26},
        Layout{"mixed_fp16", {6, 4, 3, 0}, 16, "fp16", 2 + 26},
        Layout{"all_in_the_trellis", {4, 3, 2, 1}, 16, "log8", 1 + 20},
        Layout{"groups_of_8", {8, 7, 5, 4, 3, 2, 1, 1}, 8, "log8", 1 + 31},
        Layout{"groups_of_4", {7, 7, 5, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0}, 4, "log8", 1 + 18},
        Layout{"groups_of_2",
               {6, 6, 6, 5, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
               2,
               "log8",
               1 + 12},
        Layout{"one_bit", {1, 1, 0, 0}, 16, "log8", 1 + 4}),
    [](const auto& row) { return row.param.name; });

TEST(TrellisCodec, FewerThanThirtyTwoCoordinatesAreScalar) {
  const PlanBundle tcq = trellis_plan({6, 5, 4, 0}), scalar = calibrated({6, 5, 4, 0});
  const std::vector<float> x = white_vectors(tcq, 10);
  EXPECT_EQ(encode(*make_codec(tcq, 0, Side::kKey), x),
            encode(*make_codec(scalar, 0, Side::kKey), x));
}

TEST(TrellisCodec, TokensArePackedIndependently) {
  const PlanBundle bundle = trellis_plan({5, 3, 2, 0});
  const auto codec = make_codec(bundle, 0, Side::kValue);
  const std::vector<float> x = white_vectors(bundle, 37);
  const auto whole = encode(*codec, x);
  const std::size_t bytes = whole.size() / 37;
  for (const std::size_t t : {0u, 31u, 32u, 36u})
    EXPECT_THAT(encode(*codec, std::span(x).subspan(t * kDim, kDim)),
                testing::ElementsAreArray(std::span(whole).subspan(t * bytes, bytes)));
}

TEST(TrellisCodec, HasTheErrorOfItsTablesAndIsUnbiased) {
  for (int width = 1; width <= kMaxTrellisWidth; ++width) {
    const PlanBundle bundle = trellis_plan({width, width, width, width});
    const auto codec = make_codec(bundle, 0, Side::kValue);
    const std::vector<float> x = white_vectors(bundle, 500);
    std::vector<float> y_hat(x.size());
    codec->decode_transformed(shape_of(500), encode(*codec, x), y_hat);
    const auto y = transform(bundle, x);
    double error = 0, product = 0, energy = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double lambda = bundle.tensors.layers[0].v.lambda.data[i % kDim];
      error += lambda * (y[i] - y_hat[i]) * (y[i] - y_hat[i]);
      product += lambda * y[i] * y_hat[i];
      energy += lambda * y[i] * y[i];
    }
    EXPECT_NEAR(product / energy, 1, 0.01) << width;
    const double distortion = trellis_distortion(width);
    EXPECT_LT(error / energy, 0.9 * unbiased_distortion("lloyd_max", width)) << width;
    // The weights of this plan fall by 8, and the trellis spends its error where they are small.
    EXPECT_LT(error / energy, 1.1 * distortion / (1 - distortion)) << width;
    EXPECT_GT(error / energy, 0.7 * distortion / (1 - distortion)) << width;
  }
}

TEST(TrellisCodec, ZeroAndHugeVectorsStayFinite) {
  const PlanBundle bundle = trellis_plan({4, 3, 2, 0});
  const auto codec = make_codec(bundle, 0, Side::kValue);
  const std::vector<float>& mean = bundle.tensors.layers[0].v.mean.data;
  EXPECT_EQ(encode(*codec, mean)[0], std::byte{0x80}) << "the smallest norm";
  const auto codes = encode(*codec, std::vector<float>(kDim, 60000));
  EXPECT_EQ(codes[0], std::byte{127});
  std::vector<float> x_hat(kDim);
  codec->decode(shape_of(1), 4, codes, x_hat);
  for (const float value : x_hat) EXPECT_TRUE(std::isfinite(value));
}

TEST(TrellisCodec, RefusesIncompletePlans) {
  PlanBundle bundle = trellis_plan({4, 3, 2, 0});
  bundle.tensors.levels.clear();
  EXPECT_NO_THROW(make_codec(bundle, 0, Side::kKey)) << "no scalar width is in use";
  bundle.tensors.trellis[3].pop_back();
  EXPECT_THROW(make_codec(bundle, 0, Side::kKey), InputError);
  bundle.tensors.trellis.erase(3);
  EXPECT_THROW(make_codec(bundle, 0, Side::kKey), InputError);
  bundle = trellis_plan({6, 5, 4, 0});
  bundle.tensors.levels.erase(4);
  EXPECT_THROW(make_codec(bundle, 0, Side::kKey), InputError) << "too short for the trellis";
}

TEST(CalibratedCodec, TokensArePackedIndependently) {
  const PlanBundle bundle = calibrated({5, 3, 2, 0});
  const auto codec = make_codec(bundle, 0, Side::kValue);
  const std::vector<float> x = white_vectors(bundle, 67);
  const auto whole = encode(*codec, x);
  const std::size_t bytes = whole.size() / 67;
  for (const std::size_t t : {0u, 31u, 32u, 66u})
    EXPECT_THAT(encode(*codec, std::span(x).subspan(t * kDim, kDim)),
                testing::ElementsAreArray(std::span(whole).subspan(t * bytes, bytes)));
}

TEST(CalibratedCodec, ErrorFallsWithBits) {
  double previous = 2;
  for (int width = 1; width <= 8; ++width) {
    const PlanBundle bundle = calibrated({width, width, width, width});
    const auto codec = make_codec(bundle, 0, Side::kValue);
    const std::vector<float> x = white_vectors(bundle, 500);
    std::vector<float> x_hat(x.size());
    round_trip(*codec, shape_of(500), 4, x, x_hat);
    const auto y = transform(bundle, x), y_hat = transform(bundle, x_hat);
    double error = 0;
    for (std::size_t i = 0; i < y.size(); ++i) error += (y[i] - y_hat[i]) * (y[i] - y_hat[i]);
    error /= static_cast<double>(y.size());
    EXPECT_LT(error, previous) << width;
    // D/(1-D), and the 8-bit norm with a relative step of ln(2)/32.
    const double norm_error = std::pow(std::log(2.0) / 32, 2) / 12;
    EXPECT_NEAR(error / (unbiased_distortion("lloyd_max", width) + norm_error), 1, 0.06) << width;
    previous = error;
  }
}

TEST(CalibratedCodec, IsUnbiasedInTheMetric) {
  const PlanBundle bundle = calibrated({3, 2, 2, 1});
  const auto codec = make_codec(bundle, 0, Side::kValue);
  const std::vector<float> x = white_vectors(bundle, 2000);
  std::vector<float> y_hat(x.size());
  codec->decode_transformed(shape_of(2000), encode(*codec, x), y_hat);
  const auto y = transform(bundle, x);
  double product = 0, energy = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double lambda = bundle.tensors.layers[0].v.lambda.data[i % kDim];
    product += lambda * y[i] * y_hat[i];
    energy += lambda * y[i] * y[i];
  }
  EXPECT_NEAR(product / energy, 1, 0.01);
}

TEST(CalibratedCodec, ZeroVectorStoresTheSmallestNormAndTheCodesNearestZero) {
  PlanBundle bundle = calibrated({2, 2, 2, 2});
  const std::vector<float>& mean = bundle.tensors.layers[0].v.mean.data;
  const auto codec = make_codec(bundle, 0, Side::kValue);
  const auto codes = encode(*codec, mean);
  EXPECT_EQ(codes[0], std::byte{0x80});
  for (std::size_t i = 1; i < codes.size(); ++i) EXPECT_EQ(codes[i], std::byte{0b01010101});
  bundle.plan.norm = "fp16";
  const auto fp16_codec = make_codec(bundle, 0, Side::kValue);
  std::vector<float> x_hat(kDim);
  fp16_codec->decode(shape_of(1), 4, encode(*fp16_codec, mean), x_hat);
  EXPECT_EQ(x_hat, mean);
}

TEST(CalibratedCodec, NormIsClampedToItsRange) {
  const PlanBundle bundle = calibrated({4, 4, 4, 4});
  const auto codec = make_codec(bundle, 0, Side::kValue);
  std::vector<float> huge(kDim, 60000);
  EXPECT_EQ(encode(*codec, huge)[0], std::byte{127});
}

TEST(CalibratedCodec, EmptyHeadStoresItsNormAndReadsTheMean) {
  const PlanBundle bundle = calibrated({0, 0, 0, 0});
  const auto codec = make_codec(bundle, 0, Side::kValue);
  EXPECT_EQ(codec->bits_per_token(), 8);
  std::vector<float> x_hat(3 * kDim);
  round_trip(*codec, shape_of(3), 4, white_vectors(bundle, 3), x_hat);
  for (std::size_t i = 0; i < x_hat.size(); ++i)
    EXPECT_EQ(x_hat[i], bundle.tensors.layers[0].v.mean.data[i % kDim]);
}

TEST(CalibratedCodec, Fp16HeadIsExact) {
  PlanBundle bundle = calibrated({16, 16, 16, 16});
  bundle.tensors.layers[0].k.analysis = {};  // not needed
  const auto codec = make_codec(bundle, 0, Side::kKey);
  EXPECT_EQ(codec->bits_per_token(), 16 * kDim);
  std::vector<float> x = white_vectors(bundle, 40), x_hat(x.size());
  for (float& value : x) value = round_to_half(value);
  round_trip(*codec, shape_of(40), 4, x, x_hat);
  EXPECT_EQ(x_hat, x);
  EXPECT_THROW(codec->decode_transformed(shape_of(40), encode(*codec, x), x_hat), ArgumentError);
}

TEST(CalibratedCodec, VanishingMetricStillStores) {
  PlanBundle bundle = calibrated({4, 4, 4, 4});
  std::fill(bundle.tensors.layers[0].v.lambda.data.begin(),
            bundle.tensors.layers[0].v.lambda.data.end(), 0.0f);
  const std::vector<float> x = white_vectors(bundle, 20);
  std::vector<float> x_hat(x.size());
  round_trip(*make_codec(bundle, 0, Side::kValue), shape_of(20), 4, x, x_hat);
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x_hat[i], x[i], 2);
}

TEST(CalibratedCodec, RefusesIncompletePlans) {
  const auto refuses = [](const char* what, auto change) {
    PlanBundle bundle = calibrated({3, 3, 2, 0});
    change(bundle);
    EXPECT_THROW(make_codec(bundle, 0, Side::kKey), InputError) << what;
  };
  refuses("levels missing", [](PlanBundle& b) { b.tensors.levels.erase(3); });
  refuses("levels short", [](PlanBundle& b) { b.tensors.levels[3].pop_back(); });
  refuses("levels not ascending", [](PlanBundle& b) { b.tensors.levels[3][1] = NAN; });
  refuses("analysis shape", [](PlanBundle& b) { b.tensors.layers[0].k.analysis = {}; });
  refuses("lambda shape",
          [](PlanBundle& b) { b.tensors.layers[0].k.lambda = Array<float>({kDim}); });
  refuses("mean shape", [](PlanBundle& b) { b.tensors.layers[0].k.mean = {}; });
  refuses("no layers", [](PlanBundle& b) { b.tensors.layers.clear(); });
  refuses("ascending widths",
          [](PlanBundle& b) { b.plan.layers[0].k.heads[0].widths = {2, 3, 3, 0}; });
  refuses("width after 0",
          [](PlanBundle& b) { b.plan.layers[0].k.heads[0].widths = {3, 0, 3, 0}; });
  refuses("too few widths", [](PlanBundle& b) { b.plan.layers[0].k.heads[0].widths = {3, 3}; });
  refuses("outliers", [](PlanBundle& b) { b.plan.layers[0].k.heads[0].outliers = {1}; });
}

}  // namespace
}  // namespace kvplan::quant
