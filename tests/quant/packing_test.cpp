#include "quant/packing.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

TEST(BitWriter, PutsTheLowestBitFirst) {
  std::vector<std::byte> bytes(3);
  BitWriter writer(bytes);
  writer.put(0b101, 3);
  writer.put(0b11, 2);
  writer.put(0b10000001, 8);
  EXPECT_EQ(writer.bit_position(), 13u);
  writer.align_to_byte();
  writer.put(0xff, 4);  // only the low 4 bits
  EXPECT_EQ(bytes, (std::vector{std::byte{0b00111101}, std::byte{0b00010000}, std::byte{0x0f}}));
}

TEST(BitReader, ReadsBackRandomFields) {
  RandomStream random(3, StreamPurpose::kTest);
  std::vector<std::pair<std::uint64_t, int>> fields;
  int total = 0;
  for (int i = 0; i < 500; ++i) {
    const int bits = static_cast<int>(random.next_below(65));
    const std::uint64_t value = std::uint64_t{random.next_u32()} << 32 | random.next_u32();
    fields.emplace_back(bits == 64 ? value : value & ((std::uint64_t{1} << bits) - 1), bits);
    total += bits;
  }
  std::vector<std::byte> bytes(static_cast<std::size_t>(total + 7) / 8);
  BitWriter writer(bytes);
  for (const auto& [value, bits] : fields) writer.put(value, bits);
  BitReader reader(bytes);
  for (const auto& [value, bits] : fields) ASSERT_EQ(reader.get(bits), value) << bits;
}

TEST(BitWriter, RefusesToPassTheEnd) {
  std::vector<std::byte> bytes(1);
  BitWriter writer(bytes);
  writer.put(0, 5);
  EXPECT_THROW(writer.put(0, 4), ArgumentError);
  EXPECT_THROW(writer.put(0, 65), ArgumentError);
  EXPECT_THROW(writer.put(0, -1), ArgumentError);
  BitReader reader(bytes);
  EXPECT_THROW(reader.get(9), ArgumentError);
}

TEST(Half, RoundTripsEveryBitPattern) {
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const float x = from_half(static_cast<std::uint16_t>(h));
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(from_half(to_half(x))));
    } else {
      ASSERT_EQ(to_half(x), h);
      ASSERT_EQ(round_to_half(x), x);
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  struct Row {
    float x, rounded;
  };
  const float infinity = std::numeric_limits<float>::infinity();
  for (const auto& [x, rounded] :
       std::initializer_list<Row>{{1 + 0x1p-11f, 1},                 // tie to even, down
                                  {1 + 3 * 0x1p-11f, 1 + 0x1p-9f},   // tie to even, up
                                  {1 + 0x1.004p-11f, 1 + 0x1p-10f},  // above the tie
                                  {65519.996f, 65504},  // largest that does not overflow
                                  {65520, infinity},
                                  {-1e30f, -infinity},
                                  {0x1p-25f, 0},  // tie between 0 and the smallest subnormal
                                  {0x1.8p-25f, 0x1p-24f},
                                  {-0x1.8p-24f, -0x1p-23f},  // subnormal tie to even
                                  {0x1.ffep-15f, 0x1p-14f},  // rounds up into the normals
                                  {-0.0f, -0.0f}}) {
    EXPECT_EQ(round_to_half(x), rounded) << x;
    EXPECT_EQ(from_half(to_half(x)), rounded) << x;
  }
  EXPECT_TRUE(std::signbit(round_to_half(-0.0f)));
  EXPECT_TRUE(std::isnan(round_to_half(NAN)));
}

TEST(Bfloat16, RoundsToNearestEven) {
  EXPECT_EQ(to_bfloat16(1), 0x3f80);
  EXPECT_EQ(to_bfloat16(1 + 0x1p-8f), 0x3f80);
  EXPECT_EQ(to_bfloat16(1 + 3 * 0x1p-8f), 0x3f82);
  EXPECT_EQ(to_bfloat16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(from_bfloat16(to_bfloat16(NAN))));
  for (std::uint32_t h = 0; h < 0x7f80; ++h)
    ASSERT_EQ(to_bfloat16(from_bfloat16(static_cast<std::uint16_t>(h))), h);
}

}  // namespace
}  // namespace kvplan::quant
