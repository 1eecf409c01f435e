#pragma once
// What a warp needs of a segment before it attends to its pages. Private to the decode kernels.

#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_bytes.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

// What a segment needs, to the warp's shared memory and registers.
template <int Blocks>
KVPLAN_DEVICE void load_segment(const AttentionView& v, Work<Blocks>& work) {
  const SharedMap& map = v.layer.shared;
  const std::int64_t segment = work.segment;
  const quant::HeadLayout& head = v.layer.heads[work.head];
  auto* query = reinterpret_cast<uint4*>(work.region + map.query_offset);
  const auto* from = reinterpret_cast<const uint4*>(v.query + segment * v.query_tiles * kLanes);
  for (int i = lane(); i < head.k.tiles * kLanes / 2; i += kLanes) query[i] = from[i];
  auto* runs = reinterpret_cast<RunEntry*>(work.region + map.runs_offset);
  int done = 0;
  for (const quant::SideLayout* side : {&head.k, &head.v}) {
    const int count = side->run_count + side->outlier_runs;
    for (int i = lane(); i < count * 8; i += kLanes) {
      const quant::TileRun& run = side->runs[i / 8];
      RunEntry& entry = runs[done + i / 8];
      if (run.code == quant::TileCode::kBytes)
        entry.levels[i % 8] = table_word(run, v.layer.levels + 256 * run.table, i % 8);
      if (i % 8 > 0) continue;
      entry.table =
          static_cast<std::uint16_t>(map.table_address[run.table % kMaxLevelTables] >> kEntryShift);
      entry.bytes = static_cast<std::uint16_t>((run.half != 0 ? 64 : 128) * run.width);
      entry.kind = tile_kind(run);
      entry.tiles = static_cast<std::uint8_t>(run.tiles);
    }
    done += count;
    int outlier_tiles = 0;
    for (int i = side->run_count; i < count; ++i) outlier_tiles += side->runs[i].tiles;
    if (side == &head.v) work.value_outlier_tiles = outlier_tiles;
    (side == &head.k ? work.key_tiles : work.value_tiles) = side->tiles - outlier_tiles;
  }
  work.runs = runs;
  work.key_runs = head.k.run_count, work.key_outlier_runs = head.k.outlier_runs;
  work.value_runs = head.v.run_count, work.value_outlier_runs = head.v.outlier_runs;
  const std::uint32_t first_half = key_tile_bytes(head);
  work.key_norms = head.k.norm_offset - first_half;
  work.value_norms = head.v.norm_offset - first_half;
  work.key_scales = head.k.scale_offset - first_half;
  work.value_scales = head.v.scale_offset - first_half;
  work.norm_bytes[0] = head.k.norm_bytes, work.norm_bytes[1] = head.v.norm_bytes;
  const std::int64_t lowest =
      v.window > 0 ? work.first_query + v.batch.max_new_tokens - v.window : 0;
  work.lowest = lowest > 0 ? static_cast<int>(lowest) : 0;
  if (v.layer.phase_steps > 0) {
    auto* const kept = reinterpret_cast<float2*>(work.region + map.centre_offset);
    const int frequencies = 8 * v.layer.phase_steps;
    const float2* const centre = v.centre + segment * frequencies * kColumns;
    for (int i = lane(); i < frequencies * 4 * Blocks; i += kLanes)
      kept[i] = centre[i / (4 * Blocks) * kColumns + i % (4 * Blocks)];
    work.centre = kept;
  }
#pragma unroll
  for (int e = 0; e < Blocks; ++e) {
    const std::int64_t column = segment * kColumns + (lane() & 3) + 4 * e;
    const float2 bias = v.bias[column];
    work.bias[e] = bias.x;
    work.unit[e] = bias.y;
    work.constant[e] = v.layer.k_mean ? v.constant[column] : 0;
  }
  sync_warp();
}

/// Starts to bring pages first .. first + count - 1 of the sequence.
template <int Blocks, class Feed>
KVPLAN_DEVICE void start_pages(const AttentionView& v, const Work<Blocks>& work, Feed& feed,
                               int first, int count) {
  const quant::HeadLayout& head = v.layer.heads[work.head];
  const int frequencies = 8 * v.layer.phase_steps;
  PageList list;
  list.pages = v.layer.pool + head.block_offset;
  list.blocks =
      v.batch.page_table + std::int64_t{v.batch.slot[work.sequence]} * v.batch.table_stride + first;
  list.phases = v.layer.page_phase + std::int64_t{first} * frequencies;
  list.block_bytes = v.layer.block_bytes;
  list.count = count;
  list.key_bytes = key_tile_bytes(head);
  list.rest_bytes = head.page_bytes - list.key_bytes;
  list.phase_bytes = static_cast<std::uint32_t>(frequencies * static_cast<int>(sizeof(float2)));
  feed.start(list);
}

}  // namespace kvplan::kernels
