#include "models/dequantize.h"

#include <gtest/gtest.h>

#include <bit>
#include <limits>

#include "schemas/error.h"
#include "schemas/safetensors.h"
#include "tests/models/fixtures.h"

namespace kvplan::models {
namespace {

class Dequantize : public FixtureTest, public testing::WithParamInterface<GgmlType> {};

// Expected values: gguf.quants.dequantize of the gguf Python package (tests/make_fixtures.py,
// make_dequantize).
TEST_P(Dequantize, EqualsGgufPackageBitForBit) {
  const SafetensorsFile fixture(fixtures() / "dequantize.safetensors");
  const std::string name = ggml_block(static_cast<std::uint32_t>(GetParam()))->name;
  const auto expected = fixture.f32(name + ".values");
  std::vector<float> found(expected.data.size());
  dequantize(GetParam(), fixture.at(name + ".bytes").data, found);
  for (std::size_t i = 0; i < found.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(found[i]),
              std::bit_cast<std::uint32_t>(expected.data[i]))
        << "element " << i << ": expected " << expected.data[i] << ", found " << found[i];
  }
}

constexpr GgmlType kTypes[] = {GgmlType::kF32,  GgmlType::kF16,   GgmlType::kBF16, GgmlType::kQ4_0,
                               GgmlType::kQ4_1, GgmlType::kQ5_0,  GgmlType::kQ5_1, GgmlType::kQ8_0,
                               GgmlType::kQ2_K, GgmlType::kQ3_K,  GgmlType::kQ4_K, GgmlType::kQ5_K,
                               GgmlType::kQ6_K, GgmlType::kIQ4_NL};

INSTANTIATE_TEST_SUITE_P(Types, Dequantize, testing::ValuesIn(kTypes), [](const auto& row) {
  return ggml_block(static_cast<std::uint32_t>(row.param))->name;
});

// d = 0.5, m = -1; byte 0x21 holds element 0 (code 1) and element 16 (code 2).
TEST(DequantizeByHand, Q4_1) {
  std::vector<std::byte> block(20);
  block[1] = std::byte{0x38};
  block[3] = std::byte{0xbc};
  block[4] = std::byte{0x21};
  std::vector<float> values(32);
  dequantize(GgmlType::kQ4_1, block, values);
  EXPECT_EQ(values[0], -0.5f);
  EXPECT_EQ(values[1], -1.0f);
  EXPECT_EQ(values[16], 0.0f);
}

TEST(DequantizeByHand, HalfInfinityAndNanStayThemselves) {
  const std::vector<std::byte> halves = {std::byte{0},    std::byte{0x7c}, std::byte{0},
                                         std::byte{0xfc}, std::byte{1},    std::byte{0x7c}};
  std::vector<float> values(3);
  dequantize(GgmlType::kF16, halves, values);
  EXPECT_EQ(values[0], std::numeric_limits<float>::infinity());
  EXPECT_EQ(values[1], -std::numeric_limits<float>::infinity());
  EXPECT_NE(values[2], values[2]);
}

TEST(DequantizeSizes, MismatchIsRefused) {
  std::vector<std::byte> data(34);
  std::vector<float> values(64);
  EXPECT_THROW(dequantize(GgmlType::kQ8_0, data, values), ArgumentError);
  EXPECT_THROW(dequantize(GgmlType::kQ8_0, data, std::span(values).first(31)), ArgumentError);
  EXPECT_THROW(dequantize(static_cast<GgmlType>(99), data, values), ArgumentError);
  EXPECT_NO_THROW(dequantize(GgmlType::kQ8_0, data, std::span(values).first(32)));
}

TEST(FirstNonFinite, FindsTheFirst) {
  std::vector<float> values(100, std::numeric_limits<float>::max());
  EXPECT_EQ(first_non_finite(values), 100u);
  values[70] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(first_non_finite(values), 70u);
  values[31] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(first_non_finite(values), 31u);
  EXPECT_EQ(first_non_finite({}), 0u);
}

}  // namespace
}  // namespace kvplan::models
