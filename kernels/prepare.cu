// What `decode` and `finish` find ready: queries of a step as fragments of the transformed domain,
// what the centring of keys and the offsets of bytes add to scores, and attention over the fp16
// tokens.

#include <algorithm>
#include <cmath>

#include "kernels/page_access.cuh"
#include "kernels/plain_attention.cuh"
#include "kernels/ptx.cuh"
#include "kernels/segments.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/transform.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {
namespace {

using quant::kTileCoordinates;
using quant::kWarpLanes;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr float kTopDigits = 32000;  // of 127 * 256 + 127
constexpr int kMaxTiles = 48;  // of a side: head_dim / 16 full ones and a half tile in every run
constexpr int kOctet = 8;      // channels of a 16-byte load
constexpr int kStride = kProductColumns + 1;

/// A tile of K.
struct Tile {
  int coordinate = 0, coordinates = 0;  // of head_dim; outliers: of their list
  quant::TileCode code = quant::TileCode::kTable;
  float step = 0;
};

/// Of a coordinate: 0 unless its levels are bytes.
struct ByteTerm {
  float step, offset;  // offset: in units of the coordinate, step * byte_offset
};

struct Workspace {
  float* columns;   // [head_dim][17] scaled queries, 0 where there is none
  float* products;  // [head_dim rounded up to 16][17] the same transformed
  ByteTerm* terms;  // [head_dim]
  Tile* tiles;      // [kMaxTiles]
  float* units;     // [16] of the digits, by column of the product

  KVPLAN_DEVICE explicit Workspace(int head_dim) {
    columns = reinterpret_cast<float*>(shared_memory());
    products = columns + head_dim * kStride;
    terms = reinterpret_cast<ByteTerm*>(products + 16 * matrix_tiles(head_dim) * kStride);
    tiles = reinterpret_cast<Tile*>(terms + head_dim);
    units = reinterpret_cast<float*>(tiles + kMaxTiles);
  }
};

std::size_t shared_bytes(int head_dim) {
  const auto d = static_cast<std::size_t>(head_dim);
  return (d + 16 * static_cast<std::size_t>(matrix_tiles(head_dim))) * kStride * sizeof(float) +
         d * sizeof(ByteTerm) + kMaxTiles * sizeof(Tile) + kProductColumns * sizeof(float) + 16;
}

KVPLAN_DEVICE void list_tiles(const quant::SideLayout& layout, const Workspace& w) {
  int first = 0;
  for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
    const quant::TileRun& run = layout.runs[r];
    const int coordinates = quant::tile_coordinates(run.half != 0);
    for (int i = thread(); i < run.tiles; i += kThreads)
      w.tiles[first + i] = {run.coordinate + i * coordinates, coordinates, run.code, run.step};
    first += run.tiles;
    if (run.code != quant::TileCode::kBytes) continue;
    for (int i = thread(); i < run.tiles * coordinates; i += kThreads)
      w.terms[run.coordinate + i] = {run.step, run.step * run.byte_offset};
  }
}

KVPLAN_DEVICE void load_queries(const AttentionView& v, const SegmentGroup& group,
                                const Workspace& w) {
  const int d = v.layer.head_dim;
  const float scale = v.scale * kLog2e;
  for (int i = thread(); i < d / kOctet * kProductColumns; i += kThreads) {
    const int column = i % kProductColumns, octet = i / kProductColumns;
    const std::int64_t row = group.row(v, column);
    const uint4 halves = row < 0 ? uint4{} : reinterpret_cast<const uint4*>(v.q + row * d)[octet];
    const std::uint32_t pairs[kOctet / 2] = {halves.x, halves.y, halves.z, halves.w};
    float* const to = w.columns + octet * kOctet * kStride + column;
    for (int k = 0; k < kOctet; ++k)
      to[k * kStride] = scale * from_half(static_cast<std::uint16_t>(pairs[k / 2] >> 16 * (k % 2)));
  }
}

