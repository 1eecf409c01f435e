#include "quant/cache_size.h"

#include <algorithm>
#include <limits>
#include <string>

#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 30;  // as codecs
constexpr std::int64_t kMaxBlocks = std::numeric_limits<std::int32_t>::max();
constexpr int kMaxSequences = 1 << 16;
constexpr int kMaxQueryTokens = 1 << 10;

constexpr std::size_t kHalfBytes = 2, kFloatBytes = 4, kDoubleBytes = 8, kIntBytes = 4;
constexpr std::size_t kFloat2Bytes = 8, kUint4Bytes = 16;
constexpr std::size_t kLevels = 256, kBoundaries = 255;  // of a table, whatever its width
constexpr std::size_t kRotaryTileFragments = 4;          // of 16 tokens each

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

void require(bool holds, const char* field, const std::string& expected, std::int64_t found) {
  if (!holds)
    throw ArgumentError("a cache needs " + std::string(field) + " " + expected + ", found " +
                        std::to_string(found));
}

std::size_t rotary_pairs(const LayerFormat& format) {
  return format.k.mean ? format.k.mean->inv_freq().size() : 0;
}

bool same_rotary(const LayerFormat& a, const LayerFormat& b) {
  return a.k.mean && b.k.mean && std::ranges::equal(a.k.mean->inv_freq(), b.k.mean->inv_freq());
}

template <class... Bytes>
std::size_t charged(Bytes... bytes) {
  return (buffer_bytes(bytes) + ...);
}

}  // namespace

void require_geometry(const Plan& plan, const CacheGeometry& geometry) {
  const int kv_heads = plan.model.kv_heads;
  if (kv_heads < 1)
    throw InputError("plan.json", "/model/kv_heads",
                     "expected at least 1, found " + std::to_string(kv_heads));
  if (plan.sink_tokens < 0)
    throw InputError("plan.json", "/sink_tokens",
                     "expected at least 0, found " + std::to_string(plan.sink_tokens));
  require(geometry.query_heads >= kv_heads && geometry.query_heads % kv_heads == 0, "query_heads",
          "to be a multiple of the plan's " + std::to_string(kv_heads) + " KV heads",
          geometry.query_heads);
  const auto bounded = [](const char* field, std::int64_t value, std::int64_t first,
                          std::int64_t last) {
    require(value >= first && value <= last, field,
            "of " + std::to_string(first) + " to " + std::to_string(last), value);
  };
  bounded("max_sequences", geometry.max_sequences, 1, kMaxSequences);
  bounded("max_tokens", geometry.max_tokens, 1, kMaxTokens);
  bounded("max_query_tokens", geometry.max_query_tokens, 1, kMaxQueryTokens);
  bounded("blocks", geometry.blocks, 0, kMaxBlocks);
  bounded("blocks", pool_blocks(geometry, plan.sink_tokens), 0, kMaxBlocks);
}

std::int64_t pages_per_sequence(const CacheGeometry& geometry, int sink_tokens) {
  return std::max<std::int64_t>(geometry.max_tokens - sink_tokens, 0) / kPageTokens;
}

std::int64_t pool_blocks(const CacheGeometry& geometry, int sink_tokens) {
  return geometry.blocks > 0 ? geometry.blocks
                             : geometry.max_sequences * pages_per_sequence(geometry, sink_tokens);
}

int phase_steps(const LayerFormat& format) {
  return (static_cast<int>(rotary_pairs(format)) + kPhasePairs - 1) / kPhasePairs;
}

std::size_t most_runs(const LayerFormat& format) {
  std::size_t most = 0;
  for (const HeadLayout& head : format.heads)
    most = std::max(most, size(head.k.run_count + head.k.outlier_runs + head.v.run_count +
                               head.v.outlier_runs));
  return most;
}

std::vector<std::size_t> rotary_owners(std::span<const LayerFormat> layers) {
  std::vector<std::size_t> owners;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    std::size_t owner = 0;
    while (owner < l && !same_rotary(layers[owner], layers[l])) ++owner;
    owners.push_back(owner);
  }
  return owners;
}

