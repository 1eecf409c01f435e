#include "quant/vector_code.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "quant/rotation.h"
#include "schemas/error.h"
#include "tests/quant/codec_fixtures.h"

namespace kvplan::quant {
namespace {

using namespace kvplan::quant::testing;

struct Coded {
  std::vector<int> bytes;
  std::vector<float> x_hat;
};

Coded coded(const VectorCode& code, const std::vector<float>& x) {
  std::vector<std::byte> bytes(code.bytes() * (x.size() / code.size()));
  code.encode(x, {bytes.data(), code.bytes()});
  Coded out{{}, std::vector<float>(x.size())};
  for (const std::byte byte : bytes) out.bytes.push_back(std::to_integer<int>(byte));
  code.decode({bytes.data(), code.bytes()}, out.x_hat);
  return out;
}

TEST(AbsmaxCode, IsSymmetricAndKeepsTheLargestValue) {
  // Scale 3.5 / 7 = 1/2: codes -7, 1, 3, 0 as nibbles 9, 1, 3, 0.
  const Coded result = coded(*make_absmax_code(4, 4, 4), {-3.5f, 0.6f, 1.4f, 0.2f});
  EXPECT_THAT(result.bytes, ::testing::ElementsAre(0x00, 0x38, 0x19, 0x03));
  EXPECT_THAT(result.x_hat, ::testing::ElementsAre(-3.5f, 0.5f, 1.5f, 0.0f));
}

TEST(AbsmaxCode, GroupsHaveTheirOwnScale) {
  const auto code = make_absmax_code(5, 2, 2);
  EXPECT_EQ(code->bytes(), 9u);
  EXPECT_THAT(coded(*code, {1, -1, 100, 0, -0.25f}).x_hat,
              ::testing::ElementsAre(1, -1, 100, 0, -0.25f));
  EXPECT_THAT(coded(*code, {0, 0, 0, 0, 0}).x_hat, ::testing::Each(0));
}

TEST(FloatCode, RoundsToTheNearestEvenCodeAndSaturates) {
  // OFP8 tables: e4m3 has 448 = 0x7e, 1 = 0x38, 2^-9 = 0x01; e5m2 has 57344 = 0x7b, 1 = 0x3c,
  // 2^-16 = 0x01.
  const Coded e4m3 = coded(*make_float_code("fp8_e4m3", 8, 1),
                           {448, 1, 0x1p-9f, -0x1p-10f, 1000, 1.0625f, 1.1875f, 15.5f});
  EXPECT_THAT(e4m3.bytes, ::testing::ElementsAre(0x7e, 0x38, 0x01, 0x80, 0x7e, 0x38, 0x3a, 0x58));
  EXPECT_THAT(e4m3.x_hat, ::testing::ElementsAre(448, 1, 0x1p-9f, 0, 448, 1, 1.25f, 16));
  const Coded e5m2 =
      coded(*make_float_code("fp8_e5m2", 5, 1), {65504, -1, 0x1p-16f, 1.125f, 1.375f});
  EXPECT_THAT(e5m2.bytes, ::testing::ElementsAre(0x7b, 0xbc, 0x01, 0x3c, 0x3e));
}

TEST(FloatCode, EveryFp8CodeReadsBackAsItself) {
  for (const auto* format : {"fp8_e4m3", "fp8_e5m2"}) {
    const auto code = make_float_code(format, 1, 0.25f);
    for (int byte = 0; byte < 256; ++byte) {
      const auto stored = static_cast<std::byte>(byte);
      std::vector<float> x(1);
      code->decode({&stored, 1}, x);
      if (std::abs(x[0]) > 0.25f * largest_float(format)) continue;  // codes of infinity and NaN
      EXPECT_EQ(coded(*code, x).bytes.front(), byte) << format;
    }
  }
}

TEST(FloatCode, StaticScaleMovesTheRange) {
  const auto code = make_float_code("fp8_e4m3", 2, 2);
  EXPECT_THAT(coded(*code, {896, 2000}).x_hat, ::testing::ElementsAre(896, 896));
}

TEST(FloatCode, Mxfp4TakesThePowerOfTwoBelowTheLargestValue) {
  // floor(log2 7) - 2 = 0: scale 1 = code 127, 7 saturates to 6; ties go to even codes.
  std::vector<float> x(32);
  x[0] = 7, x[1] = -0.25f, x[2] = 0.75f, x[3] = 2.5f, x[4] = 5, x[5] = -3;
  const Coded result = coded(*make_float_code("mxfp4", 32, 1), x);
  EXPECT_EQ(result.bytes.size(), 17u);
  EXPECT_EQ(result.bytes[0], 127);
  EXPECT_EQ(result.bytes[1], 0x87);  // 6, then -0
  EXPECT_THAT(std::vector(result.x_hat.begin(), result.x_hat.begin() + 6),
              ::testing::ElementsAre(6, 0, 1, 2, 4, -3));
  EXPECT_THAT(coded(*make_float_code("mxfp4", 32, 1), std::vector<float>(32)).x_hat,
              ::testing::Each(0));
}

TEST(FloatCode, Nvfp4ScalesBlocksOf16) {
  std::vector<float> x(20);
  x[0] = 12, x[1] = -6, x[16] = 0.75f, x[17] = 0.125f;
  const auto code = make_float_code("nvfp4", 20, 1);
  EXPECT_EQ(code->bytes(), 9u + 3);  // the last block takes what is left
  const Coded result = coded(*code, x);
  EXPECT_EQ(result.bytes[0], 0x40);  // 2
  EXPECT_EQ(result.bytes[9], 0x20);  // 1/8
  EXPECT_EQ(result.x_hat, x);
  EXPECT_THROW(make_float_code("nf4", 16, 1), InternalError);
}

std::vector<float> identity(std::size_t n) {
  std::vector<float> matrix(n * n);
  for (std::size_t i = 0; i < n; ++i) matrix[i * n + i] = 1;
  return matrix;
}

TEST(PolarCode, BinsCoverTheCircle) {
  for (const int bits : {1, 3, 8}) {
    const auto centre = make_polar_code(2, identity(2), bits, true);
    const auto edge = make_polar_code(2, identity(2), bits, false);
    const double step = 2 * std::numbers::pi / (1 << bits);
    for (int k = 0; k < 1 << bits; ++k) {
      const double angle = (k + 0.3) * step;
      const std::vector<float> x = {static_cast<float>(2 * std::cos(angle)),
                                    static_cast<float>(2 * std::sin(angle))};
      const Coded at_centre = coded(*centre, x), at_edge = coded(*edge, x);
      EXPECT_EQ(at_centre.bytes.back(), k) << bits;
      EXPECT_NEAR(at_centre.x_hat[0], 2 * std::cos((k + 0.5) * step), 2e-3);
      EXPECT_NEAR(at_centre.x_hat[1], 2 * std::sin((k + 0.5) * step), 2e-3);
      EXPECT_NEAR(at_edge.x_hat[0], 2 * std::cos(k * step), 2e-3);
      EXPECT_NEAR(at_edge.x_hat[1], 2 * std::sin(k * step), 2e-3);
    }
  }
  EXPECT_THAT(coded(*make_polar_code(2, identity(2), 4, true), {0, 0}).x_hat, ::testing::Each(0));
}

TEST(ScalarCode, DividesByTheDeviationAboutTheMean) {
  // Norm 2 sqrt(2), mean 2, deviation 2: half the coordinates 0, half 4.
  ScalarCodeSpec spec{.size = 8,
                      .rotation = identity(8),
                      .book = codebook("lloyd_max", 1),
                      .norm_block = 8,
                      .with_deviation = true};
  const std::vector<float> x = {0, 4, 0, 4, 0, 4, 0, 4};
  const Coded result = coded(*make_scalar_code(std::move(spec)), x);
  EXPECT_EQ(result.bytes.size(), 5u);
  EXPECT_EQ(result.bytes[4], 0xaa);
  EXPECT_NEAR(result.x_hat[1], 2 * std::sqrt(2 / std::numbers::pi), 2e-3);
}

TEST(SignSketch, StoresSignsAndNorm) {
  // Rows e1, -e2; |(3,4)| = 5.
  const auto code = make_sign_sketch(2, {1, 0, 0, -1});
  const Coded result = coded(*code, {3, 4});
  EXPECT_THAT(result.bytes, ::testing::ElementsAre(0x00, 0x45, 0x02));
  const double expected = std::sqrt(std::numbers::pi / 2) / 2 * 5;
  EXPECT_NEAR(result.x_hat[0], expected, 1e-5);
  EXPECT_NEAR(result.x_hat[1], expected, 1e-5);
  EXPECT_THAT(coded(*code, {0, 0}).x_hat, ::testing::Each(0));
}

TEST(SketchMatrix, RowsHaveTheLengthOfGaussianRows) {
  constexpr int kD = 32;
  for (const auto* kind : {"gaussian", "rademacher", "orthogonal"})
    for (const int rows : {8, 32, 80}) {
      const RotatedVariant variant{.sketch = kind, .sketch_rows = rows};
      const auto matrix = sketch_matrix(variant, {.seed = 3}, kD, 0, 0, Side::kKey);
      ASSERT_EQ(matrix.size(), static_cast<std::size_t>(rows * kD)) << kind;
      double square = 0;
      for (const double value : matrix) square += value * value;
      const double tolerance = kind == std::string("gaussian") ? 0.2 : 1e-9;
      EXPECT_NEAR(square / rows / kD, 1, tolerance) << kind << rows;
      EXPECT_EQ(matrix, sketch_matrix(variant, {.seed = 3}, kD, 1, 1, Side::kValue));
      EXPECT_NE(matrix, sketch_matrix(variant, {.seed = 4}, kD, 0, 0, Side::kKey));
      EXPECT_NE(matrix, sketch_matrix(variant, {.scope = "head", .seed = 3}, kD, 1, 1, Side::kKey));
    }
  EXPECT_THROW(sketch_matrix({.sketch = "sparse", .sketch_rows = 4}, {}, kD, 0, 0, Side::kKey),
               ArgumentError);
}

TEST(SketchMatrix, OrthogonalBlocksAreIndependent) {
  constexpr std::size_t kD = 16;
  const auto s =
      sketch_matrix({.sketch = "orthogonal", .sketch_rows = 40}, {.seed = 1}, kD, 0, 0, Side::kKey);
  const auto product = [&](std::size_t a, std::size_t b) {
    double sum = 0;
    for (std::size_t i = 0; i < kD; ++i) sum += s[a * kD + i] * s[b * kD + i];
    return sum / kD;
  };
  for (std::size_t a = 0; a < 16; ++a)
    for (std::size_t b = 0; b < a; ++b) EXPECT_NEAR(product(a, b), 0, 1e-12);
  double across = 0;
  for (std::size_t b = 16; b < 32; ++b) across += std::abs(product(0, b));
  EXPECT_GT(across, 0.5);
}

}  // namespace
}  // namespace kvplan::quant
