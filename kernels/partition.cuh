#pragma once
// Which warp of the decode grid works on what. A sequence offers each of its segments (KV head,
// column block) units: unit 0 is a segment's beginning, each other one up to LayerView::unit_pages
// visible packed pages. All units are laid end to end, sequence after sequence, segment after
// segment, each as long as the work on it takes, and the line is cut into equal pieces: warp w owns
// the units that start in piece w.

#include "kernels/ptx.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

/// What a sequence has to read.
struct SequenceUnits {
  int first_page = 0;  // the first that the window lets any query of the step see
  int pages = 0;       // full pages
  int unit_pages = 1;
  KVPLAN_DEVICE int units() const {
    return 1 + (unit_pages == 2 ? (pages - first_page + 1) / 2 : pages - first_page);
  }
};

KVPLAN_DEVICE SequenceUnits sequence_units(const AttentionView& v, int sequence) {
  SequenceUnits u;
  u.unit_pages = v.layer.unit_pages;
  u.pages = full_pages(v.batch.length[sequence], v.layer.sink_tokens);
  if (v.window > 0) {
    const std::int64_t first = v.batch.length_before[sequence] + 1 - v.window - v.layer.sink_tokens;
    const std::int64_t page = first > 0 ? first / quant::kPageTokens : 0;
    u.first_page = page < u.pages ? static_cast<int>(page) : u.pages;
  }
  return u;
}

/// Length of a unit of a KV head, and of one unit of every segment of a sequence.
KVPLAN_DEVICE std::uint32_t unit_cost(const AttentionView& v, int head) {
  return v.layer.costs.head[head];
}
KVPLAN_DEVICE std::uint64_t sequence_cost(const AttentionView& v) {
  return std::uint64_t{v.layer.costs.all} * static_cast<std::uint64_t>(v.column_blocks);
}

/// The line and its pieces. Built by a whole warp.
struct Partition {
  std::uint64_t length = 0;
  std::uint64_t warps = 1;

  KVPLAN_DEVICE std::uint64_t begin(std::uint64_t warp) const { return length * warp / warps; }
};

/// Units of all sequences before `sequence` (all of them: sequence = batch.sequences).
KVPLAN_DEVICE std::uint64_t units_before(const AttentionView& v, int sequence) {
  int units = 0;
  for (int i = lane(); i < sequence; i += quant::kWarpLanes) units += sequence_units(v, i).units();
  for (int step = 1; step < quant::kWarpLanes; step *= 2) units += shuffle_xor(units, step);
  return static_cast<std::uint64_t>(units);
}

KVPLAN_DEVICE Partition make_partition(const AttentionView& v) {
  return {units_before(v, v.batch.sequences) * sequence_cost(v),
          static_cast<std::uint64_t>(v.decode_blocks) * static_cast<std::uint64_t>(v.block_warps)};
}

/// The sequence that holds a position of the line, and the units of all before it. By a whole warp.
struct SequenceStart {
  int sequence = 0;
  std::uint64_t units = 0;
};
KVPLAN_DEVICE SequenceStart first_sequence(const AttentionView& v, std::uint64_t position) {
  SequenceStart start;
  const std::uint64_t cost = sequence_cost(v);
  for (; start.sequence < v.batch.sequences; start.sequence += quant::kWarpLanes) {
    const int mine = start.sequence + lane();
    int until = mine < v.batch.sequences ? sequence_units(v, mine).units() : 0;
    for (int step = 1; step < quant::kWarpLanes; step *= 2) {
      const int before = shuffle(until, lane() - step);
      if (lane() >= step) until += before;
    }
    const std::uint32_t beyond =
        ballot((start.units + static_cast<std::uint64_t>(until)) * cost > position);
    const int skipped = beyond == 0 ? quant::kWarpLanes : first_bit(beyond);
    if (skipped > 0) start.units += static_cast<std::uint64_t>(shuffle(until, skipped - 1));
    if (beyond != 0) {
      start.sequence += skipped;
      break;
    }
  }
  return start;
}

}  // namespace kvplan::kernels