std::vector<LayerBuffers> layer_buffers(std::span<const LayerFormat> layers, int sink_tokens,
                                        const CacheGeometry& geometry) {
  const std::vector<std::size_t> owners = rotary_owners(layers);
  std::vector<LayerBuffers> buffers(layers.size());
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const LayerFormat& format = layers[l];
    LayerBuffers& bytes = buffers[l];
    const auto d = size(format.k.geometry.head_dim);
    const auto kv_heads = size(format.k.geometry.kv_heads);
    bytes.pool = size(pool_blocks(geometry, sink_tokens)) * format.block_bytes;
    const std::size_t row =
        size(geometry.max_sequences) * kSides.size() * kv_heads * d * kHalfBytes;
    bytes.sinks = row * size(sink_tokens);
    bytes.open = row * size(kPageTokens);
    bytes.layouts = kv_heads * sizeof(HeadLayout);
    bytes.runs = kv_heads * most_runs(format) * kRunEntryBytes;
    bytes.levels = format.tables.size() * kLevels * kFloatBytes;
    bytes.boundaries = format.tables.size() * kBoundaries * kFloatBytes;
    bytes.encoders = kSides.size() * kv_heads * kEncoderViewBytes;
    for (const TransformCodecSpec* const spec : {&format.k, &format.v})
      for (const HeadTransform& head : spec->heads) {
        bytes.channels += (head.channels.size() + head.outliers.size()) * kIntBytes;
        bytes.analysis += head.analysis.size() * kFloatBytes;
        bytes.weights += head.weight.size() * kDoubleBytes;
      }
    bytes.synthesis = kv_heads * d * d * kFloatBytes;
    const std::size_t tiles = (d + kTileCoordinates - 1) / kTileCoordinates;
    bytes.k_terms = kv_heads * tiles * kTileCoordinates * kFloat2Bytes;
    bytes.k_matrix = bytes.v_matrix = kv_heads * tiles * tiles * 2 * kWarpLanes * kUint4Bytes;
    bytes.matrix_scales = kv_heads * kFloat2Bytes;
    bytes.k_mean = format.k.mean ? kv_heads * d * kFloatBytes : 0;
    bytes.v_mean = format.v.mean ? kv_heads * d * kFloatBytes : 0;
    if (owners[l] != l) continue;
    const auto steps = size(phase_steps(format));
    bytes.inv_freq = rotary_pairs(format) * kDoubleBytes;
    bytes.page_phase = size(pages_per_sequence(geometry, sink_tokens)) * steps * 2 *
                       size(kPhasePairs) * kFloat2Bytes;
    bytes.rotary_tile = steps * kRotaryTileFragments * kWarpLanes * kUint4Bytes;
    bytes.rotary_tile_low = bytes.rotary_tile;
  }
  return buffers;
}

SharedBuffers shared_buffers(std::span<const LayerFormat> layers, int sink_tokens,
                             const CacheGeometry& geometry, const DecodeGrid& grid) {
  std::size_t segments = 0, output_tiles = 0, head_dim = 0, columns_kept = 0;
  for (const LayerFormat& format : layers) {
    const int kv_heads = format.k.geometry.kv_heads;
    const int columns = geometry.max_query_tokens * (geometry.query_heads / kv_heads);
    const int column_blocks = (columns + kQueryColumns - 1) / kQueryColumns;
    segments =
        std::max(segments, size(geometry.max_sequences) * size(kv_heads) * size(column_blocks));
    head_dim = std::max(head_dim, size(format.k.geometry.head_dim));
    columns_kept = size(columns <= kQueryColumns / 2 ? kQueryColumns / 2 : kQueryColumns);
    for (const HeadLayout& head : format.heads)
      output_tiles = std::max(output_tiles, size(head.v.tiles));
  }
  const auto sequences = size(geometry.max_sequences);
  const std::size_t parts = size(grid.blocks) * size(kBlockParts);
  const std::size_t chunks = segments * size(plain_chunks(sink_tokens));

  SharedBuffers bytes;
  bytes.page_table = sequences * size(pages_per_sequence(geometry, sink_tokens)) * kIntBytes;
  bytes.batch = 4 * sequences * kIntBytes;
  bytes.arrived = segments * kIntBytes;
  bytes.part_state = parts * kQueryColumns * kFloat2Bytes;
  bytes.part_output = parts * output_tiles * kWarpLanes * columns_kept / 2 * kFloatBytes;
  bytes.plain_state = chunks * kQueryColumns * kFloat2Bytes;
  bytes.plain_output = chunks * columns_kept * head_dim * kFloatBytes;
  return bytes;
}

CacheSize cache_size(const PlanBundle& bundle, const CacheGeometry& geometry,
                     const DecodeGrid& grid) {
  require_geometry(bundle.plan, geometry);
  const std::vector<LayerFormat> layers = page_format(bundle);
  const int sinks = bundle.plan.sink_tokens;
  CacheSize total;
  for (const LayerBuffers& b : layer_buffers(layers, sinks, geometry)) {
    total.pages += charged(b.pool);
    total.open += charged(b.sinks, b.open);
    total.statics += charged(b.layouts, b.runs, b.levels, b.boundaries, b.encoders, b.channels,
                             b.analysis, b.weights, b.synthesis, b.synthesis, b.k_terms, b.k_matrix,
                             b.v_matrix, b.matrix_scales, b.k_mean, b.v_mean, b.inv_freq,
                             b.page_phase, b.rotary_tile, b.rotary_tile_low);
  }
  const SharedBuffers b = shared_buffers(layers, sinks, geometry, grid);
  total.tables = charged(b.page_table, b.batch);
  total.workspace = charged(b.arrived, b.part_state, b.part_output, b.plain_state, b.plain_output);
  return total;
}

}  // namespace kvplan::quant
