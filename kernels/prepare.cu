// Queries of a step as decode reads them: transformed and plain fragments, and what the centring of
// keys and uniform levels add to scores.

#include "kernels/page_access.cuh"
#include "kernels/product.cuh"
#include "kernels/ptx.cuh"
#include "kernels/segments.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {
namespace {

using quant::kTileCoordinates;
using quant::kWarpLanes;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr int kMaxTiles = 48;  // of a side: head_dim / 16 full ones and a half tile in every run
constexpr int kOctet = 8;      // channels of a 16-byte load
constexpr int kWarps = kProductThreads / kWarpLanes;

/// A tile of K.
struct Tile {
  int coordinate = 0, coordinates = 0;  // of head_dim; outliers: of their list
  quant::TileCode code = quant::TileCode::kTable;
  float step = 0;
  KVPLAN_DEVICE bool transformed() const {
    return code == quant::TileCode::kTable || code == quant::TileCode::kUniform;
  }
};

struct Workspace {
  Product product;
  Tile* tiles;  // [kMaxTiles]
  float* bias;  // [kMaxTiles][16]

  KVPLAN_DEVICE explicit Workspace(int head_dim) : product(shared_memory(), head_dim) {
    std::byte* const rest = shared_memory() + product_bytes(head_dim);
    tiles = reinterpret_cast<Tile*>(rest);
    bias = reinterpret_cast<float*>(rest + kMaxTiles * sizeof(Tile));
  }
};

std::size_t shared_bytes(int head_dim) {
  return product_bytes(head_dim) + kMaxTiles * (sizeof(Tile) + kProductColumns * sizeof(float));
}

KVPLAN_DEVICE void list_tiles(const quant::SideLayout& layout, Tile* tiles) {
  int first = 0;
  for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
    const quant::TileRun& run = layout.runs[r];
    const int coordinates = quant::tile_coordinates(run.half != 0);
    for (int i = thread(); i < run.tiles; i += kProductThreads)
      tiles[first + i] = {run.coordinate + i * coordinates, coordinates, run.code, run.step};
    first += run.tiles;
  }
}

/// Columns of the product: scaled queries, 0 where there is none.
KVPLAN_DEVICE void load_queries(const AttentionView& v, const SegmentGroup& group,
                                const Product& product) {
  const int d = v.layer.head_dim;
  const float scale = v.scale * kLog2E;
  for (int i = thread(); i < d / kOctet * kProductColumns; i += kProductThreads) {
    const int column = i % kProductColumns, octet = i / kProductColumns;
    const std::int64_t row = group.row(v, column);
    const uint4 halves = row < 0 ? uint4{} : reinterpret_cast<const uint4*>(v.q + row * d)[octet];
    const std::uint32_t pairs[kOctet / 2] = {halves.x, halves.y, halves.z, halves.w};
    float* const to = product.columns + octet * kOctet * kProductColumns + column;
    for (int k = 0; k < kOctet; ++k)
      to[k * kProductColumns] =
          scale * from_half(static_cast<std::uint16_t>(pairs[k / 2] >> 16 * (k % 2)));
  }
}

/// A lane's part of a fragment: value(row) of its column.
template <class Value>
KVPLAN_DEVICE uint2 fragment(Value value) {
  const int row = 2 * (lane() % 4);
  return {pack_halves(value(row), value(row + 1)), pack_halves(value(row + 8), value(row + 9))};
}

/// Tiles first_tile .. of the head, whose products the chunk holds. A warp writes a tile of a
/// segment.
KVPLAN_DEVICE void store_tiles(const AttentionView& v, const SegmentGroup& group,
                               const Workspace& w, const std::int32_t* outliers, int first_tile,
                               int tiles) {
  for (int item = warp(); item < group.count * tiles; item += kWarps) {
    const int s = item / tiles, local = item % tiles, column_of_segment = lane() / 4;
    const int column = s * group.columns + column_of_segment;
    const bool used = column_of_segment < group.columns;
    const Tile tile = w.tiles[first_tile + local];
    const bool uniform = tile.code == quant::TileCode::kUniform;
    const uint2 packed = fragment([&](int row) -> float {
      if (!used || row >= tile.coordinates) return 0;
      const int coordinate = tile.coordinate + row;
      if (!tile.transformed()) {
        const int channel =
            tile.code == quant::TileCode::kInteger ? outliers[coordinate] : coordinate;
        return w.product.columns[channel * kProductColumns + column];
      }
      const float y = w.product.result(local * kTileCoordinates + row, column);
      if (!uniform) return y;
      return y * tile.step * (row < kTileCoordinates / 2 ? 1 : UniformTile::kHighFactor);
    });
    const std::int64_t at = std::int64_t{group.segment(v, s)} * v.query_tiles + first_tile + local;
    v.query[at * kWarpLanes + lane()] = packed;
    // Of the rounded operand, so that the offsets cancel.
    float bias = 0;
    if (uniform)
      bias = -UniformTile::kLowOffset * (low_half(packed.x) + high_half(packed.x)) -
             UniformTile::kHighOffset / UniformTile::kHighFactor *
                 (low_half(packed.y) + high_half(packed.y));
    bias += shuffle_xor(bias, 1);
    bias += shuffle_xor(bias, 2);
    if (used && lane() % 4 == 0) w.bias[(first_tile + local) * kProductColumns + column] = bias;
  }
}

