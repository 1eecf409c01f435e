#include "quant/cache_size.h"

#include <gtest/gtest.h>

#include "schemas/error.h"
#include "tests/quant/page_fixtures.h"

namespace kvplan::quant {
namespace {

using namespace kvplan::quant::testing;

CacheGeometry geometry() {
  CacheGeometry g;
  g.query_heads = 6;
  g.max_sequences = 3;
  g.max_tokens = 200;
  g.max_query_tokens = 4;
  return g;
}

// d = 64, two KV heads, log8, centred, two layers with sides exchanged.
PlanBundle plan() {
  return calibrated_plan(64, 16, {{4, 3, 2, 0}, {2, 2, 2, 2}}, {{3, 3, 3, 3}, {2, 1, 0, 0}});
}

TEST(CacheSize, CountsPagesOfASequenceAfterTheSinks) {
  CacheGeometry g = geometry();
  for (const auto& [tokens, pages] : std::initializer_list<std::pair<std::int64_t, std::int64_t>>{
           {1, 0}, {4, 0}, {67, 0}, {68, 1}, {131, 1}, {132, 2}, {4100, 64}}) {
    g.max_tokens = tokens;
    EXPECT_EQ(pages_per_sequence(g, 4), pages) << tokens;
    EXPECT_EQ(pool_blocks(g, 4), 3 * pages) << tokens;
  }
  g.blocks = 5;
  EXPECT_EQ(pool_blocks(g, 4), 5);
}

TEST(CacheSize, OfALayerByHand) {
  const auto layers = page_format(plan());
  const LayerBuffers b = layer_buffers(layers, 4, geometry())[0];
  // Bytes of a token: K 1 + 18 and 1 + 16, V 1 + 24 and 1 + 6; three sequences of three pages.
  EXPECT_EQ(b.pool, 9u * 64 * (19 + 17 + 25 + 7));
  EXPECT_EQ(b.sinks, 3u * 2 * 2 * 4 * 64 * 2);
  EXPECT_EQ(b.open, 3u * 2 * 2 * 64 * 64 * 2);
  EXPECT_EQ(b.layouts, 2 * sizeof(HeadLayout));
  EXPECT_EQ(b.levels, 4u * 256 * 4);  // widths 1 to 4
  EXPECT_EQ(b.boundaries, 4u * 255 * 4);
  EXPECT_EQ(b.encoders, 4 * kEncoderViewBytes);
  EXPECT_EQ(b.channels, 4u * 64 * 4);
  EXPECT_EQ(b.analysis, (48u + 64 + 64 + 32) * 64 * 4);
  EXPECT_EQ(b.weights, (48u + 64 + 64 + 32) * 8);
  EXPECT_EQ(b.synthesis, 2u * 64 * 64 * 4);
  EXPECT_EQ(b.k_terms, 2u * 64 * 8);
  EXPECT_EQ(b.k_matrix, 2u * 4 * 4 * 2 * 32 * 16);
  EXPECT_EQ(b.v_matrix, b.k_matrix);
  EXPECT_EQ(b.matrix_scales, 2u * 8);
  EXPECT_EQ(b.k_mean, 2u * 64 * 4);
  EXPECT_EQ(b.v_mean, b.k_mean);
  EXPECT_EQ(b.inv_freq, 32u * 8);
  EXPECT_EQ(b.page_phase, 3u * 2 * 32 * 8);
  EXPECT_EQ(b.rotary_tile, 4u * 4 * 32 * 16);
  EXPECT_EQ(b.rotary_tile_low, b.rotary_tile);
}

TEST(CacheSize, OfWhatLayersShareByHand) {
  const auto layers = page_format(plan());
  const SharedBuffers b = shared_buffers(layers, 4, geometry(), {10});
  // Columns of a KV head: 4 query tokens x 3 query heads, two blocks of 8. At most 4 sinks and 63
  // tokens of the open page: 5 chunks. The values of the second layer, of 4 tiles, are the most.
  constexpr std::size_t kSegments = 3 * 2 * 2, kChunks = 5 * kSegments, kParts = 10 * kBlockParts;
  EXPECT_EQ(b.page_table, 3u * 3 * 4);
  EXPECT_EQ(b.batch, 4u * 3 * 4);
  EXPECT_EQ(b.arrived, kSegments * 4);
  EXPECT_EQ(b.part_state, kParts * 8 * 8);
  EXPECT_EQ(b.part_output, kParts * 4 * 32 * 4 * 4);
  EXPECT_EQ(b.plain_state, kChunks * 8 * 8);
  EXPECT_EQ(b.plain_output, kChunks * 8 * 64 * 4);
}

TEST(CacheSize, OfWhatLayersShareWithFewColumns) {
  const auto layers = page_format(plan());
  CacheGeometry g = geometry();
  g.max_query_tokens = 1;  // 3 columns: room for 4
  const SharedBuffers b = shared_buffers(layers, 4, g, {10});
  EXPECT_EQ(b.arrived, 3u * 2 * 4);
  EXPECT_EQ(b.part_state, 10u * kBlockParts * 8 * 8);
  EXPECT_EQ(b.part_output, 10u * kBlockParts * 4 * 32 * 2 * 4);
  EXPECT_EQ(b.plain_output, 3u * 2 * 5 * 4 * 64 * 4);
}

TEST(CacheSize, RoundsBufferByBuffer) {
  const CacheSize size = cache_size(plan(), geometry(), {10});
  EXPECT_EQ(size.pages, 2u * 9 * 64 * 68);
  EXPECT_EQ(size.open, 2u * (6144 + 98304));
  EXPECT_EQ(size.tables, 512u);  // two buffers of less than 256 bytes
  EXPECT_EQ(size.total(), size.pages + size.open + size.tables + size.statics + size.workspace);
  for (const std::size_t bytes : {size.statics, size.workspace}) {
    EXPECT_GT(bytes, 0u);
    EXPECT_EQ(bytes % kBufferAlignment, 0u);
  }
}

TEST(CacheSize, CountsRotaryTablesOncePerEmbedding) {
  PlanBundle bundle = plan();
  EXPECT_EQ(rotary_owners(page_format(bundle)), (std::vector<std::size_t>{0, 0}));
  EXPECT_EQ(layer_buffers(page_format(bundle), 4, geometry())[1].rotary_tile, 0u);
  bundle.tensors.layers[1].inv_freq[3] *= 2;
  EXPECT_EQ(rotary_owners(page_format(bundle)), (std::vector<std::size_t>{0, 1}));
  EXPECT_GT(layer_buffers(page_format(bundle), 4, geometry())[1].rotary_tile, 0u);
}

TEST(CacheSize, ChargesNothingForMeansOfPlansThatDoNotCentre) {
  PlanBundle bundle = plan();
  bundle.plan.centre = false;
  const auto layers = page_format(bundle);
  EXPECT_EQ(phase_steps(layers[0]), 0);
  const LayerBuffers b = layer_buffers(layers, 4, geometry())[0];
  EXPECT_EQ(b.k_mean + b.v_mean + b.inv_freq + b.page_phase + b.rotary_tile, 0u);
}

TEST(CacheSize, RefusesWhatCannotBe) {
  CacheGeometry g = geometry();
  g.query_heads = 5;
  EXPECT_THROW(cache_size(plan(), g), ArgumentError);
  g = geometry();
  g.max_sequences = 1 << 16;
  g.max_tokens = std::int64_t{1} << 30;  // more blocks than page tables can number
  EXPECT_THROW(cache_size(plan(), g), ArgumentError);
  PlanBundle bundle = plan();
  bundle.plan.sink_tokens = -1;
  EXPECT_THROW(cache_size(bundle, geometry()), InputError);
  bundle = plan();
  bundle.plan.code = "polar";
  EXPECT_THROW(cache_size(bundle, geometry()), InputError);
}

}  // namespace
}  // namespace kvplan::quant
