#pragma once
// The decode kernel around a path, which is how a warp attends to the pages of one segment: what a
// warp works on, and how a block puts its warps' results together. A path has kPages (of a unit),
// kBlocks (of four columns), a Feed (page_feed.cuh) and
//   attend(view, work, feed, running, first page, pages).
// Private to the decode kernels.

#include "kernels/page_feed.cuh"
#include "kernels/partition.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/segment_work.cuh"
#include "kernels/segments.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

// Sums over bytes become sums over levels.
template <int Blocks>
KVPLAN_DEVICE void scale_bytes(const AttentionView& v, const Work<Blocks>& work,
                               const Running<Blocks>& r) {
  const quant::SideLayout& side = v.layer.heads[work.head].v;
  Output<Blocks>* output = work.output + lane();
  for (int i = 0; i < side.run_count; ++i) {
    const quant::TileRun& run = side.runs[i];
    if (run.code == quant::TileCode::kBytes)
      for (int j = 0; j < run.tiles; ++j)
#pragma unroll
        for (int k = 0; k < 2 * Blocks; ++k) {
          float& o = output[j * kLanes].x[k];
          o = run.step * fused(run.byte_offset, r.norms[k / 2], o);
        }
    output += run.tiles * kLanes;
  }
}

KVPLAN_DEVICE std::byte* region_of(const AttentionView& v, int warp_index) {
  return shared_memory() + (v.layer.shared.warp_region - kSharedBase) +
         warp_index * v.layer.shared.warp_bytes;
}
KVPLAN_DEVICE SegmentState& state_of(const AttentionView& v, int warp_index) {
  return *reinterpret_cast<SegmentState*>(region_of(v, warp_index) + v.layer.shared.state_offset);
}

// The block's warps that hold parts of the same segment, merged to the slot of the first of them.
template <int Blocks>
KVPLAN_DEVICE void merge_block(const AttentionView& v) {
  const int warps = threads() / kLanes;
  if (thread() < warps) {
    SegmentState& own = state_of(v, thread());
    int previous = thread() - 1;
    while (previous >= 0 && state_of(v, previous).segment < 0) --previous;
    own.leads = own.segment >= 0 && (previous < 0 || state_of(v, previous).segment != own.segment);
    v.slot_owner[std::int64_t{block()} * warps + thread()] = own.leads != 0 ? own.segment : -1;
  }
  sync_block();
  for (int leader = 0; leader < warps; ++leader) {
    if (state_of(v, leader).leads == 0) continue;
    const int segment = state_of(v, leader).segment;
    const std::int64_t slot = std::int64_t{block()} * warps + leader;
    const int head = segment / v.column_blocks % v.layer.kv_heads;
    const int elements = v.layer.heads[head].v.tiles * kLanes;
    const int column = thread() & 3;
    float m[2] = {kLowest, kLowest};
    for (int w = leader; w < warps; ++w)
      if (state_of(v, w).segment == segment)
        for (int e = 0; e < 2; ++e) m[e] = fmaxf(m[e], state_of(v, w).state[column + 4 * e].x);
    for (int k = thread(); k < elements; k += threads()) {
      float4 sum = {0, 0, 0, 0};
      for (int w = leader; w < warps; ++w) {
        const SegmentState& part = state_of(v, w);
        if (part.segment != segment) continue;
        const float f0 = exp2_fast(part.state[column].x - m[0]);
        const float f1 = exp2_fast(part.state[column + 4].x - m[1]);
        const float4 o = stored(reinterpret_cast<const Output<Blocks>*>(
            region_of(v, w) + v.layer.shared.output_offset)[k]);
        sum = {sum.x + f0 * o.x, sum.y + f0 * o.y, sum.z + f1 * o.z, sum.w + f1 * o.w};
      }
      v.slot_output[slot * v.output_tiles * kLanes + k] = sum;
    }
    if (thread() < 4)
      for (int e = 0; e < 2; ++e) {
        float l = 0;
        for (int w = leader; w < warps; ++w)
          if (state_of(v, w).segment == segment)
            l += exp2_fast(state_of(v, w).state[column + 4 * e].x - m[e]) *
                 state_of(v, w).state[column + 4 * e].y;
        v.slot_state[slot * kColumns + column + 4 * e] = {m[e], l};
      }
  }
}

KVPLAN_DEVICE void fill_shared(const AttentionView& v) {
  const SharedMap& map = v.layer.shared;
  for (int table = 0; table < kMaxLevelTables; ++table) {
    if (map.table_address[table] == 0) continue;
    const int width = map.table_width[table];
    const float* levels = v.layer.levels + 256 * table;
    auto* to = reinterpret_cast<std::uint32_t*>(shared_memory() +
                                                (map.table_address[table] - kSharedBase));
    const int mask = (1 << width) - 1;
    for (int e = thread(); e < table_bytes(width) / 4; e += threads()) {
      const int index = e / kLanes;
      to[e] = width <= kMaxPairWidth ? pack_halves(levels[index & mask], levels[index >> width])
                                     : pack_halves(levels[index], levels[index]);
    }
  }
  const auto copy = [&](int address, const uint4* from) {
    if (address == 0) return;
    auto* to = reinterpret_cast<uint4*>(shared_memory() + (address - kSharedBase));
    for (int i = thread(); i < v.layer.phase_steps * kRows * kLanes; i += threads())
      to[i] = from[i];
  };
  copy(map.rotary_tile, v.layer.rotary_tile);
  copy(map.rotary_tile_low, v.layer.rotary_tile_low);
}