KVPLAN_DEVICE void store_plain(const AttentionView& v, const SegmentGroup& group,
                               const Product& product) {
  for (int item = warp(); item < group.count * v.plain_tiles; item += kWarps) {
    const int s = item / v.plain_tiles, tile = item % v.plain_tiles;
    const int column_of_segment = lane() / 4, column = s * group.columns + column_of_segment;
    const uint2 packed = fragment([&](int row) -> float {
      const int channel = tile * kTileCoordinates + row;
      if (column_of_segment >= group.columns || channel >= v.layer.head_dim) return 0;
      return product.columns[channel * kProductColumns + column];
    });
    const std::int64_t at = std::int64_t{group.segment(v, s)} * v.plain_tiles + tile;
    v.plain_query[at * kWarpLanes + lane()] = packed;
  }
}

/// R_t mean . q as a function of t. Heads stored as fp16 are not centred.
KVPLAN_DEVICE void store_centre(const AttentionView& v, const SegmentGroup& group,
                                const Product& product, bool fp16) {
  const LayerView& layer = v.layer;
  const float* const mean = layer.k_mean + group.head * layer.head_dim;
  const int frequencies = 8 * layer.phase_steps;
  for (int i = thread(); i < group.count * frequencies * kColumns; i += kProductThreads) {
    const int c = i % kColumns, f = i / kColumns % frequencies, s = i / kColumns / frequencies;
    float2 centre{0, 0};
    if (!fp16 && c < group.columns && f < layer.pairs) {
      const int a = f * layer.pair_stride, b = a + layer.pair_distance;
      const float* const q = product.columns + s * group.columns + c;
      const float q_a = q[a * kProductColumns], q_b = q[b * kProductColumns];
      centre.x = fused(q_a, mean[a], q_b * mean[b]);
      centre.y = fused(q_a, mean[b], -(q_b * mean[a]));
    }
    v.centre[(std::int64_t{group.segment(v, s)} * frequencies + f) * kColumns + c] = centre;
  }
  for (int i = thread(); i < group.count * kColumns; i += kProductThreads) {
    const int c = i % kColumns, s = i / kColumns;
    float constant = 0;
    if (!fp16 && c < group.columns)
      for (int channel = 2 * layer.pairs; channel < layer.head_dim; ++channel)
        constant = fused(product.columns[channel * kProductColumns + s * group.columns + c],
                         mean[channel], constant);
    v.constant[std::int64_t{group.segment(v, s)} * kColumns + c] = constant;
  }
}

/// Block (group of segments, KV head).
__global__ void __launch_bounds__(kProductThreads)
    prepare_kernel(const AttentionView v, const int columns) {
  let_next_kernel_start();
  const SegmentGroup group(v, columns);
  const int d = v.layer.head_dim;
  const Workspace w(d);
  const quant::SideLayout& layout = v.layer.heads[group.head].k;
  const EncoderView& encoder = v.layer.encoders[kKeys * v.layer.kv_heads + group.head];
  list_tiles(layout, w.tiles);
  load_queries(v, group, w.product);
  sync_block();
  const int chunk = w.product.rows / kTileCoordinates;
  for (int first = 0; first < layout.tiles; first += chunk) {
    const int tiles = layout.tiles - first < chunk ? layout.tiles - first : chunk;
    w.product.load([&](int row) -> const float* {
      const int local = row / kTileCoordinates, r = row % kTileCoordinates;
      if (local >= tiles) return nullptr;
      const Tile& tile = w.tiles[first + local];
      if (!tile.transformed() || r >= tile.coordinates) return nullptr;
      return v.layer.k_query + (std::int64_t{group.head} * d + tile.coordinate + r) * d;
    });
    sync_block();
    w.product.run(group.count * columns);
    sync_block();
    store_tiles(v, group, w, encoder.outliers, first, tiles);
  }
  store_plain(v, group, w.product);
  if (v.layer.k_mean != nullptr) store_centre(v, group, w.product, encoder.fp16 != 0);
  sync_block();
  for (int i = thread(); i < group.count * kColumns; i += kProductThreads) {
    const int c = i % kColumns, s = i / kColumns;
    float bias = 0;
    for (int tile = 0; c < columns && tile < layout.tiles; ++tile)
      bias += w.bias[tile * kProductColumns + s * columns + c];
    v.bias[std::int64_t{group.segment(v, s)} * kColumns + c] = bias;
  }
}

}  // namespace

cudaError_t prepare(const AttentionView& view, cudaStream_t stream) {
  const int columns = columns_in_use(view);
  LaunchShape shape;
  shape.blocks = segment_groups(view, columns);
  shape.blocks_y = view.layer.kv_heads;
  shape.threads = kProductThreads;
  shape.shared_bytes = shared_bytes(view.layer.head_dim);
  shape.stream = stream;
  const cudaError_t allowed = allow_shared(prepare_kernel, shape.shared_bytes);
  return allowed != cudaSuccess ? allowed : launch(prepare_kernel, shape, view, columns);
}

}  // namespace kvplan::kernels