/// products = transform . queries. A warp makes 16 rows at a time.
KVPLAN_DEVICE void transform_queries(const AttentionView& v, const SegmentGroup& group,
                                     const Workspace& w) {
  const int d = v.layer.head_dim, tiles = matrix_tiles(d), g = lane() / 4, t = lane() % 4;
  const std::int64_t rows[2] = {group.row(v, g), group.row(v, g + 8)};
  const uint4* const matrix =
      v.layer.k_matrix + std::int64_t{group.head} * tiles * tiles * 2 * kWarpLanes;
  const float scale = v.scale * kLog2e * v.layer.matrix_scales[group.head].x;
  for (int tile = warp(); tile < tiles; tile += kWarps) {
    float sums[2][4];
    multiply_tile(
        matrix, tiles, tile,
        [&](int step, std::uint32_t(&a)[4], std::uint32_t(&)[4]) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const std::int64_t row = rows[k % 2];
            const int channel = 16 * step + 2 * t + 8 * (k / 2);
            a[k] = row >= 0 && channel < d
                       ? *reinterpret_cast<const std::uint32_t*>(v.q + row * d + channel)
                       : 0;
          }
        },
        sums);
#pragma unroll
    for (int column = 0; column < 2; ++column)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        w.products[(16 * tile + tile_row(k)) * kStride + g + 8 * column] = scale * sums[column][k];
  }
}

/// Units of the digits, so that the largest takes all of them; the bias. A warp does a column of a
/// segment.
KVPLAN_DEVICE void measure_columns(const AttentionView& v, const SegmentGroup& group,
                                   const Workspace& w, int coded) {
  for (int item = warp(); item < group.count * kColumns; item += kWarps) {
    const int s = item / kColumns, c = item % kColumns, column = s * group.columns + c;
    const bool used = c < group.columns;
    float most = 0, bias = 0;
    for (int i = lane(); used && i < coded; i += kWarpLanes) {
      const float product = w.products[i * kStride + column];
      most = fmaxf(most, fabsf(product * w.terms[i].step));
      bias = fused(product, w.terms[i].offset, bias);
    }
    for (int step = 1; step < kWarpLanes; step *= 2) {
      most = fmaxf(most, shuffle_xor(most, step));
      bias += shuffle_xor(bias, step);
    }
    if (lane() != 0) continue;
    const float unit = most / kTopDigits;
    if (used) w.units[column] = unit;
    v.bias[std::int64_t{group.segment(v, s)} * kColumns + c] = {bias, unit};
  }
}

/// Which column of a segment a column of operand B belongs to, with 16-bit numbers.
KVPLAN_DEVICE int half_column() { return lane() / 8 + 4 * (lane() / 4 % 2); }

/// A lane's part of a fragment of 16-bit numbers: value(row) of its column.
template <class Value>
KVPLAN_DEVICE uint2 fragment(Value value) {
  const int row = 2 * (lane() % 4);
  return {pack_halves(value(row), value(row + 1)), pack_halves(value(row + 8), value(row + 9))};
}

/// A lane's part of a fragment of digits: integer(row, column).
template <class Integer>
KVPLAN_DEVICE uint2 digit_fragment(Integer integer) {
  const int row = 2 * (lane() % 4), column = lane() / 8;
  const bool high = lane() / 4 % 2 == 0;
  const auto word = [&](int c) {
    std::uint32_t bytes = 0;
    for (int y = 0; y < 4; ++y) {
      const int x = integer(row + y / 2 + 8 * (y % 2), c);
      const int digit = high ? (x + 128) >> 8 : x;
      bytes |= (static_cast<std::uint32_t>(digit) & 0xff) << 8 * y;
    }
    return bytes;
  };
  return {word(column), word(column + 4)};
}

/// A warp writes a tile of a segment.
KVPLAN_DEVICE void store_tiles(const AttentionView& v, const SegmentGroup& group,
                               const Workspace& w, const std::int32_t* outliers, int tiles) {
  for (int item = warp(); item < group.count * tiles; item += kWarps) {
    const int s = item / tiles, index = item % tiles;
    const Tile tile = w.tiles[index];
    const auto product = [&](int row, int c) -> float {
      if (c >= group.columns || row >= tile.coordinates) return 0;
      return w.products[(tile.coordinate + row) * kStride + s * group.columns + c];
    };
    uint2 packed;
    if (tile.code == quant::TileCode::kBytes) {
      packed = digit_fragment([&](int row, int c) {
        const float unit = c < group.columns ? w.units[s * group.columns + c] : 0;
        return unit > 0 ? static_cast<int>(std::rint(product(row, c) * tile.step / unit)) : 0;
      });
    } else if (tile.code == quant::TileCode::kTable) {
      packed = fragment([&](int row) { return product(row, half_column()); });
    } else {
      packed = fragment([&](int row) -> float {
        if (half_column() >= group.columns || row >= tile.coordinates) return 0;
        const int coordinate = tile.coordinate + row;
        const int channel =
            tile.code == quant::TileCode::kInteger ? outliers[coordinate] : coordinate;
        return w.columns[channel * kStride + s * group.columns + half_column()];
      });
    }
    const std::int64_t at = std::int64_t{group.segment(v, s)} * v.query_tiles + index;
    v.query[at * kWarpLanes + lane()] = packed;
  }
}

