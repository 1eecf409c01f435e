// Partial results of `decode` into the output of attention: merged, out of the transform of the
// values by the head's synthesis matrix, plus the mean and the fp16 tokens.

#include <bit>
#include <cmath>

#include "kernels/page_access.cuh"
#include "kernels/ptx.cuh"
#include "kernels/segments.cuh"
#include "kernels/transform.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {
namespace {

using quant::kTileCoordinates;
using quant::kWarpLanes;

constexpr float kLn2 = 0.693147180559945309417f;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kStride = kProductColumns + 1;
constexpr int kPartsPerColumn = kWarpLanes / kColumns;  // lanes that share the slots of a column
static_assert(kWarps >= kProductColumns, "a warp merges the states of a segment");

/// Of a column of the product.
struct ColumnState {
  float maximum = 0, inverse = 0;  // of the scores in log2 units; 1 / sum of 2^(score - maximum)
  float packed = 0;                // sum over the packed tokens
  float plain = 0;                 // factor of the fp16 tokens' output
};

/// Of a segment's list of slots.
struct SlotList {
  int begin, count;
};

/// Slots of all segments of a group: warps' ranges of different segments share their ends at most.
constexpr int slot_room(const AttentionView& v) {
  return v.decode_blocks * v.block_warps + 2 * kProductColumns;
}

struct Workspace {
  uint4* fragments;     // [tiles][2][32] outputs / most as operand A: high, low
  float* outputs;       // [head_dim rounded up to 16][17] merged, of the storage coordinates
  float* direct;        // [head_dim][17] merged, of channels outside the transform
  float* plain;         // [head_dim][17] of the fp16 tokens
  float* most;          // [16] largest |outputs| of a column
  ColumnState* states;  // [16]
  SlotList* lists;      // [16]
  std::int32_t* slots;  // [slot_room]
  float* weights;       // [slot_room][8] factors of a slot's outputs, by column

