#pragma once
// Which warp of the decode grid works on what. A sequence offers each of its segments (KV head,
// column block) units: unit 0 is the fp16 tokens, each other one up to LayerView::unit_pages
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
  /// The warp whose piece holds `position` < length.
  KVPLAN_DEVICE int owner(std::uint64_t position) const {
    auto w = (position * warps) / length;  // begin(w) <= position, off by rounding at most
    while (w + 1 < warps && begin(w + 1) <= position) ++w;
    while (w > 0 && begin(w) > position) --w;
    return static_cast<int>(w);
  }
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

/// Where the units of segment (sequence, segment_in_sequence) start on the line; `before` =
/// units_before(sequence).
KVPLAN_DEVICE std::uint64_t segment_begin(const AttentionView& v, std::uint64_t before, int units,
                                          int segment_in_sequence) {
  std::uint64_t costs = 0;
  for (int s = 0; s < segment_in_sequence; ++s) costs += unit_cost(v, s / v.column_blocks);
  return before * sequence_cost(v) + costs * static_cast<std::uint64_t>(units);
}

/// First and last warp that own units of a segment. For `finish`; called by a whole warp.
struct WarpRange {
  int first = 0, last = 0;
};
KVPLAN_DEVICE WarpRange segment_warps(const AttentionView& v, const Partition& partition,
                                      int segment) {
  const int per_sequence = v.layer.kv_heads * v.column_blocks;
  const int sequence = segment / per_sequence, inside = segment % per_sequence;
  const int units = sequence_units(v, sequence).units();
  const std::uint64_t begin = segment_begin(v, units_before(v, sequence), units, inside);
  const std::uint64_t cost = unit_cost(v, inside / v.column_blocks);
  return {partition.owner(begin),
          partition.owner(begin + cost * static_cast<std::uint64_t>(units - 1))};
}

}  // namespace kvplan::kernels
