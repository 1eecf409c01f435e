// Pages against the linear form, and against places of codes derived by hand from the fragment
// layout of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type").

#include "quant/page_layout.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <string>

#include "quant/packing.h"
#include "schemas/error.h"
#include "tests/quant/page_fixtures.h"

namespace kvplan::quant {
namespace {

using namespace kvplan::quant::testing;

constexpr int kWidths[] = {1, 2, 3, 4, 5, 6, 7, 8, 16};

TEST(TilePlaces, OfHandDerivedCodes) {
  struct Row {
    Side side;
    int token, coordinate;
    bool half_tile;
    int lane, pair, half;
  };
  const Row rows[] = {
      {Side::kKey, 0, 0, false, 0, 0, 0},       {Side::kKey, 9, 3, false, 5, 1, 1},
      {Side::kKey, 25, 12, false, 6, 7, 0},     {Side::kKey, 63, 15, false, 31, 15, 1},
      {Side::kKey, 48, 9, false, 0, 14, 1},     {Side::kValue, 0, 0, false, 0, 0, 0},
      {Side::kValue, 3, 9, false, 5, 1, 1},     {Side::kValue, 28, 9, false, 6, 7, 0},
      {Side::kValue, 63, 15, false, 31, 15, 1}, {Side::kValue, 40, 2, false, 8, 10, 0},
      {Side::kKey, 9, 3, true, 5, 1, 1},        {Side::kKey, 56, 7, true, 3, 7, 1},
      {Side::kValue, 9, 3, true, 12, 1, 1},     {Side::kValue, 48, 7, true, 28, 6, 0},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(std::string(side_name(row.side)) + " token " + std::to_string(row.token) +
                 " coordinate " + std::to_string(row.coordinate));
    const TilePlace place = tile_place(row.side, row.token, row.coordinate, row.half_tile);
    EXPECT_EQ(place.lane, row.lane);
    EXPECT_EQ(place.pair, row.pair);
    EXPECT_EQ(place.half, row.half);
  }
}

/// word.shift of the bits of a code, lowest first.
std::string bits_of(const CodeParts& parts) {
  std::string text;
  int next = 0;
  for (int i = 0; i < parts.count; ++i) {
    const CodePart& part = parts.part[i];
    EXPECT_EQ(part.from, next);
    next += part.bits;
    text += (i > 0 ? " " : "") + std::to_string(part.word) + "." + std::to_string(part.shift) +
            "x" + std::to_string(part.bits);
  }
  return text;
}

TEST(CodeParts, OfStreamsDerivedByHand) {
  struct Row {
    int width, code;
    bool half_tile;
    const char* bits;
  };
  const Row rows[] = {{3, 0, false, "0.7x3"},        {3, 31, false, "0.4x3"},
                      {3, 8, false, "0.31x1 1.0x2"}, {8, 31, false, "7.31x1 0.0x7"},
                      {7, 31, false, "0.0x7"},       {2, 1, false, "0.9x2"},
                      {16, 7, false, "3.16x16"},     {3, 7, true, "1.5x3"},
                      {5, 3, true, "0.15x1 1.0x4"},  {16, 14, true, "14.0x16"}};
  for (const Row& row : rows)
    EXPECT_EQ(bits_of(stream_parts(row.width, row.half_tile, row.code)), row.bits)
        << "width " << row.width << " code " << row.code;
}

TEST(CodeParts, OfBytesDerivedByHand) {
  // Code 2 p + h is byte 2 h + r1 of register 2 i + r0, p = 4 i + r0 + 2 r1; of a half tile byte 2
  // h
  // + r of step i, p = 2 i + r.
  struct Row {
    int width, code;
    bool half_tile;
    const char* bits;
  };
  const Row rows[] = {{1, 0, false, "0.0x1"},
                      {1, 5, false, "0.24x1"},
                      {1, 31, false, "0.31x1"},
                      {1, 9, true, "0.10x1"},
                      {2, 2, false, "0.2x2"},
                      {2, 20, false, "1.8x2"},
                      {2, 13, true, "1.6x2"},
                      {3, 3, false, "0.24x3"},
                      {3, 12, false, "1.4x3"},
                      {3, 24, false, "0.3x1 1.3x1 2.3x1"},
                      {3, 31, false, "0.31x1 1.31x1 2.31x1"},
                      {3, 15, true, "0.15x1 1.15x1 2.15x1"},
                      {4, 26, false, "3.16x4"},
                      {4, 5, true, "1.8x4"},
                      {5, 26, false, "3.16x4 4.19x1"},
                      {5, 5, true, "1.8x4 4.9x1"},
                      {6, 1, false, "0.8x4 4.8x1 5.8x1"},
                      {8, 31, false, "7.24x8"},
                      {8, 3, true, "1.8x8"}};
  for (const Row& row : rows)
    EXPECT_EQ(bits_of(byte_parts(row.width, row.half_tile, row.code)), row.bits)
        << "width " << row.width << " code " << row.code << (row.half_tile ? " half tile" : "");
}

TEST(StoredCodes, AreSignAndMagnitudeFromFiveBitsOn) {
  EXPECT_EQ(stored_code(TileCode::kBytes, 5, 0), 15u);
  EXPECT_EQ(stored_code(TileCode::kBytes, 5, 15), 0u);
  EXPECT_EQ(stored_code(TileCode::kBytes, 5, 16), 16u);
  EXPECT_EQ(stored_code(TileCode::kBytes, 6, 31), 0u);
  EXPECT_EQ(stored_code(TileCode::kBytes, 4, 3), 3u);
  EXPECT_EQ(stored_code(TileCode::kTable, 5, 3), 3u);
}

TEST(WordOffsets, OfHandDerivedWords) {
  struct Row {
    int width, word, lane;
    bool half_tile;
    std::size_t offset;
  };
  const Row rows[] = {{1, 0, 31, false, 124},    {2, 1, 3, false, 28},  {3, 1, 0, false, 4},
                      {3, 2, 5, false, 276},     {4, 3, 2, false, 44},  {6, 5, 1, false, 524},
                      {7, 5, 3, false, 540},     {7, 6, 3, false, 780}, {8, 6, 2, false, 552},
                      {16, 15, 31, false, 2044}, {2, 1, 4, true, 72},   {5, 0, 9, true, 18}};
  for (const Row& row : rows)
    EXPECT_EQ(word_offset(row.width, row.word, row.lane, row.half_tile), row.offset)
        << "width " << row.width << " word " << row.word << " lane " << row.lane;
}

TEST(Tiles, GiveEveryCodeBitsOfItsOwn) {
  for (const TileCode code : {TileCode::kTable, TileCode::kBytes})
    for (const Side side : kSides)
      for (const bool half_tile : {false, true})
        for (const int width : kWidths) {
          if (code == TileCode::kBytes && (width == 7 || width == 16)) continue;
          SCOPED_TRACE(std::string(side_name(side)) + " width " + std::to_string(width) +
                       (half_tile ? " half" : "") + (code == TileCode::kBytes ? " bytes" : ""));
          std::set<std::size_t> bits;  // of the tile
          for (int token = 0; token < kPageTokens; ++token)
            for (int i = 0; i < tile_coordinates(half_tile); ++i) {
              const TilePlace place = tile_place(side, token, i, half_tile);
              const CodeParts parts =
                  code_parts(code, width, half_tile, 2 * place.pair + place.half);
              for (int p = 0; p < parts.count; ++p)
                for (int b = 0; b < parts.part[p].bits; ++b) {
                  const std::size_t word =
                      word_offset(width, parts.part[p].word, place.lane, half_tile);
                  bits.insert(8 * word + static_cast<std::size_t>(parts.part[p].shift + b));
                }
            }
          // As many different bits as a tile has, none beyond: a bijection.
          EXPECT_EQ(bits.size(), 8 * tile_bytes(width, half_tile));
          EXPECT_EQ(*bits.rbegin(), 8 * tile_bytes(width, half_tile) - 1);
        }
}

TEST(Streams, LieAsDerivedByHand) {
  // Token 25 = 16 + 9: row block 1 of step 1, lane group 1 of keys; lane column 0 of values.
  EXPECT_EQ(stream_index(Side::kKey, 25), 0u + 4 + 2 + 1);
  EXPECT_EQ(stream_index(Side::kKey, 48), 32u + 2);
  EXPECT_EQ(stream_index(Side::kValue, 25), 16u + 0 + 2 + 1);
  EXPECT_EQ(stream_index(Side::kValue, 6), 12u);
  // Streams of 14 bytes: three words, two planes of bytes.
  EXPECT_EQ(stream_byte(Side::kKey, 14, 25, 6), 4u * (64 + 7) + 2);
  EXPECT_EQ(stream_byte(Side::kKey, 14, 25, 13), 3u * 256 + 64 + 7);
  for (const Side side : kSides)
    for (const int bytes : {1, 2, 3, 4, 7, 24}) {
      std::set<std::size_t> places;
      for (int token = 0; token < kPageTokens; ++token)
        for (int i = 0; i < bytes; ++i) places.insert(stream_byte(side, bytes, token, i));
      EXPECT_EQ(places.size(), static_cast<std::size_t>(kPageTokens * bytes));
      EXPECT_EQ(*places.rbegin(), static_cast<std::size_t>(kPageTokens * bytes - 1));
    }
}

class PagedPlans : public ::testing::TestWithParam<PagedPlan> {};

struct SideForm {
  std::vector<std::byte> linear;  // 64 tokens of all heads
  std::size_t stride = 0;
};

SideForm encoded_page(const PlanBundle& bundle, int layer, Side side) {
  const auto codec = make_codec(bundle, layer, side);
  const KvShape shape{kPageTokens, bundle.plan.model.kv_heads, bundle.plan.model.head_dim};
  SideForm form;
  form.linear = encoded(*codec, shape, gaussian(shape, side == Side::kKey ? 1 : 2));
  form.stride = form.linear.size() / kPageTokens;
  return form;
}

TEST_P(PagedPlans, ConvertToPagesAndBackToTheBit) {
  const PlanBundle bundle = GetParam().make();
  const std::vector<LayerFormat> layers = page_format(bundle);
  ASSERT_EQ(layers.size(), bundle.plan.layers.size());
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const SideForm forms[] = {encoded_page(bundle, static_cast<int>(l), Side::kKey),
                              encoded_page(bundle, static_cast<int>(l), Side::kValue)};
    std::size_t offsets[2] = {};
    for (const HeadLayout& head : layers[l].heads) {
      std::vector<std::byte> page(head.page_bytes, std::byte{0xa5});
      std::vector<std::byte> other(head.page_bytes, std::byte{0x5a});
      for (const Side side : kSides) {
        const auto s = static_cast<std::size_t>(side);
        const auto linear = std::span(forms[s].linear).subspan(offsets[s]);
        to_page(head.side(side), side, linear, forms[s].stride, page);
        to_page(head.side(side), side, linear, forms[s].stride, other);
      }
      EXPECT_EQ(page, other) << "some byte of the page belongs to nothing";
      for (const Side side : kSides) {
        const auto s = static_cast<std::size_t>(side);
        const std::size_t bytes = linear_bytes(head.side(side));
        std::vector<std::byte> back(forms[s].linear.size(), std::byte{0x77});
        const auto slice = std::span(back).subspan(offsets[s]);
        from_page(head.side(side), side, page, forms[s].stride, slice);
        for (std::size_t i = 0; i < back.size(); ++i) {
          const std::size_t in_token = i % forms[s].stride;
          const bool own = in_token >= offsets[s] && in_token < offsets[s] + bytes;
          ASSERT_EQ(back[i], own ? forms[s].linear[i] : std::byte{0x77})
              << side_name(side) << " byte " << i;
        }
        offsets[s] += bytes;
      }
    }
    for (const std::size_t s : {0, 1}) EXPECT_EQ(offsets[s], forms[s].stride);
  }
}

TEST_P(PagedPlans, HavePartsThatFollowEachOtherWithoutGaps) {
  const PlanBundle bundle = GetParam().make();
  for (const LayerFormat& layer : page_format(bundle)) {
    std::uint32_t block = 0;
    for (const HeadLayout& head : layer.heads) {
      EXPECT_EQ(head.block_offset, block);
      block += head.page_bytes;
      EXPECT_EQ(head.page_bytes % kPageAlignment, 0u);
      EXPECT_EQ(head.page_bytes, kPageTokens * (linear_bytes(head.k) + linear_bytes(head.v)));
      std::size_t end = 0;
      for (const SideLayout* side : {&head.k, &head.v}) {
        std::int32_t tiles = 0, coordinate = 0, stream_bits = 0;
        for (int r = 0; r < side->run_count + side->outlier_runs; ++r) {
          const TileRun& run = side->runs[r];
          if (r == side->run_count) coordinate = 0;
          EXPECT_EQ(run.offset, end);
          EXPECT_EQ(run.coordinate, coordinate);
          EXPECT_EQ(run.code == TileCode::kInteger, r >= side->run_count);
          EXPECT_TRUE(run.half == 0 || run.tiles == 1);
          if (run.code == TileCode::kTrellis) {
            EXPECT_EQ(run.bit, stream_bits);
            EXPECT_EQ(run.offset, side->stream_offset);
            stream_bits += run.tiles * run.width * tile_coordinates(run.half != 0);
          } else {
            EXPECT_EQ(stream_bits, 0);
            end += run.tiles * tile_bytes(run.width, run.half != 0);
          }
          coordinate += run.tiles * tile_coordinates(run.half != 0);
          tiles += run.tiles;
        }
        EXPECT_EQ(8 * side->stream_bytes, stream_bits);
        end += static_cast<std::size_t>(kPageTokens * side->stream_bytes);
        EXPECT_EQ(side->tiles, tiles);
        EXPECT_EQ(coordinate, side->outlier_runs > 0 ? side->outliers : side->coded);
      }
      for (const SideLayout* side : {&head.k, &head.v}) {
        EXPECT_EQ(side->norm_offset, end);
        end += static_cast<std::size_t>(kPageTokens * side->norm_bytes);
      }
      for (const SideLayout* side : {&head.k, &head.v})
        if (side->outliers > 0) {
          EXPECT_EQ(side->scale_offset, end);
          end += 2 * kPageTokens;
        }
    }
    EXPECT_EQ(layer.block_bytes, block);
    for (std::size_t i = 0; i < layer.tables.size(); ++i)
      for (std::size_t j = 0; j < i; ++j) EXPECT_NE(layer.tables[i], layer.tables[j]);
  }
}

TEST_P(PagedPlans, HaveTransformsThatMakeTheirCodecs) {
  const PlanBundle bundle = GetParam().make();
  const KvShape shape{10, bundle.plan.model.kv_heads, bundle.plan.model.head_dim};
  const std::vector<float> x = gaussian(shape);
  for (const Side side : kSides)
    EXPECT_EQ(encoded(*make_transform_codec(transform_spec(bundle, 1, side)), shape, x),
              encoded(*make_codec(bundle, 1, side), shape, x));
}

INSTANTIATE_TEST_SUITE_P(All, PagedPlans, ::testing::ValuesIn(paged_plans()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(PageLayout, OfWidthsWithHalfTiles) {
  // Keys: 6 6 6 | 3 3 | 2 of groups of 8, i.e. 24, 16 and 8 coordinates.
  const PlanBundle bundle =
      calibrated_plan(64, 8, {{6, 6, 6, 3, 3, 2, 0, 0}}, {{2, 2, 2, 0, 0, 0, 0, 0}});
  const LayerFormat layer = page_format(bundle)[0];
  const SideLayout& k = layer.heads[0].k;
  ASSERT_EQ(k.run_count, 4);
  const auto expect_run = [](const TileRun& run, TileCode code, int width, int half, int coordinate,
                             std::uint32_t offset) {
    EXPECT_EQ(run.code, code);
    EXPECT_EQ(run.width, width);
    EXPECT_EQ(run.half, half);
    EXPECT_EQ(run.tiles, 1);
    EXPECT_EQ(run.coordinate, coordinate);
    EXPECT_EQ(run.offset, offset);
  };
  expect_run(k.runs[0], TileCode::kBytes, 6, 0, 0, 0);
  expect_run(k.runs[1], TileCode::kBytes, 6, 1, 16, 768);
  expect_run(k.runs[2], TileCode::kBytes, 3, 0, 24, 768 + 384);
  expect_run(k.runs[3], TileCode::kBytes, 2, 1, 40, 768 + 384 + 384);
  EXPECT_EQ(k.runs[0].table, k.runs[1].table);
  EXPECT_EQ(k.coded, 48);
  EXPECT_EQ(k.norm_bytes, 1);
  const SideLayout& v = layer.heads[0].v;
  ASSERT_EQ(v.run_count, 2);
  expect_run(v.runs[0], TileCode::kBytes, 2, 0, 0, 1664);
  expect_run(v.runs[1], TileCode::kBytes, 2, 1, 16, 1664 + 256);
  EXPECT_NEAR(v.runs[0].step, 2 * .49785 / 32, 1e-5);
  EXPECT_EQ(v.runs[0].byte_offset, -48);
  EXPECT_EQ(v.runs[1].step, v.runs[0].step);
  EXPECT_EQ(v.runs[0].table, k.runs[3].table);
  EXPECT_EQ(k.norm_offset, 2048u);
  EXPECT_EQ(v.norm_offset, 2112u);
  EXPECT_EQ(layer.heads[0].page_bytes, 2176u);
  EXPECT_EQ(layer.tables.size(), 3u);
}

TEST(PageLayout, TakesOnlyEquidistantLevelsOfTwoBitsAsBytes) {
  const auto code_of = [](std::vector<float> levels) {
    PlanBundle bundle = calibrated_plan(16, 16, {{2}}, {{2}});
    bundle.tensors.levels[2] = std::move(levels);
    return page_format(bundle)[0].heads[0].k.runs[0].code;
  };
  EXPECT_EQ(code_of({-3, -1, 1, 3}), TileCode::kBytes);
  EXPECT_EQ(code_of(codebook("lloyd_max", 2).levels), TileCode::kTable);
  EXPECT_EQ(code_of({-3, -1.0001f, 1, 3}), TileCode::kTable);
  EXPECT_EQ(code_of({-2, 0, 2, 4}), TileCode::kTable);  // not about 0
}

// The example of docs/formats/packing.md.
TEST(Pages, HoldTheDocumentedExample) {
  const PlanBundle bundle =
      calibrated_plan(64, 8, {{6, 6, 6, 3, 3, 2, 0, 0}}, {{2, 2, 2, 0, 0, 0, 0, 0}});
  const HeadLayout head = page_format(bundle)[0].heads[0];
  // Token 25 alone: norm 0x81, code 5 (101) at coordinate 35, which is coordinate 11 of the tile of
  // width 3 and follows 24 codes of 6 and 11 of 3 bits.
  const std::size_t stride = linear_bytes(head.k);
  ASSERT_EQ(stride, 1u + 18 + 6 + 2);
  std::vector<std::byte> linear(kPageTokens * stride);
  std::byte* const token = linear.data() + 25 * stride;
  token[0] = std::byte{0x81};
  BitWriter writer({token + 1, stride - 1});
  for (int i = 0; i < 24; ++i) writer.put(0, 6);
  for (int i = 0; i < 11; ++i) writer.put(0, 3);
  writer.put(5, 3);
  std::vector<std::byte> page(head.page_bytes);
  to_page(head.k, Side::kKey, linear, stride, page);
  // Lane 4 * (25 % 8) + (11 % 8) / 2 = 5, pair 4 * 1 + 1 + 2 = 7, half 1: byte 2 * 1 + 1 of
  // register 2 * 1 + 1, i.e. nibble 3 of the high selector of word 1: bits 28..30, byte 1152 + 5 *
  // 8 + 4 + 3.
  std::vector<std::byte> expected(head.page_bytes);
  expected[1152 + 5 * 8 + 4 + 3] = std::byte{0x50};
  // Codes 0 of 6 bits are stored as sign 0 and magnitude 31: ones in the nibbles (words 0..3) and
  // in the plane of the fifth bits (word 4), zeros in that of the signs (word 5).
  const auto ones = [&](std::size_t begin, std::size_t bytes) {
    std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(begin), bytes, std::byte{0xff});
  };
  ones(0, 512);
  for (std::size_t lane = 0; lane < 32; ++lane) ones(512 + 8 * lane, 4);
  ones(768, 5 * 64);
  expected[2048 + (25 % 8) * 8 + 25 / 8] = std::byte{0x81};
  EXPECT_EQ(page, expected);
}

TEST(Pages, StoreOutlierCodesWithAnOffset) {
  std::vector<int> channels;
  for (int i = 0; i < 8; ++i) channels.push_back(i);
  const PlanBundle bundle = rotated_plan("turboquant:3", 64, channels);
  const HeadLayout head = page_format(bundle)[0].heads[1];
  ASSERT_EQ(head.k.outlier_runs, 1);
  const std::size_t stride = linear_bytes(head.k);
  std::vector<std::byte> linear(kPageTokens * stride);
  linear[2] = std::byte{0x34};  // scale of token 0
  linear[3] = std::byte{0x12};
  linear[4] = std::byte{0x81};  // -127 of the first channel
  std::vector<std::byte> page(head.page_bytes);
  to_page(head.k, Side::kKey, linear, stride, page);
  const TileRun& run = head.k.runs[head.k.run_count];
  EXPECT_EQ(run.half, 1);
  EXPECT_EQ(page[run.offset], std::byte{1});
  EXPECT_EQ(page[run.offset + 1], std::byte{128});
  EXPECT_EQ(page[head.k.scale_offset], std::byte{0x34});
  EXPECT_EQ(page[head.k.scale_offset + 1], std::byte{0x12});
}

TEST(Pages, RefuseBuffersThatAreTooSmall) {
  const PlanBundle bundle = calibrated_plan(64, 16, {{4, 3, 2, 0}}, {{2, 2, 2, 2}});
  const HeadLayout head = page_format(bundle)[0].heads[0];
  const std::size_t bytes = linear_bytes(head.k);
  std::vector<std::byte> linear(kPageTokens * bytes), page(head.page_bytes);
  const auto both = [&](std::size_t linear_size, std::size_t stride, std::size_t page_size) {
    const auto l = std::span(linear).first(linear_size);
    const auto p = std::span(page).first(page_size);
    EXPECT_THROW(to_page(head.k, Side::kKey, l, stride, p), ArgumentError);
    EXPECT_THROW(from_page(head.k, Side::kKey, p, stride, l), ArgumentError);
  };
  both(linear.size() - 1, bytes, page.size());
  both(linear.size(), bytes - 1, page.size());
  both(linear.size(), bytes + 1, page.size());
  both(0, bytes, page.size());
  both(linear.size(), bytes, head.k.norm_offset + 63);
  both(linear.size(), bytes, 0);
  EXPECT_NO_THROW(to_page(head.k, Side::kKey, linear, bytes, page));
}

PlanBundle with_one_bit_levels(float low, float high) {
  PlanBundle bundle = calibrated_plan(16, 16, {{1}}, {{2}});
  bundle.tensors.levels[1] = {low, high};
  return bundle;
}

TEST(PageLayout, TakesOneBitLevelsThatDifferByRounding) {
  const float x = codebook("lloyd_max", 1).levels[1];
  EXPECT_NO_THROW(page_format(with_one_bit_levels(-x, std::nextafter(x, 1.f))));
  EXPECT_NO_THROW(page_format(with_one_bit_levels(-1e-30f, 1e-30f)));
}

struct Refusal {
  const char* name;
  std::function<PlanBundle()> make;
  const char* field;
};

class RefusedPlans : public ::testing::TestWithParam<Refusal> {};

TEST_P(RefusedPlans, NameTheField) {
  const PlanBundle bundle = GetParam().make();
  try {
    page_format(bundle);
    FAIL() << "expected an InputError";
  } catch (const InputError& error) {
    EXPECT_EQ(error.field(), GetParam().field) << error.what();
  }
}

PlanBundle changed(PlanBundle bundle, const std::function<void(Plan&)>& change) {
  change(bundle.plan);
  return bundle;
}

PlanBundle small_calibrated() { return calibrated_plan(64, 16, {{4, 3, 2, 0}}, {{2, 2, 2, 2}}); }

INSTANTIATE_TEST_SUITE_P(
    All, RefusedPlans,
    ::testing::Values(
        Refusal{"TrellisOfRotatedPlan",
                [] {
                  return changed(rotated_plan("turboquant:3", 64), [](Plan& p) { p.code = "tcq"; });
                },
                "/code"},
        Refusal{"PageTokens",
                [] { return changed(small_calibrated(), [](Plan& p) { p.page_tokens = 32; }); },
                "/page_tokens"},
        Refusal{"WidthOfFourCoordinates",
                [] { return calibrated_plan(16, 4, {{3, 3, 3, 2}}, {{2, 2, 2, 2}}); },
                "/layers/0/k/heads/0/widths"},
        Refusal{"Fp16OfTwelveChannels", [] { return baseline("fp16", paged_model(1, 12)); },
                "/layers/0/k/heads/0/widths"},
        Refusal{"TwelveOutliers",
                [] {
                  return rotated_plan("turboquant:3", 64, {},
                                      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
                },
                "/layers/0/v/heads/0/widths"},
        Refusal{"OneBitLevelsOfTwoSizes", [] { return with_one_bit_levels(-.8f, .80001f); },
                "levels.1"},
        Refusal{"OneBitLevelsOfOneSign", [] { return with_one_bit_levels(-.8f, -.2f); },
                "levels.1"},
        Refusal{"Polar", [] { return baseline("polar:3"); }, "/code"},
        Refusal{"Sketch", [] { return baseline("turboquant:3+prod"); }, "/variant/sketch"},
        Refusal{"NormBlock", [] { return baseline("turboquant:3+block=32"); },
                "/variant/norm_block"},
        Refusal{"NormWithDeviation", [] { return baseline("turboquant:3+std"); }, "/norm"},
        Refusal{"OutlierBits",
                [] {
                  return changed(rotated_plan("turboquant:3", 64, {0, 1, 2, 3, 4, 5, 6, 7}),
                                 [](Plan& p) { p.variant.outlier_bits = 4; });
                },
                "/variant/outlier_bits"},
        Refusal{"RotatedOutliers",
                [] {
                  return changed(rotated_plan("turboquant:3", 64, {0, 1, 2, 3, 4, 5, 6, 7}),
                                 [](Plan& p) { p.variant.outlier_code = "rotated"; });
                },
                "/variant/outlier_code"},
        Refusal{"Kivi", [] { return baseline("kivi:2"); }, "/codec"},
        Refusal{"Integers", [] { return baseline("int:4"); }, "/codec"},
        Refusal{"BlockFormat", [] { return baseline("q4_0"); }, "/codec"},
        Refusal{"SmallFloats", [] { return baseline("fp8_e4m3"); }, "/codec"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace kvplan::quant
