// Decode attention straight from packed pages.
//
// A persistent grid, one block per multiprocessor. A warp owns a stretch of units (partition.cuh)
// and works alone: it takes kUnitPages pages of a segment at a time, brings their tiles to
// registers, turns codes into operands of mma.sync, and keeps maximum and mass of its 8 columns in
// registers, outputs in shared memory (so that head_dim and the mix of widths are run-time values).
// At the end a block merges what its warps hold of the same segment; `finish` merges the blocks.
//
// Per page of 64 tokens and pair of levels: one shift, one LOP3, one look-up in shared memory (32
// lanes, no conflicts); widths 1 and 2 (uniform) need no look-up. Registers: 168, 384 threads, one
// block per multiprocessor. Measurements and what was tried: docs/performance.md.

#include "kernels/packed_attention.cuh"
#include "kernels/partition.cuh"
#include "kernels/plain_attention.cuh"
#include "kernels/ptx.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {
namespace {

// What the offsets of kUniform codes added, taken out; the step.
KVPLAN_DEVICE void correct_uniform(const AttentionView& v, const Work& work, const Running& r) {
  const quant::SideLayout& side = v.layer.heads[work.head].v;
  float4* output = work.output;
  for (int i = 0; i < side.run_count; ++i) {
    const quant::TileRun& run = side.runs[i];
    if (run.code == quant::TileCode::kUniform)
      for (int j = 0; j < run.tiles; ++j) {
        float4& o = output[j * kLanes + lane()];
        o = {(o.x - r.codes[0]) * run.step, (o.y - r.codes[1]) * run.step,
             (o.z - r.codes[2]) * run.step, (o.w - r.codes[3]) * run.step};
      }
    output += run.tiles * kLanes;
  }
}

KVPLAN_DEVICE SegmentState& state_of(const AttentionView& v, int warp_index) {
  return *reinterpret_cast<SegmentState*>(
      shared_memory() + (v.layer.shared.warp_region - kSharedBase) +
      warp_index * v.layer.shared.warp_bytes + v.layer.shared.state_offset);
}

// The block's warps that hold parts of the same segment, merged to the slot of the first of them.
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
    const int column = 2 * (thread() & 3);
    float m[2] = {kLowest, kLowest};
    for (int w = leader; w < warps; ++w)
      if (state_of(v, w).segment == segment)
        for (int e = 0; e < 2; ++e) m[e] = fmaxf(m[e], state_of(v, w).state[column + e].x);
    for (int k = thread(); k < elements; k += threads()) {
      float4 sum = {0, 0, 0, 0};
      for (int w = leader; w < warps; ++w) {
        const SegmentState& part = state_of(v, w);
        if (part.segment != segment) continue;
        const float f0 = exp2_fast(part.state[column].x - m[0]);
        const float f1 = exp2_fast(part.state[column + 1].x - m[1]);
        const float4 o = reinterpret_cast<const float4*>(
            shared_memory() + (v.layer.shared.warp_region - kSharedBase) +
            w * v.layer.shared.warp_bytes + v.layer.shared.output_offset)[k];
        sum = {sum.x + f0 * o.x, sum.y + f1 * o.y, sum.z + f0 * o.z, sum.w + f1 * o.w};
      }
      v.slot_output[slot * v.output_tiles * kLanes + k] = sum;
    }
    if (thread() < 4)
      for (int e = 0; e < 2; ++e) {
        float l = 0;
        for (int w = leader; w < warps; ++w)
          if (state_of(v, w).segment == segment)
            l += exp2_fast(state_of(v, w).state[column + e].x - m[e]) *
                 state_of(v, w).state[column + e].y;
        v.slot_state[slot * kColumns + column + e] = {m[e], l};
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
template <int Pages, bool Outliers>
KVPLAN_DEVICE void attend_stretch(const AttentionView& v) {
  const SharedMap& map = v.layer.shared;
  Work work;
  work.region = shared_memory() + (map.warp_region - kSharedBase) + warp() * map.warp_bytes;
  work.query = reinterpret_cast<const uint2*>(work.region + map.query_offset);
  work.output = reinterpret_cast<float4*>(work.region + map.output_offset);
  SegmentState& kept = state_of(v, warp());
  if (lane() == 0) kept.segment = -1;
  sync_warp();

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
      if (first == 0) attend_plain(v, work);
      const int first_page =
          what.first_page + kUnitPages * (first == 0 ? 0 : static_cast<int>(first) - 1);
      const int end_page = what.first_page + kUnitPages * (static_cast<int>(last) - 1);
      const int pages = (end_page < what.pages ? end_page : what.pages) - first_page;
      const bool ends = last == units;
      const bool more =
          ends && segment_start < end && work.segment + 1 < v.batch.sequences * per_sequence;
      const std::int64_t own = std::int64_t{v.decode_blocks} * v.block_warps + work.segment;
      if (ends && lane() == 0) v.slot_owner[own] = more && pages > 0 ? work.segment : -1;
      if (pages == 0) continue;
      load_segment(v, work);
      clear_output(work, v.layer.heads[work.head].v.tiles);
      Running r;
      attend_pages<Pages, Outliers>(v, work, r, first_page, pages);
      reduce_masses(r);
      correct_uniform(v, work, r);
      if (more) {
        store_state(v.slot_state + own * kColumns, r);
        const int elements = v.layer.heads[work.head].v.tiles * kLanes;
        for (int k = lane(); k < elements; k += kLanes)
          v.slot_output[own * v.output_tiles * kLanes + k] = work.output[k];
      } else {
        store_state(kept.state, r);
        if (lane() == 0) kept.segment = work.segment;
      }
      sync_warp();
    }
  }
}

template <int Pages, bool Outliers>
__global__ void __launch_bounds__(kDecodeWarps* kLanes, 1) decode_kernel(AttentionView v) {
  fill_shared(v);
  wait_for_previous_kernel();
  sync_block();
  attend_stretch<Pages, Outliers>(v);
  let_next_kernel_start();
  sync_block();
  merge_block(v);
}

}  // namespace

cudaError_t configure_decode(std::size_t shared_bytes) {
  const cudaError_t e = allow_shared(decode_kernel<kUnitPages, false>, shared_bytes);
  return e == cudaSuccess ? allow_shared(decode_kernel<1, true>, shared_bytes) : e;
}

cudaError_t decode(const AttentionView& view, cudaStream_t stream) {
  LaunchShape shape;
  shape.blocks = view.decode_blocks;
  shape.threads = view.block_warps * kLanes;
  shape.shared_bytes = view.layer.shared_bytes;
  shape.stream = stream;
  shape.overlap = true;
  return view.layer.outliers ? launch(decode_kernel<1, true>, shape, view)
                             : launch(decode_kernel<kUnitPages, false>, shape, view);
}

}  // namespace kvplan::kernels