  KVPLAN_DEVICE explicit Workspace(const AttentionView& v) {
    const int d = v.layer.head_dim, tiles = matrix_tiles(d);
    fragments = reinterpret_cast<uint4*>(shared_memory());
    outputs = reinterpret_cast<float*>(fragments + tiles * 2 * kWarpLanes);
    direct = outputs + 16 * tiles * kStride;
    plain = direct + d * kStride;
    most = plain + d * kStride;
    states = reinterpret_cast<ColumnState*>(most + kProductColumns);
    lists = reinterpret_cast<SlotList*>(states + kProductColumns);
    slots = reinterpret_cast<std::int32_t*>(lists + kProductColumns);
    weights = reinterpret_cast<float*>(slots + slot_room(v));
  }
};

std::size_t shared_bytes(const AttentionView& v) {
  const auto room = static_cast<std::size_t>(slot_room(v)),
             d = static_cast<std::size_t>(v.layer.head_dim),
             tiles = static_cast<std::size_t>(matrix_tiles(v.layer.head_dim));
  return tiles * 2 * kWarpLanes * sizeof(uint4) +
         ((16 * tiles + 2 * d) * kStride + kProductColumns) * sizeof(float) +
         kProductColumns * (sizeof(ColumnState) + sizeof(SlotList)) +
         room * (sizeof(std::int32_t) + kColumns * sizeof(float));
}

/// The slots of a segment in ascending order. Called by the segment's warp.
KVPLAN_DEVICE void list_slots(const AttentionView& v, const SegmentGroup& group, int s,
                              const Workspace& w) {
  const int segment = group.segment(v, s), own = v.decode_blocks * v.block_warps + segment;
  int first = 0, last = -1, begin = 0;
  if (lane() <= s) {
    const int2 warps = v.segment_warps[group.segment(v, lane())];
    first = warps.x, last = warps.y;
    if (lane() < s) begin = last - first + 2;
  }
  for (int step = 1; step < kProductColumns; step *= 2) begin += shuffle_xor(begin, step);
  begin = shuffle(begin, 0), first = shuffle(first, s), last = shuffle(last, s);
  std::int32_t* const slots = w.slots + begin;
  constexpr int kLoaded = 8;  // reads that are on the way together
  int count = 0;
#pragma unroll 1
  for (int base = first; base <= last + 1; base += kLoaded * kWarpLanes) {
    bool owned[kLoaded];
#pragma unroll
    for (int k = 0; k < kLoaded; ++k) {
      const int at = base + k * kWarpLanes + lane();  // last + 1: the segment's own slot
      owned[k] = at <= last + 1 && v.slot_owner[at <= last ? at : own] == segment;
    }
#pragma unroll
    for (int k = 0; k < kLoaded; ++k) {
      const int at = base + k * kWarpLanes + lane();
      const std::uint32_t found = ballot(owned[k]);
      const int before = std::popcount(found & ((1u << lane()) - 1));
      if (owned[k]) slots[count + before] = at <= last ? at : own;
      count += std::popcount(found);
    }
  }
  if (lane() == 0) w.lists[s] = {begin, count};
}

/// 2^(m - maximum) of a part that counts, else 0.
KVPLAN_DEVICE float weight(float2 state, float maximum) {
  return state.y > 0 ? exp2_fast(state.x - maximum) : 0;
}

/// Maximum and sums of the columns of a segment. Called by the segment's warp, lane = column + 8
/// part.
KVPLAN_DEVICE void merge_states(const AttentionView& v, const SegmentGroup& group, int s,
                                const Workspace& w) {
  const int c = lane() % kColumns, part = lane() / kColumns;
  const SlotList list = w.lists[s];
  const std::int32_t* const slots = w.slots + list.begin;
  float* const weights = w.weights + list.begin * kColumns + c;
  const int count = list.count;
  const float2 plain = v.plain_state[std::int64_t{group.segment(v, s)} * kColumns + c];
  constexpr int kLoaded = 8;  // of a lane, on the way together
  const auto state = [&](int i) {
    return i < count ? v.slot_state[std::int64_t{slots[i]} * kColumns + c] : float2{kLowest, 0};
  };
  float2 loaded[kLoaded];
#pragma unroll
  for (int k = 0; k < kLoaded; ++k) loaded[k] = state(part + k * kPartsPerColumn);
  float maximum = plain.x;
#pragma unroll
  for (int k = 0; k < kLoaded; ++k) maximum = std::fmax(maximum, loaded[k].x);
  constexpr int kMore = kLoaded * kPartsPerColumn;
  for (int i = part + kMore; i < count; i += kPartsPerColumn)
    maximum = std::fmax(maximum, state(i).x);
  maximum = std::fmax(maximum, shuffle_xor(maximum, kColumns));
  maximum = std::fmax(maximum, shuffle_xor(maximum, 2 * kColumns));
  float packed = 0;
  const auto add = [&](int i, float2 one) {
    const float factor = weight(one, maximum);
    if (i < count) weights[i * kColumns] = factor;
    packed = fused(one.y, factor, packed);
  };
#pragma unroll
  for (int k = 0; k < kLoaded; ++k) add(part + k * kPartsPerColumn, loaded[k]);
  for (int i = part + kMore; i < count; i += kPartsPerColumn) add(i, state(i));
  packed += shuffle_xor(packed, kColumns);
  packed += shuffle_xor(packed, 2 * kColumns);
  if (part > 0 || c >= group.columns) return;
  const float factor = weight(plain, maximum);
  const float total = fused(plain.y, factor, packed);
  const int column = s * group.columns + c;
  w.states[column] = {maximum, total > 0 ? 1 / total : 0, packed, factor};
  const std::int64_t row = group.row(v, column);
  if (v.lse != nullptr && row >= 0) v.lse[row] = kLn2 * (maximum + std::log2(total));
}

/// Writes a lane's fragment of a tile: put(coordinate of the tile, column of the product, value).
template <class Put>
KVPLAN_DEVICE void spread(const SegmentGroup& group, int s, float4 o, Put put) {
  const int g = lane() / 4, c = lane() % 4;
  const int column = s * group.columns + c;
  if (c < group.columns) {
    put(g, column, o.x);
    put(g + 8, column, o.y);
  }
  if (c + 4 < group.columns) {
    put(g, column + 4, o.z);
    put(g + 8, column + 4, o.w);
  }
}

/// plain = output of the fp16 tokens. A warp takes a tile of a segment, here and below.
KVPLAN_DEVICE void load_plain(const AttentionView& v, const SegmentGroup& group,
                              const Workspace& w) {
  for (int item = warp(); item < group.count * v.plain_tiles; item += kWarps) {
    const int s = item / v.plain_tiles, tile = item % v.plain_tiles;
    const std::int64_t at = std::int64_t{group.segment(v, s)} * v.plain_tiles + tile;
    const float4 o = v.plain_output[at * kWarpLanes + lane()];
    spread(group, s, o, [&](int row, int column, float value) {
      const int channel = plain_channel(tile, row);
      if (channel < v.layer.head_dim) w.plain[channel * kStride + column] = value;
    });
  }
}

/// Sums over the slots: `outputs`, outlier channels and fp16 heads to `direct`.
KVPLAN_DEVICE void merge_outputs(const AttentionView& v, const SegmentGroup& group,
                                 const quant::SideLayout& layout, const std::int32_t* outliers,
                                 const Workspace& w) {
  int first_tile = 0;
  for (int r = 0; r < layout.run_count + layout.outlier_runs; ++r) {
    const quant::TileRun& run = layout.runs[r];
    const int coordinates = quant::tile_coordinates(run.half != 0);
    for (int item = warp(); item < group.count * run.tiles; item += kWarps) {
      const int s = item / run.tiles, tile = item % run.tiles, c = lane() % 4;
      const SlotList list = w.lists[s];
      const std::int32_t* const slots = w.slots + list.begin;
      const float* const weights = w.weights + list.begin * kColumns + c;
      float4 sum{0, 0, 0, 0};
#pragma unroll 8
      for (int k = 0; k < list.count; ++k) {
        const float4 o =
            v.slot_output[(std::int64_t{slots[k]} * v.output_tiles + first_tile + tile) *
                              kWarpLanes +
                          lane()];
        const float a = weights[k * kColumns], b = weights[k * kColumns + 4];
        sum.x = fused(a, o.x, sum.x);
        sum.y = fused(a, o.y, sum.y);
        sum.z = fused(b, o.z, sum.z);
        sum.w = fused(b, o.w, sum.w);
      }
      spread(group, s, sum, [&](int row, int to, float value) {
        if (row >= coordinates) return;
        const int coordinate = run.coordinate + tile * coordinates + row;
        if (run.code == quant::TileCode::kInteger)
          w.direct[outliers[coordinate] * kStride + to] += value;
        else if (run.code == quant::TileCode::kHalf)
          w.direct[coordinate * kStride + to] += value;
        else
          w.outputs[coordinate * kStride + to] = value;
      });
    }
    first_tile += run.tiles;
  }
}

/// A warp does a column.
KVPLAN_DEVICE void measure_columns(const Workspace& w, int columns, int coded) {
  for (int column = warp(); column < columns; column += kWarps) {
    float most = 0;
    for (int i = lane(); i < coded; i += kWarpLanes)
      most = fmaxf(most, fabsf(w.outputs[i * kStride + column]));
    for (int step = 1; step < kWarpLanes; step *= 2) most = fmaxf(most, shuffle_xor(most, step));
    if (lane() == 0) w.most[column] = most;
  }
}

/// fragments = outputs / most.
KVPLAN_DEVICE void make_fragments(const SegmentGroup& group, const Workspace& w, int tiles) {
  const int used = group.count * group.columns;
  for (int step = warp(); step < tiles; step += kWarps) {
    const int g = lane() / 4, t = lane() % 4;
    std::uint32_t a[4], rest[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int column = g + 8 * (k % 2);
      const float most = column < used ? w.most[column] : 0, inverse = most > 0 ? 1 / most : 0;
      const float* const from = w.outputs + (16 * step + 2 * t + 8 * (k / 2)) * kStride + column;
      const float x = from[0] * inverse, y = from[kStride] * inverse;
      a[k] = pack_halves(x, y);
      rest[k] = pack_halves((x - low_half(a[k])) * kLowScale, (y - high_half(a[k])) * kLowScale);
    }
    w.fragments[2 * step * kWarpLanes + lane()] = {a[0], a[1], a[2], a[3]};
    w.fragments[(2 * step + 1) * kWarpLanes + lane()] = {rest[0], rest[1], rest[2], rest[3]};
  }
}

/// direct += synthesis . outputs. A warp makes 16 channels at a time.
KVPLAN_DEVICE void transform_outputs(const AttentionView& v, const SegmentGroup& group,
                                     const Workspace& w) {
  const int d = v.layer.head_dim, tiles = matrix_tiles(d), g = lane() / 4;
  const int used = group.count * group.columns;
  const uint4* const matrix =
      v.layer.v_matrix + std::int64_t{group.head} * tiles * tiles * 2 * kWarpLanes;
  for (int tile = warp(); tile < tiles; tile += kWarps) {
    float sums[2][4];
    multiply_tile(
        matrix, tiles, tile,
        [&](int step, std::uint32_t(&a)[4], std::uint32_t(&rest)[4]) {
          const uint4 high = w.fragments[2 * step * kWarpLanes + lane()],
                      low = w.fragments[(2 * step + 1) * kWarpLanes + lane()];
          a[0] = high.x, a[1] = high.y, a[2] = high.z, a[3] = high.w;
          rest[0] = low.x, rest[1] = low.y, rest[2] = low.z, rest[3] = low.w;
        },
        sums);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = g + 8 * i, channel = 16 * tile + tile_row(k);
        if (column < used && channel < d)
          w.direct[channel * kStride + column] +=
              w.most[column] * v.layer.matrix_scales[group.head].y * sums[i][k];
      }
  }
}