// The units of this warp, segment by segment.
template <class Path>
KVPLAN_DEVICE void attend_stretch(const AttentionView& v) {
  constexpr int Pages = Path::kPages, Blocks = Path::kBlocks;
  const SharedMap& map = v.layer.shared;
  Work<Blocks> work;
  work.region = region_of(v, warp());
  work.query = reinterpret_cast<const uint2*>(work.region + map.query_offset);
  work.output = reinterpret_cast<Output<Blocks>*>(work.region + map.output_offset);
  SegmentState& kept = state_of(v, warp());
  if (lane() == 0) kept.segment = -1;
  typename Path::Feed feed(reinterpret_cast<PageList*>(work.region + map.list_offset),
                           shared_address(work.region + map.barriers_offset),
                           shared_address(work.region + map.feed_offset), map);

  const Partition partition = make_partition(v);
  const std::uint64_t index =
      static_cast<std::uint64_t>(block()) * v.block_warps + static_cast<std::uint64_t>(warp());
  const std::uint64_t begin = partition.begin(index), end = partition.begin(index + 1);
  const std::uint64_t all_costs = sequence_cost(v);
  const int per_sequence = v.layer.kv_heads * v.column_blocks;
  // Sequences that end before the stretch begins are skipped 32 at a time.
  const SequenceStart where = first_sequence(v, begin);
  std::uint64_t segment_start = where.units * all_costs;  // on the line
  for (int sequence = where.sequence; sequence < v.batch.sequences && segment_start < end;
       ++sequence) {
    const SequenceUnits what = sequence_units(v, sequence);
    const auto units = static_cast<std::uint64_t>(what.units());
    for (int inside = 0; inside < per_sequence && segment_start < end; ++inside) {
      work.sequence = sequence;
      work.head = inside / v.column_blocks;
      work.column_block = inside % v.column_blocks;
      work.segment = sequence * per_sequence + inside;
      work.first_query = v.batch.length_before[sequence];
      const std::uint64_t cost = unit_cost(v, work.head);
      const std::uint64_t start = segment_start;
      segment_start += cost * units;
      if (segment_start <= begin) continue;
      // Units first .. last - 1 start in [begin, end).
      const std::uint64_t first = begin > start ? (begin - start + cost - 1) / cost : 0;
      const std::uint64_t last =
          end - start < cost * units ? (end - start + cost - 1) / cost : units;
      if (first >= last) continue;
      const int first_page =
          what.first_page + Pages * (first == 0 ? 0 : static_cast<int>(first) - 1);
      const int end_page = what.first_page + Pages * (static_cast<int>(last) - 1);
      const int pages = (end_page < what.pages ? end_page : what.pages) - first_page;
      if (pages > 0) start_pages(v, work, feed, first_page, pages);
      wait_for_previous_kernel();
      const bool ends = last == units;
      if (lane() == 0) {
        int2& warps = v.segment_warps[work.segment];
        if (first == 0) warps.x = static_cast<int>(index);
        if (ends) warps.y = static_cast<int>(index);
      }
      const bool more =
          ends && segment_start < end && work.segment + 1 < v.batch.sequences * per_sequence;
      const std::int64_t own = std::int64_t{v.decode_blocks} * v.block_warps + work.segment;
      if (ends && lane() == 0) v.slot_owner[own] = more && pages > 0 ? work.segment : -1;
      if (pages == 0) continue;
      load_segment<Blocks>(v, work);
      clear_output(work, v.layer.heads[work.head].v.tiles);
      Running<Blocks> r;
      Path::attend(v, work, feed, r, first_page, pages);
      reduce_masses(r);
      scale_bytes<Blocks>(v, work, r);
      if (more) {
        store_state(v.slot_state + own * kColumns, r);
        const int elements = v.layer.heads[work.head].v.tiles * kLanes;
        for (int k = lane(); k < elements; k += kLanes)
          v.slot_output[own * v.output_tiles * kLanes + k] = stored(work.output[k]);
      } else {
        store_state(kept.state, r);
        if (lane() == 0) kept.segment = work.segment;
      }
      sync_warp();
    }
  }
}

template <class Path>
__global__ void __launch_bounds__(kDecodeWarps* kLanes, 1) decode_kernel(AttentionView v) {
  fill_shared(v);
  sync_block();
  attend_stretch<Path>(v);
  let_next_kernel_start();
  sync_block();
  merge_block<Path::kBlocks>(v);
}

using DecodeKernel = void (*)(AttentionView);

}  // namespace kvplan::kernels
