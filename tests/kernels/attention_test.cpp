// The attention kernel on grids of every size against attention in double, and the pure parts that
// it shares its work by.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "kernels/cache.h"
#include "kernels/round.h"
#include "kernels/tile_plan.h"
#include "schemas/error.h"
#include "tests/kernels/attention_step.h"

namespace kvplan::kernels {
namespace {

using namespace kvplan::kernels::testing;
using quant::testing::calibrated_plan;
using quant::testing::PagedPlan;

PlanBundle with_sinks(PlanBundle bundle, int sink_tokens) {
  bundle.plan.sink_tokens = sink_tokens;
  return bundle;
}

// Weights of fp16 tokens and of tiles that are no bytes are rounded to fp16, each by up to 2^-11 of
// it; weights of bytes are integers of 16 bits. Where few tokens have most of the weight, errors
// hardly cancel. Errors of scores come on top where scores are scaled up.
constexpr double kOutputTolerance = 4e-4;
// Queries are integers of 16 bits; or fp16 against levels in fp16, and keys are centred by rotary
// tiles in fp16.
constexpr double kByteTolerance = 2e-5, kHalfTolerance = 2e-4;

constexpr int kGrids[] = {1, 2, 3, 7, 40, 132, 256};

void expect_right(AttentionOnLayer& attention, const AttentionResult& result) {
  const quant::LayerFormat& format = attention.layer().format;
  const bool bytes = layer_codes(format) == LayerCodes::kBytes && !format.k.mean;
  const AttentionError error = attention.error_of(result);
  const double sharp = attention.scale() * std::sqrt(attention.layer().view.head_dim);
  EXPECT_LE(error.out, kOutputTolerance * std::max(1.0, sharp));
  EXPECT_LE(error.score, bytes ? kByteTolerance : kHalfTolerance);
}

/// Pages, some tokens alone, a page that is exactly full, many pages, and a step over a boundary.
AttentionStep ragged(int queries_per_kv) {
  return {"Ragged", queries_per_kv, {0, 3, 67, 330, 131}, {1, 5, 68, 331, 133}};
}

class AttentionPlans : public OnDevice {};

TEST_P(AttentionPlans, AttendsToEveryKindOfPage) {
  for (const auto& [queries_per_kv, blocks, warps] : {std::tuple{1, 9, 2}, {5, 2, 0}}) {
    SCOPED_TRACE(std::to_string(queries_per_kv) + " queries");
    AttentionOnLayer attention(GetParam().make(), ragged(queries_per_kv));
    expect_right(attention, attention.attend(blocks, warps));
  }
}

PlanBundle without_codes(const std::vector<int>& keys, const std::vector<int>& values) {
  return calibrated_plan(64, 16, {keys, {0, 0, 0, 0}}, {values, {0, 0, 0, 0}});
}

std::vector<PagedPlan> plans() {
  std::vector<PagedPlan> plans = quant::testing::paged_plans();
  plans.push_back({"NoCodesAtAll", [] { return without_codes({0, 0, 0, 0}, {0, 0, 0, 0}); }});
  plans.push_back({"NoValues", [] { return without_codes({4, 3, 2, 2}, {0, 0, 0, 0}); }});
  plans.push_back(
      {"Fp16BesideNothing", [] { return without_codes({16, 16, 16, 16}, {0, 0, 0, 0}); }});
  return plans;
}

INSTANTIATE_TEST_SUITE_P(Plans, AttentionPlans, ::testing::ValuesIn(plans()),
                         [](const auto& row) { return std::string(row.param.name); });

/// Every path of the decode kernel; bytes of at most four columns in a shape for eight:
/// ServesFewerColumnsThanTheCacheIsFor.
struct Path {
  const char* name;
  std::function<PlanBundle()> make;
  int queries_per_kv;
  // Which one it is (DecodeShape).
  bool uniform, mixed;
};

std::vector<Path> paths() {
  const std::vector<PagedPlan> all = quant::testing::paged_plans();
  const auto plan = [&](const std::string& name) {
    return std::ranges::find(all, name, &PagedPlan::name)->make;
  };
  return {{"Uniform", plan("Rotated2Uniform"), 4, true, false},
          {"UniformEightColumns", plan("Rotated2Uniform"), 7, true, false},
          {"Mixed", plan("Groups8Bytes"), 2, false, true},
          {"BytesEightColumns", plan("Groups8Bytes"), 8, false, false},
          {"AnyTiles", plan("Groups16"), 3, false, false},
          {"AnyTilesEightColumns", plan("Groups16"), 9, false, false}};
}

class AttentionPaths : public ::testing::TestWithParam<Path> {
 protected:
  void SetUp() override {
    kvplan_device_info info;
    if (kvplan_query_device(0, &info) != KVPLAN_OK) GTEST_SKIP() << kvplan_last_error();
  }
};

// Segments of one block, shared by many, blocks without work; whoever finishes a segment takes its
// parts in the same order.
TEST_P(AttentionPaths, GivesTheSameOnEveryGridAndEqualBytesTwice) {
  const Path& path = GetParam();
  AttentionOnLayer attention(path.make(),
                             {"Shared", path.queries_per_kv, {400, 0, 70}, {401, 1, 71}});
  const DecodeShape shape = attention.shape(1);
  EXPECT_EQ(shape.uniform >= 0, path.uniform);
  EXPECT_EQ(shape.mixed, path.mixed);
  for (const int blocks : kGrids) {
    SCOPED_TRACE(blocks);
    // Large grids with one warp, which cost the emulation less.
    const int warps = blocks > 3 ? 1 : 0;
    const AttentionResult first = attention.attend(blocks, warps);
    expect_right(attention, first);
    if (blocks != 40) continue;
    EXPECT_EQ(first, attention.attend(blocks, warps));
  }
}

// More segments than a round takes.
TEST_P(AttentionPaths, TakesManyShortSequencesInRounds) {
  AttentionStep step{"Many", GetParam().queries_per_kv, {}, {}};
  for (int i = 0; i < 20; ++i) {
    step.before.push_back(37 * i % 200);
    step.after.push_back(step.before.back() + 1);
  }
  AttentionOnLayer attention(GetParam().make(), step);
  const int segments = 20 * attention.layer().view.kv_heads;
  ASSERT_GT(segments, 2 * attention.shape(2).shared.most_pieces);
  for (const auto& [blocks, warps] : {std::pair{1, 0}, {7, 1}}) {
    SCOPED_TRACE(blocks);
    expect_right(attention, attention.attend(blocks, warps));
  }
}

// One warp of a block leaves parts of several pieces aside.
TEST_P(AttentionPaths, TakesAnyNumberOfWarps) {
  AttentionOnLayer attention(GetParam().make(), ragged(GetParam().queries_per_kv));
  for (const auto& [blocks, warps] : {std::pair{1, 1}, {1, 2}, {3, 1}, {3, 5}}) {
    SCOPED_TRACE(std::to_string(warps) + " warps, " + std::to_string(blocks) + " blocks");
    expect_right(attention, attention.attend(blocks, warps));
  }
}

// A shape for eight columns serves a step of fewer, as a cache for several query tokens does.
TEST_P(AttentionPaths, ServesFewerColumnsThanTheCacheIsFor) {
  AttentionStep step = ragged(GetParam().queries_per_kv);
  step.max_query_tokens = 4;
  AttentionOnLayer attention(GetParam().make(), step);
  expect_right(attention, attention.attend(3));
}

INSTANTIATE_TEST_SUITE_P(Paths, AttentionPaths, ::testing::ValuesIn(paths()),
                         [](const auto& row) { return std::string(row.param.name); });

class Attention : public ::testing::Test {
 protected:
  void SetUp() override {
    kvplan_device_info info;
    if (kvplan_query_device(0, &info) != KVPLAN_OK) GTEST_SKIP() << kvplan_last_error();
  }
};

/// Layers of one width of keys and one of values, of their own kernels.
PlanBundle uniform_plan(const UniformWidths& widths) {
  PlanBundle bundle = calibrated_plan(quant::kTileCoordinates * widths.tiles, 16,
                                      {std::vector<int>(size(widths.tiles), widths.keys)},
                                      {std::vector<int>(size(widths.tiles), widths.values)});
  bundle.plan.norm = "fp16";
  bundle.plan.centre = false;
  return bundle;
}

PlanBundle mixed_plan() { return calibrated_plan(64, 16, {{4, 3, 2, 2}}, {{3, 3, 2, 0}}); }

TEST_F(Attention, ServesGroupsOfUpToEightColumnBlocks) {
  for (const auto& [queries_per_kv, tokens] : std::vector<std::pair<int, int>>{{1, 1},
                                                                               {1, 4},
                                                                               {3, 1},
                                                                               {4, 1},
                                                                               {2, 3},
                                                                               {5, 2},
                                                                               {7, 4},
                                                                               {9, 1},
                                                                               {16, 1},
                                                                               {16, 2},
                                                                               {16, 4}}) {
    SCOPED_TRACE(std::to_string(queries_per_kv) + " queries, " + std::to_string(tokens));
    AttentionOnLayer attention(mixed_plan(),
                               {"Group", queries_per_kv, {300, 62, 0}, {300 + tokens, 63, tokens}});
    expect_right(attention, attention.attend(3, 4));
  }
}

// A warp takes many pages: loops are unrolled.
TEST_F(Attention, UniformLayersTakeManyPagesInAStretch) {
  for (const UniformWidths& widths : {UniformWidths{3, 3, 8}, {4, 4, 4}})
    for (const auto& [queries_per_kv, tokens] : {std::pair{4, 1}, {5, 1}, {4, 2}}) {
      SCOPED_TRACE("keys " + std::to_string(widths.keys) + ", " + std::to_string(queries_per_kv) +
                   " queries");
      AttentionOnLayer attention(uniform_plan(widths),
                                 {"Long", queries_per_kv, {600}, {600 + tokens}});
      ASSERT_GE(attention.shape(1).uniform, 0);
      // The third: scores that outgrow the running maximum.
      for (const quant::AttentionOptions& option :
           {quant::AttentionOptions{}, {0, 3, 0}, {0.3F, 0, 0}, {0, 0, 550}}) {
        attention.set_options(option);
        expect_right(attention, attention.attend(1, 1));
      }
    }
}

TEST_F(Attention, UniformLayersOfEveryWidthServeEightColumns) {
  for (const UniformWidths& widths : kUniformWidths) {
    SCOPED_TRACE("keys " + std::to_string(widths.keys) + " values " +
                 std::to_string(widths.values) + " tiles " + std::to_string(widths.tiles));
    AttentionOnLayer attention(uniform_plan(widths), {"Eight", 8, {140}, {141}});
    ASSERT_GE(attention.shape(1).uniform, 0);
    expect_right(attention, attention.attend(1, 2));
  }
}

TEST_F(Attention, UniformLayersServeEveryNumberOfColumns) {
  const UniformWidths widths{3, 3, 4};
  for (const auto& [queries_per_kv, tokens] : std::vector<std::pair<int, int>>{
           {3, 1}, {5, 1}, {6, 1}, {7, 1}, {8, 1}, {9, 1}, {2, 3}, {4, 2}, {5, 3}, {16, 1}}) {
    SCOPED_TRACE(std::to_string(queries_per_kv) + " queries, " + std::to_string(tokens));
    AttentionOnLayer attention(uniform_plan(widths),
                               {"Group", queries_per_kv, {300, 62, 0}, {300 + tokens, 63, tokens}});
    ASSERT_GE(attention.shape(3).uniform, 0);
    for (const int window : {0, 70}) {
      attention.set_options({0, 0, window});
      expect_right(attention, attention.attend(3, 4));
    }
  }
}

TEST_F(Attention, MasksByWindowsAndCapsScores) {
  const std::vector<quant::AttentionOptions> options{
      {0, 0, 1},  // only itself
      {0, 0, 5},  // whole chunks of the open page are masked
      {0, 0, 63},     {0, 0, 64},     {0, 0, 65}, {0, 0, 200},  // pages left out
      {0, 0, 100000},                                           // nothing left out
      {0.3F, 0, 0},  // scores that outgrow the running maximum
      {0, 2, 0},      {0.2F, 20, 130}};
  for (const Path& path : paths()) {
    AttentionOnLayer attention(
        path.make(), {"Masks", path.queries_per_kv, {260, 3, 131, 67}, {261, 4, 132, 68}});
    for (const quant::AttentionOptions& option : options) {
      SCOPED_TRACE(std::string(path.name) + " window " + std::to_string(option.window) + " scale " +
                   std::to_string(option.scale) + " cap " + std::to_string(option.soft_cap));
      attention.set_options(option);
      expect_right(attention, attention.attend(2, 3));
    }
  }
  for (const int window : {1, 3, 70}) {
    SCOPED_TRACE(window);
    AttentionOnLayer attention(mixed_plan(),
                               {"Tokens", 3, {300, 62, 129}, {304, 66, 132}, {0, 0, window}});
    expect_right(attention, attention.attend(3));
  }
}

TEST_F(Attention, ReadsAnyNumberOfSinksAndLengthsAroundPages) {
  for (const int sinks : {0, 4, 20}) {
    SCOPED_TRACE(sinks);
    AttentionStep step{"Lengths", 2, {}, {}};
    for (const int length : {1, 2, 4, 5, 20, 63, 64, 65, 67, 68, 69, 83, 84, 85, 128, 132, 148}) {
      step.before.push_back(length - 1);
      step.after.push_back(length);
    }
    AttentionOnLayer attention(with_sinks(mixed_plan(), sinks), step);
    for (const auto& [blocks, warps] : {std::pair{1, 0}, {5, 3}, {33, 1}}) {
      SCOPED_TRACE(blocks);
      expect_right(attention, attention.attend(blocks, warps));
    }
    for (const int window : {2, 64}) {
      SCOPED_TRACE(window);
      attention.set_options({0, 0, window});
      expect_right(attention, attention.attend(4, 3));
    }
  }
}

/// Heads by turns of fp16, of 3 and 5 bits and without codes.
PlanBundle many_heads(int kv_heads) {
  quant::testing::HeadWidths keys, values;
  for (int h = 0; h < kv_heads; ++h) {
    keys.push_back({h % 3 == 0 ? 16 : h % 3 == 1 ? 3 : 0});
    values.push_back({h % 5 == 0 ? 16 : h % 5 == 1 ? 0 : 5});
  }
  return calibrated_plan(16, 16, keys, values);
}

TEST_F(Attention, Serves128KvHeads) {
  AttentionOnLayer attention(many_heads(kMaxKvHeads), {"Heads", 1, {133, 2}, {134, 3}});
  for (const int blocks : {3, 40}) {
    SCOPED_TRACE(blocks);
    expect_right(attention, attention.attend(blocks, 2));
  }
}

TEST_F(Attention, RefusesPlansOfMoreKvHeads) {
  quant::CacheGeometry geometry;
  geometry.query_heads = kMaxKvHeads + 1;
  geometry.max_sequences = 1;
  geometry.max_tokens = 100;
  try {
    plan_cache(many_heads(kMaxKvHeads + 1), geometry, 132);
    FAIL() << "129 KV heads were taken";
  } catch (const InputError& e) {
    EXPECT_EQ(e.field(), "/model/kv_heads");
    EXPECT_THAT(e.what(), ::testing::HasSubstr("at most 128 KV heads, found 129"));
  }
}

TEST_F(Attention, RefusesStepsWhoseWorkOutgrows32Bits) {
  StepChange step;
  step.max_tokens = 4;
  const auto fits = [&](int sink_tokens, int kv_heads, int queries_per_kv, int query_tokens) {
    try {
      require_line(step, sink_tokens, kv_heads, queries_per_kv, query_tokens);
      return true;
    } catch (const ArgumentError&) {
      return false;
    }
  };
  // 2^25 units in all; a sequence without sinks has 4 chunks beside its pages, and its beginning.
  step.entries = {{.length = 64 * ((1 << 22) - 4 - kStartUnits)}};
  EXPECT_TRUE(fits(0, 8, 8, 1));
  EXPECT_FALSE(fits(0, 8, 9, 1));
  EXPECT_FALSE(fits(0, 9, 8, 1));
  EXPECT_FALSE(fits(0, 8, 8, 2));
  EXPECT_FALSE(fits(2, 8, 8, 1));  // a chunk more
  step.entries.push_back({.length = 1});
  EXPECT_FALSE(fits(0, 8, 8, 1));
  EXPECT_TRUE(fits(0, 4, 8, 1));
  // Attention to a step of more tokens than the cache is for is refused by itself.
  step.max_tokens = 1000;
  EXPECT_TRUE(fits(0, 4, 8, 1));
  // The largest caches that there may be together.
  step.entries.assign(65536, {.length = 1 << 30});
  EXPECT_FALSE(fits(0, 1, 1, 1));
}

// The pure parts.

TEST(Cut, CoversALineAndKnowsWhoHoldsAPosition) {
  for (const std::uint32_t length : {0u, 1u, 2u, 5u, 12u, 13u, 255u, 256u, 257u, 1000u, 4099u})
    for (const std::uint32_t stretches : {1u, 2u, 3u, 7u, 12u, 132u, 256u}) {
      SCOPED_TRACE(std::to_string(length) + " in " + std::to_string(stretches));
      const Cut cut(length, stretches);
      EXPECT_EQ(cut.begin(0), 0u);
      EXPECT_EQ(cut.begin(stretches), length);
      std::uint32_t shortest = length, longest = 0;
      for (std::uint32_t s = 0; s < stretches; ++s) {
        const std::uint32_t begin = cut.begin(s), end = cut.begin(s + 1);
        ASSERT_LE(begin, end);
        shortest = std::min(shortest, end - begin), longest = std::max(longest, end - begin);
        for (std::uint32_t position = begin; position < end; ++position)
          ASSERT_EQ(cut.holder(position), s) << position;
      }
      EXPECT_LE(longest - shortest, 1u);
    }
}

TEST(Cut, ReachesTheEndOfTheLongestLine) {
  constexpr std::uint32_t kLongest = 1u << 31;
  for (const std::uint32_t stretches : {1u, 132u, 255u, 256u}) {
    const Cut cut(kLongest, stretches);
    EXPECT_EQ(cut.begin(stretches), kLongest);
    EXPECT_EQ(cut.holder(kLongest - 1), stretches - 1);
    for (std::uint32_t s = 0; s < stretches; ++s) {
      ASSERT_EQ(cut.holder(cut.begin(s)), s);
      ASSERT_EQ(cut.holder(cut.begin(s + 1) - 1), s);
    }
  }
}

TEST(WorkCosts, AreAtMost64AndFollowTheWork) {
  for (const PagedPlan& plan : plans()) {
    SCOPED_TRACE(plan.name);
    for (const quant::LayerFormat& format : quant::page_format(plan.make())) {
      const WorkCosts costs = work_costs(format, quant::phase_steps(format));
      std::uint32_t most = costs.chunk;
      EXPECT_GE(costs.chunk, 1u);
      for (int h = 0; h < static_cast<int>(format.heads.size()); ++h) {
        EXPECT_GE(costs.head(h), 1u);
        most = std::max(most, costs.head(h));
      }
      EXPECT_EQ(most, kMostCost);
    }
  }
  const std::vector<std::vector<int>> widths{{0, 0, 0, 0}, {2, 2, 2, 2}, {6, 6, 6, 6}};
  const WorkCosts costs =
      work_costs(quant::page_format(calibrated_plan(64, 16, widths, widths))[0], 0);
  EXPECT_LT(costs.head(0), costs.head(1));
  EXPECT_LT(costs.head(1), costs.head(2));
}

/// The parts of the shared memory of a block, by address.
struct SharedPart {
  std::string name;
  std::int64_t begin, bytes;
};

std::vector<SharedPart> shared_parts(const DecodeShape& shape, int phase_steps) {
  const SharedMap& map = shape.shared;
  const int rows = shape.mixed ? kHalfPageRows : 4;
  const std::int64_t rotary = std::int64_t{phase_steps} * rows * 32 * 16;
  std::vector<SharedPart> parts{
      {"round", map.round, sizeof(Round)},
      {"pieces", map.pieces, std::int64_t{map.most_pieces} * map.piece_bytes},
      {"warps", map.warps, std::int64_t{shape.block_warps} * map.warp_bytes},
      {"outputs", map.outputs, std::int64_t{shape.block_warps} * map.output_bytes},
      {"feeds", map.feeds, std::int64_t{shape.block_warps} * map.feed_bytes}};
  for (int t = 0; t < map.tables; ++t)
    if (map.table_address[t] != 0)
      parts.push_back({"table", map.table_address[t],
                       map.of_trellis[t] ? 4 * trellis_entries(map.table_width[t])
                                         : table_bytes(map.table_width[t])});
  if (map.rotary_tile != 0) parts.push_back({"rotary tile", map.rotary_tile, rotary});
  if (map.rotary_tile_low != 0) parts.push_back({"low tile", map.rotary_tile_low, rotary});
  return parts;
}

void expect_room(const quant::LayerFormat& format, int head_dim) {
  constexpr std::int64_t kEnd = kSharedBase + 227 * 1024;
  const int steps = quant::phase_steps(format);
  for (const bool split : {false, true})
    for (int columns = 1; columns <= kColumns; ++columns) {
      SCOPED_TRACE(std::to_string(columns) + " columns");
      const DecodeShape shape = decode_shape(format, head_dim, steps, split, columns, 132);
      const SharedMap& map = shape.shared;
      EXPECT_GE(shape.block_warps, 1);
      EXPECT_LE(shape.block_warps, shape.uniform >= 0 ? uniform_warps(columns)
                                   : shape.mixed      ? kMixedWarps
                                                      : kDecodeWarps);
      EXPECT_GE(map.most_pieces, 1);
      EXPECT_LE(map.most_pieces, kMaxPieces);
      std::vector<SharedPart> parts = shared_parts(shape, steps);
      std::ranges::sort(parts, {}, &SharedPart::begin);
      std::int64_t end = kSharedBase;
      for (const SharedPart& part : parts) {
        EXPECT_GE(part.begin, end) << part.name << " overlaps what is before it";
        EXPECT_EQ(part.begin % 128, 0) << part.name;
        end = part.begin + part.bytes;
      }
      EXPECT_LE(end, kEnd);
      EXPECT_LE(end, static_cast<std::int64_t>(kSharedBase + shape.shared_bytes));

      // Parts of parts, one after the other.
      const int kept = columns <= kColumns / 2 ? kColumns / 2 : kColumns;
      const auto in_order = [](const std::vector<std::pair<std::int64_t, std::int64_t>>& ranges,
                               std::int64_t bytes) {
        std::int64_t at = 0;
        for (const auto& [begin, length] : ranges) {
          EXPECT_GE(begin, at);
          at = begin + length;
        }
        EXPECT_LE(at, bytes);
      };
      std::int64_t key_tiles = 0, value_tiles = 0;
      for (const quant::HeadLayout& head : format.heads) {
        key_tiles = std::max<std::int64_t>(key_tiles, head.k.tiles);
        value_tiles = std::max<std::int64_t>(value_tiles, head.v.tiles);
      }
      in_order({{map.query_offset, key_tiles * 32 * 8},
                {map.terms_offset, kColumns * sizeof(ColumnTerms)},
                {map.runs_offset, quant::most_runs(format) * sizeof(RunEntry)},
                {map.centre_offset, std::int64_t{8} * steps * kept * 8}},
               map.piece_bytes);
      in_order({{map.state_offset, sizeof(WarpState)},
                {map.list_offset, kPageListBytes},
                {map.barriers_offset, kMostSlots * 8}},
               map.warp_bytes);
      EXPECT_LE(std::max<std::int64_t>(value_tiles, plain_tiles(head_dim)) * 32 * kept / 2 * 4,
                map.output_bytes);
      const ResultMemory results(head_dim, kept, map.most_pieces, has_direct(layer_codes(format)));
      EXPECT_LE(results.bytes, shape.block_warps * map.feed_bytes);
      in_order({{results.merged, 4 * map.most_pieces * kept * results.stride},
                {results.plain, 4 * map.most_pieces * kept * results.stride},
                {results.direct,
                 has_direct(layer_codes(format)) ? 4 * map.most_pieces * kept * results.stride : 0},
                {results.states, map.most_pieces * kColumns * 8},
                {results.terms, map.most_pieces * kColumns * sizeof(ResultColumn)},
                {results.slots, map.most_pieces * kMaxBlocks * 2},
                {results.counts, map.most_pieces * 4}},
               results.bytes);
      const std::int64_t products = 4 * map.most_pieces * kept * results.stride;
      in_order({{0, products},
                {map.measures - map.outputs, 8 * map.most_pieces * kept * (results.stride / 16)}},
               shape.block_warps * map.output_bytes);
      const std::int64_t slots = map.ring_bytes > 0   ? map.ring_bytes / map.slot_bytes
                                 : map.feed_slots > 0 ? map.feed_slots
                                                      : 2;
      EXPECT_GE(slots, map.ring_bytes > 0 ? 1 : 2);
      EXPECT_LE(slots * map.slot_bytes, map.feed_bytes);
    }
}

TEST(DecodeShape, PutsEveryPartIntoSharedMemoryWithoutOverlap) {
  std::vector<PagedPlan> all = plans();
  for (const UniformWidths& widths : kUniformWidths)
    all.push_back({"Uniform", [&] { return uniform_plan(widths); }});
  for (const int head_dim : {8, 24, 72, 136, 200, 248, 256})
    for (const int width : {0, 8})
      all.push_back({"Dims", [=] {
                       return calibrated_plan(head_dim, 8,
                                              {std::vector<int>(size(head_dim / 8), width)},
                                              {std::vector<int>(size(head_dim / 8), 8)});
                     }});
  all.push_back({"Fp16Dim256", [] {
                   return quant::testing::baseline("fp16", quant::testing::paged_model(2, 256));
                 }});
  all.push_back({"TablesDim256", [] {
                   return quant::testing::with_exact_levels(calibrated_plan(
                       256, 8, {std::vector<int>(32, 7)}, {std::vector<int>(32, 8)}));
                 }});
  for (const PagedPlan& plan : all) {
    const PlanBundle bundle = plan.make();
    SCOPED_TRACE(std::string(plan.name) + " " + std::to_string(bundle.plan.model.head_dim));
    for (const quant::LayerFormat& format : quant::page_format(bundle))
      expect_room(format, bundle.plan.model.head_dim);
  }
}

}  // namespace
}  // namespace kvplan::kernels