KVPLAN_DEVICE void store(const AttentionView& v, const SegmentGroup& group, const Workspace& w,
                         bool transformed) {
  const int d = v.layer.head_dim;
  const float* const mean =
      transformed && v.layer.v_mean != nullptr ? v.layer.v_mean + group.head * d : nullptr;
  for (int column = warp(); column < group.count * group.columns; column += kWarps) {
    const std::int64_t row = group.row(v, column);
    if (row < 0) continue;
    const ColumnState state = w.states[column];
    for (int channel = lane(); channel < d; channel += kWarpLanes) {
      float o = w.direct[channel * kStride + column];
      if (state.plain > 0) o = fused(state.plain, w.plain[channel * kStride + column], o);
      if (mean != nullptr) o = fused(mean[channel], state.packed, o);
      o *= state.inverse;
      if (v.out != nullptr) v.out[row * d + channel] = to_half(o);
      if (v.out_float != nullptr) v.out_float[row * d + channel] = o;
    }
  }
}

/// Block (group of segments, KV head).
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const AttentionView v, const int columns) {
  const SegmentGroup group(v, columns, block());
  const int d = v.layer.head_dim, tiles = matrix_tiles(d);
  const Workspace w(v);
  const quant::SideLayout& layout = v.layer.heads[group.head].v;
  const EncoderView& encoder = v.layer.encoders[kValues * v.layer.kv_heads + group.head];
  const bool transformed = encoder.fp16 == 0;
  // The matrix is on its way while `decode` runs.
  constexpr int kLine = 128;
  const int matrix_bytes = tiles * tiles * 2 * kWarpLanes * static_cast<int>(sizeof(uint4));
  if (transformed)
    for (int i = thread() * kLine; i < matrix_bytes; i += kThreads * kLine)
      prefetch(reinterpret_cast<const std::byte*>(v.layer.v_matrix) +
               std::int64_t{group.head} * matrix_bytes + i);
  const bool leads = warp() < group.count;         // a warp leads a segment
  const int cleared = (16 * tiles + d) * kStride;  // outputs and direct
  for (int i = thread(); i < cleared; i += kThreads) w.outputs[i] = 0;
  sync_block();

  wait_for_previous_kernel();
  if (leads) list_slots(v, group, warp(), w);
  load_plain(v, group, w);
  sync_block();
  if (leads) merge_states(v, group, warp(), w);
  sync_block();
  merge_outputs(v, group, layout, encoder.outliers, w);
  sync_block();
  if (transformed) {
    measure_columns(w, group.count * columns, encoder.coded);
    sync_block();
    make_fragments(group, w, tiles);
    sync_block();
    transform_outputs(v, group, w);
    sync_block();
  }
  store(v, group, w, transformed);
}

}  // namespace

cudaError_t finish(const AttentionView& view, cudaStream_t stream) {
  const int columns = columns_in_use(view);
  LaunchShape shape;
  shape.blocks = segment_groups(view, columns);
  shape.blocks_y = view.layer.kv_heads;
  shape.threads = kThreads;
  shape.shared_bytes = shared_bytes(view);
  shape.stream = stream;
  shape.overlap = true;
  const cudaError_t allowed = allow_shared(finish_kernel, shape.shared_bytes);
  return allowed != cudaSuccess ? allowed : launch(finish_kernel, shape, view, columns);
}

}  // namespace kvplan::kernels