/// R_t mean . q as a function of t. Heads stored as fp16 are not centred.
KVPLAN_DEVICE void store_centre(const AttentionView& v, const SegmentGroup& group,
                                const Workspace& w, bool fp16) {
  const LayerView& layer = v.layer;
  const float* const mean = layer.k_mean + group.head * layer.head_dim;
  const int frequencies = 8 * layer.phase_steps;
  for (int i = thread(); i < group.count * frequencies * kColumns; i += kThreads) {
    const int c = i % kColumns, f = i / kColumns % frequencies, s = i / kColumns / frequencies;
    float2 centre{0, 0};
    if (!fp16 && c < group.columns && f < layer.pairs) {
      const int a = f * layer.pair_stride, b = a + layer.pair_distance;
      const float* const q = w.columns + s * group.columns + c;
      const float q_a = q[a * kStride], q_b = q[b * kStride];
      centre.x = fused(q_a, mean[a], q_b * mean[b]);
      centre.y = fused(q_a, mean[b], -(q_b * mean[a]));
    }
    v.centre[(std::int64_t{group.segment(v, s)} * frequencies + f) * kColumns + c] = centre;
  }
  for (int i = thread(); i < group.count * kColumns; i += kThreads) {
    const int c = i % kColumns, s = i / kColumns;
    float constant = 0;
    if (!fp16 && c < group.columns)
      for (int channel = 2 * layer.pairs; channel < layer.head_dim; ++channel)
        constant =
            fused(w.columns[channel * kStride + s * group.columns + c], mean[channel], constant);
    v.constant[std::int64_t{group.segment(v, s)} * kColumns + c] = constant;
  }
}

/// The queries of a group of segments. By a block.
KVPLAN_DEVICE void prepare_group(const AttentionView& v, const SegmentGroup& group) {
  const int d = v.layer.head_dim;
  const Workspace w(d);
  const quant::SideLayout& layout = v.layer.heads[group.head].k;
  const EncoderView& encoder = v.layer.encoders[kKeys * v.layer.kv_heads + group.head];
  for (int i = thread(); i < d; i += kThreads) w.terms[i] = {0, 0};
  sync_block();
  list_tiles(layout, w);
  load_queries(v, group, w);
  if (encoder.fp16 == 0) transform_queries(v, group, w);
  sync_block();
  measure_columns(v, group, w, encoder.fp16 == 0 ? encoder.coded : 0);
  if (v.layer.k_mean != nullptr) store_centre(v, group, w, encoder.fp16 != 0);
  sync_block();
  store_tiles(v, group, w, encoder.outliers, layout.tiles);
}

/// Blocks (item, KV head): first the segments' fp16 tokens, which take longest, then the groups.
__global__ void __launch_bounds__(kThreads, 2)
    prepare_kernel(const AttentionView v, const int columns) {
  let_next_kernel_start();
  const int segments = v.batch.sequences * v.column_blocks;
  if (block() < segments)
    attend_plain<kWarps>(v, block() / v.column_blocks, block_y(), block() % v.column_blocks);
  else
    prepare_group(v, SegmentGroup(v, columns, block() - segments));
}

}  // namespace

cudaError_t prepare(const AttentionView& view, cudaStream_t stream) {
  const int columns = columns_in_use(view);
  LaunchShape shape;
  shape.blocks = view.batch.sequences * view.column_blocks + segment_groups(view, columns);
  shape.blocks_y = view.layer.kv_heads;
  shape.threads = kThreads;
  shape.shared_bytes =
      std::max(shared_bytes(view.layer.head_dim), plain_shared_bytes(kWarps, view.plain_tiles));
  shape.stream = stream;
  const cudaError_t allowed = allow_shared(prepare_kernel, shape.shared_bytes);
  return allowed != cudaSuccess ? allowed : launch(prepare_kernel, shape, view, columns);
}

}  // namespace kvplan::kernels
