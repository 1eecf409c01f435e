#pragma once
// What the warps of a block have found of its pieces, put together; segments of which the block is
// the last to arrive are finished: parts of blocks merged, out of the transform of the values by
// the head's synthesis matrix, plus the mean and the fp16 tokens. Private to the decode kernels.

#include <bit>
#include <cmath>

#include "kernels/block_memory.cuh"
#include "kernels/page_access.cuh"
#include "kernels/ptx.cuh"
#include "kernels/round.cuh"
#include "kernels/scores.cuh"
#include "kernels/transform.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

/// Slot of what this block has of piece `p`.
KVPLAN_DEVICE int part_slot(const Piece& piece, int p) {
  const int part = piece.whole() ? kWhole + p : piece.begin > 0 ? kContinued : kBegun;
  return block() * quant::kBlockParts + part;
}
/// Outputs of a slot.
template <int Blocks>
KVPLAN_DEVICE Output<Blocks>* part_output(const AttentionView& v, int slot) {
  return reinterpret_cast<Output<Blocks>*>(v.part_output) +
         std::int64_t{slot} * v.output_tiles * quant::kWarpLanes;
}

/// Calls visit(piece index, tile, whether it is there) for the V tiles of the pieces that are
/// this warp's to do; of values without tiles for tile 0.
template <class Visit>
KVPLAN_DEVICE void for_value_tiles(const AttentionView& v, const Round& round, Visit visit) {
  int next = warp();
  for (int p = 0; p < round.count; ++p) {
    const int there = v.layer.heads[round.pieces[p].head].v.tiles, tiles = there > 0 ? there : 1;
    for (; next < tiles; next += warps_of_block()) visit(p, next, next < there);
    next -= tiles;
  }
}

/// The parts of the block's warps, merged to the slots of the pieces.
template <int Blocks>
KVPLAN_DEVICE void merge_warps(const AttentionView& v, const BlockMemory<Blocks>& memory) {
  const Round& round = memory.round();
  const int t = lane() % 4;
  const int held = lane() < warps_of_block() ? memory.state(lane()).piece : -1;
  for_value_tiles(v, round, [&](int p, int tile, bool there) {
    const std::uint32_t holders = ballot(held == p);
    const int aside = block() * quant::kBlockParts + kAside + p;
    const bool has_aside = round.aside[p] != 0;
    float m[Blocks], l[Blocks] = {};
    float2 kept[Blocks];
#pragma unroll
    for (int e = 0; e < Blocks; ++e) {
      kept[e] = has_aside ? v.part_state[aside * kColumns + t + 4 * e] : float2{kLowest, 0};
      m[e] = kept[e].x;
    }
    for (std::uint32_t left = holders; left != 0; left &= left - 1)
#pragma unroll
      for (int e = 0; e < Blocks; ++e)
        m[e] = fmaxf(m[e], memory.state(first_bit(left)).state[t + 4 * e].x);
    Output<Blocks> sum = {};
    const auto add = [&](const Output<Blocks>& o, int e, float2 state) {
      const float factor = exp2_fast(state.x - m[e]);
      l[e] = fused(factor, state.y, l[e]);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        sum.x[2 * e + h] = fused(factor, o.x[2 * e + h], sum.x[2 * e + h]);
    };
    const int element = tile * quant::kWarpLanes + lane();
    if (has_aside) {
      const Output<Blocks> o = there ? part_output<Blocks>(v, aside)[element] : Output<Blocks>{};
#pragma unroll
      for (int e = 0; e < Blocks; ++e) add(o, e, kept[e]);
    }
    for (std::uint32_t left = holders; left != 0; left &= left - 1) {
      const int w = first_bit(left);
      const Output<Blocks> o = there ? memory.output(w)[element] : Output<Blocks>{};
#pragma unroll
      for (int e = 0; e < Blocks; ++e) add(o, e, memory.state(w).state[t + 4 * e]);
    }
    const int slot = part_slot(round.pieces[p], p);
    if (there) part_output<Blocks>(v, slot)[element] = sum;
    if (tile == 0 && lane() < 4)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        v.part_state[slot * kColumns + t + 4 * e] =
            e < Blocks ? float2{m[e % Blocks], l[e % Blocks]} : float2{kLowest, 0};
  });
}

/// Where results are put together, once the feeds are at rest.
template <int Blocks>
struct Results {
  const BlockMemory<Blocks>& memory;
  ResultMemory map;

  KVPLAN_DEVICE Results(const AttentionView& v, const BlockMemory<Blocks>& block_memory)
      : memory(block_memory),
        map(v.layer.head_dim, BlockMemory<Blocks>::kColumnsKept, memory.map.most_pieces) {}

  KVPLAN_DEVICE float* merged(int piece, int column) const {
    return at<float>(map.merged) + (piece * map.columns + column) * map.stride;
  }
  KVPLAN_DEVICE float* direct(int piece, int column) const {
    return at<float>(map.direct) + (piece * map.columns + column) * map.stride;
  }
  KVPLAN_DEVICE float* most(int piece) const { return at<float>(map.most) + piece * kColumns; }
  KVPLAN_DEVICE ResultColumn* terms(int piece) const {
    return at<ResultColumn>(map.terms) + piece * kColumns;
  }
  KVPLAN_DEVICE std::uint16_t* slots(int piece) const {
    return at<std::uint16_t>(map.slots) + piece * kMaxBlocks;
  }
  KVPLAN_DEVICE int& slot_count(int piece) const { return at<int>(map.counts)[piece]; }

 private:
  template <class T>
  KVPLAN_DEVICE T* at(int offset) const {
    return memory.template at<T>(memory.map.feeds + offset);
  }
};

template <int Blocks>
KVPLAN_DEVICE void clear_results(const Results<Blocks>& results, int pieces) {
  const int floats = pieces * results.map.columns * results.map.stride;
  for (int i = thread(); i < floats; i += threads())
    results.merged(0, 0)[i] = results.direct(0, 0)[i] = 0;
  for (int i = thread(); i < pieces * kColumns; i += threads()) results.most(0)[i] = 0;
}

/// The slots of the segments' parts in the order of blocks. A warp does a piece.
template <int Blocks>
KVPLAN_DEVICE void list_slots(const AttentionView& v, const Round& round,
                              const Results<Blocks>& results) {
  for (int p = warp(); p < round.count; p += warps_of_block()) {
    const Piece& piece = round.pieces[p];
    std::uint16_t* const slots = results.slots(p);
    int count = 0;
    if (piece.whole()) {
      if (lane() == 0) slots[0] = static_cast<std::uint16_t>(part_slot(piece, p));
      count = 1;
    } else {
      const WorkCosts& costs = v.layer.costs;
      const std::uint32_t length = segment_length(costs, piece);
      const Cut cut(round.line, static_cast<std::uint32_t>(v.decode_blocks));
      const int first = static_cast<int>(cut.holder(piece.start));
      const int last = static_cast<int>(cut.holder(piece.start + length - 1));
#pragma unroll 1
      for (int base = first; base <= last; base += quant::kWarpLanes) {
        const int b = base + lane();
        int begin = 0, end = 0;
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
          const int units =
              units_before(costs, piece, cut.begin(static_cast<std::uint32_t>(b + i)));
          (i == 0 ? begin : end) = units;
        }
        const bool has = b <= last && begin < end;
        const std::uint32_t found = ballot(has);
        if (has)
          slots[count + std::popcount(found & ((1u << lane()) - 1))] = static_cast<std::uint16_t>(
              b * quant::kBlockParts + (begin > 0 ? kContinued : kBegun));
        count += std::popcount(found);
      }
    }
    if (lane() == 0) results.slot_count(p) = count;
  }
}

/// Tells which segments are complete: whose last units are this block's. The units of the others
/// are counted, and the last block to count finds all there.
KVPLAN_DEVICE void arrive(const AttentionView& v, Round& round) {
  fence_device();
  sync_block();
  if (thread() < round.count) {
    const Piece& piece = round.pieces[thread()];
    bool finishes = true;
    if (!piece.whole()) {
      std::int32_t& arrived = v.arrived[piece.segment];
      const int units = piece.end - piece.begin;
      finishes = add_atomic(arrived, units) + units == piece.units();
      if (finishes) arrived = 0;
      fence_device();
    }
    round.finishes[thread()] = finishes ? 1 : 0;
  }
  sync_block();
}

/// Sums relative to their maximum.
struct Mass {
  float m = kLowest, l = 0;
  KVPLAN_DEVICE void add(float2 state) {
    const float top = fmaxf(m, state.x);
    l = fused(l, exp2_fast(m - top), state.y * exp2_fast(state.x - top));
    m = top;
  }
};

/// The terms of the columns of finished segments, and lse. A warp does a piece, lane = column + 8
/// part.
template <int Blocks>
KVPLAN_DEVICE void finish_columns(const AttentionView& v, const Round& round,
                                  const Results<Blocks>& results) {
  constexpr int kShare = quant::kWarpLanes / kColumns;  // lanes of a column
  for (int p = warp(); p < round.count; p += warps_of_block()) {
    if (round.finishes[p] == 0) continue;
    const Piece& piece = round.pieces[p];
    const int c = lane() % kColumns, first = lane() / kColumns;
    const std::uint16_t* const slots = results.slots(p);
    const int count = results.slot_count(p);
    Mass packed, plain;
#pragma unroll 4
    for (int i = first; i < count; i += kShare) packed.add(v.part_state[slots[i] * kColumns + c]);
    const float2* const states =
        v.plain_state + std::int64_t{piece.segment} * v.plain_chunks * kColumns + c;
#pragma unroll 2
    for (int i = first; i < piece.chunks; i += kShare) plain.add(states[i * kColumns]);
#pragma unroll
    for (int step = kColumns; step < quant::kWarpLanes; step *= 2) {
      packed.add({shuffle_xor(packed.m, step), shuffle_xor(packed.l, step)});
      plain.add({shuffle_xor(plain.m, step), shuffle_xor(plain.l, step)});
    }
    if (first > 0 || c >= columns_in_use(v)) continue;
    const float maximum = fmaxf(packed.m, plain.m);
    const float factor = packed.l > 0 ? exp2_fast(packed.m - maximum) : 0;
    const float mass = factor * packed.l;
    const float total = fused(plain.l, exp2_fast(plain.m - maximum), mass);
    results.terms(p)[c] = {factor, maximum, mass, total > 0 ? 1 / total : 0};
    constexpr float kLn2 = 0.693147180559945309417f;
    const int row = round.rows[p][c];
    if (v.lse != nullptr && row >= 0) v.lse[row] = kLn2 * (maximum + std::log2(total));
  }
}

/// A tile of values of a head.
struct ValueTile {
  quant::TileCode code;
  int coordinate, coordinates;
};
KVPLAN_DEVICE ValueTile value_tile(const quant::SideLayout& values, int tile) {
  int r = 0;
  for (; tile >= values.runs[r].tiles; ++r) tile -= values.runs[r].tiles;
  const quant::TileRun& run = values.runs[r];
  const int coordinates = quant::tile_coordinates(run.half != 0);
  return {run.code, run.coordinate + tile * coordinates, coordinates};
}

/// Sums over the parts of finished segments, relative to the maximum of the packed tokens: merged,
/// outlier channels and fp16 heads to `direct`.
template <int Blocks>
KVPLAN_DEVICE void merge_parts(const AttentionView& v, const Round& round,
                               const Results<Blocks>& results) {
  constexpr int kTogether = 4;  // slots, a group of four lanes each
  const int g = lane() / 4, t = lane() % 4, columns = columns_in_use(v);
  for_value_tiles(v, round, [&](int p, int tile, bool there) {
    if (!there || round.finishes[p] == 0) return;
    const std::uint16_t* const slots = results.slots(p);
    const int count = results.slot_count(p);
    const auto state = [&](int i, int e) {
      return i < count ? v.part_state[slots[i] * kColumns + t + 4 * e] : float2{kLowest, 0};
    };
    float m[Blocks];
#pragma unroll
    for (int e = 0; e < Blocks; ++e) {
      m[e] = kLowest;
#pragma unroll 2
      for (int i = g; i < count; i += kTogether) m[e] = fmaxf(m[e], state(i, e).x);
#pragma unroll
      for (int step = 4; step < quant::kWarpLanes; step *= 2)
        m[e] = fmaxf(m[e], shuffle_xor(m[e], step));
    }
    Output<Blocks> sum = {};
#pragma unroll 1
    for (int base = 0; base < count; base += kTogether) {
      Output<Blocks> o[kTogether];
      float weight[Blocks];
#pragma unroll
      for (int e = 0; e < Blocks; ++e) {
        const float2 one = state(base + g, e);
        weight[e] = one.y > 0 ? exp2_fast(one.x - m[e]) : 0;
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        o[k] = base + k < count
                   ? part_output<Blocks>(v, slots[base + k])[tile * quant::kWarpLanes + lane()]
                   : Output<Blocks>{};
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
#pragma unroll
        for (int e = 0; e < Blocks; ++e) {
          const float factor = shuffle(weight[e], 4 * k + t);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            sum.x[2 * e + h] = fused(factor, o[k].x[2 * e + h], sum.x[2 * e + h]);
        }
    }
    const int head = round.pieces[p].head;
    const ValueTile to = value_tile(v.layer.heads[head].v, tile);
    const bool outliers = to.code == quant::TileCode::kInteger;
    const bool transformed = !outliers && to.code != quant::TileCode::kHalf;
#pragma unroll
    for (int e = 0; e < Blocks; ++e) {
      const int column = t + 4 * e;
      float most = 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = g + 8 * h, at = to.coordinate + row;
        if (row >= to.coordinates || column >= columns) continue;
        const float x = sum.x[2 * e + h];
        if (transformed) {
          results.merged(p, column)[at] = x;
          most = fmaxf(most, fabsf(x));
        } else {
          const int channel =
              outliers ? v.layer.encoders[kValues * v.layer.kv_heads + head].outliers[at] : at;
          results.direct(p, column)[channel] = x;
        }
      }
#pragma unroll
      for (int step = 4; step < quant::kWarpLanes; step *= 2)
        most = fmaxf(most, shuffle_xor(most, step));
      if (g == 0 && most > 0) max_atomic(results.most(p)[column], most);
    }
  });
}

/// Outputs of a column at the channels of multiply_tile.
struct ColumnOutput {
  PassColumn of;
  float x[4];
};

/// Adds the fp16 tokens.
template <int Blocks>
KVPLAN_DEVICE void add_plain(const AttentionView& v, const Piece& piece, const ResultColumn& terms,
                             int tile, ColumnOutput& o) {
  constexpr int kTogether = 4;
  const int d = v.layer.head_dim, channel = 16 * tile + 2 * (lane() % 4);
  const std::int64_t segment = std::int64_t{piece.segment} * v.plain_chunks;
#pragma unroll 1
  for (int base = 0; base < piece.chunks; base += kTogether) {
    float weight[kTogether];
    float2 pairs[kTogether][2];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const float2 state = base + k < piece.chunks
                               ? v.plain_state[(segment + base + k) * kColumns + o.of.column]
                               : float2{kLowest, 0};
      weight[k] = state.y > 0 ? exp2_fast(state.x - terms.maximum) : 0;
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* const from = v.plain_output +
                                  ((segment + base + k) * (4 * Blocks) + o.of.column) * d +
                                  channel + 8 * h;
        pairs[k][h] = weight[k] > 0 && channel + 8 * h < d ? *reinterpret_cast<const float2*>(from)
                                                           : float2{0, 0};
      }
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        o.x[2 * h] = fused(weight[k], pairs[k][h].x, o.x[2 * h]);
        o.x[2 * h + 1] = fused(weight[k], pairs[k][h].y, o.x[2 * h + 1]);
      }
  }
}

/// Finished segments, out of the transform. A warp makes 16 channels of the columns of a pass.
template <int Blocks>
KVPLAN_DEVICE void store_outputs(const AttentionView& v, const Round& round,
                                 const Results<Blocks>& results) {
  const int d = v.layer.head_dim, tiles = matrix_tiles(d), g = lane() / 4, t = lane() % 4;
  for_pass_tiles(round, tiles, warps_of_block(), [&](int pass, int tile) {
    const int head = round.pieces[round.pass_begin[pass]].head;
    ColumnOutput columns[2] = {{{v, round, pass, g}, {}}, {{v, round, pass, g + 8}, {}}};
    const float* merged[2];
    float inverse[2], most[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      PassColumn& c = columns[i].of;
      const bool there = c.row >= 0 && round.finishes[c.piece] != 0;
      if (!there) c.row = -1;
      merged[i] = there ? results.merged(c.piece, c.column) + 2 * t : nullptr;
      most[i] = there ? results.most(c.piece)[c.column] : 0;
      inverse[i] = most[i] > 0 ? reciprocal_fast(most[i]) : 0;
    }
    if (!any(columns[0].of.row >= 0 || columns[1].of.row >= 0)) return;
    float sums[2][4] = {};
    if (!v.layer.fp16[kValues].has(head)) {
      multiply_tile(
          v.layer.v_matrix + std::int64_t{head} * tiles * tiles * 2 * quant::kWarpLanes, tiles,
          tile, [](int step) { return step; },
          [&](int step, std::uint32_t(&a)[4], std::uint32_t(&rest)[4]) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const int i = k % 2;
              const float2 x =
                  merged[i] != nullptr
                      ? *reinterpret_cast<const float2*>(merged[i] + 16 * step + 8 * (k / 2))
                      : float2{0, 0};
              const float low = x.x * inverse[i], high = x.y * inverse[i];
              a[k] = pack_halves(low, high);
              rest[k] = pack_halves((low - low_half(a[k])) * kLowScale,
                                    (high - high_half(a[k])) * kLowScale);
            }
          },
          sums);
    }
    const float scale = v.layer.matrix_scales[head].y;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      ColumnOutput o = i == 0 ? columns[0] : columns[1];
      if (o.of.row < 0) continue;
      const ResultColumn terms = results.terms(o.of.piece)[o.of.column];
      const float* const direct = results.direct(o.of.piece, o.of.column) + 16 * tile;
      const float factor = (i == 0 ? most[0] : most[1]) * scale;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        o.x[k] =
            terms.packed * fused(factor, i == 0 ? sums[0][k] : sums[1][k], direct[tile_row(k)]);
      add_plain<Blocks>(v, round.pieces[o.of.piece], terms, tile, o);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int channel = 16 * tile + 2 * t + 8 * h;
        if (channel >= d) continue;
        float x = o.x[2 * h], y = o.x[2 * h + 1];
        if (v.layer.v_mean != nullptr) {
          const auto mean = *reinterpret_cast<const float2*>(v.layer.v_mean + head * d + channel);
          x = fused(mean.x, terms.mass, x), y = fused(mean.y, terms.mass, y);
        }
        x *= terms.inverse, y *= terms.inverse;
        const std::int64_t at = std::int64_t{o.of.row} * d + channel;
        if (v.out != nullptr) *reinterpret_cast<std::uint32_t*>(v.out + at) = pack_halves(x, y);
        if (v.out_float != nullptr) *reinterpret_cast<float2*>(v.out_float + at) = {x, y};
      }
    }
  });
}

/// What the warps have found, to memory; the segments that are complete, to the outputs. By the
/// block, all of whose warps are done.
template <int Blocks>
KVPLAN_DEVICE void leave_results(const AttentionView& v, const BlockMemory<Blocks>& memory) {
  Round& round = memory.round();
  const Results<Blocks> results(v, memory);
  clear_results(results, round.count);
  list_slots(v, round, results);
  merge_warps(v, memory);
  arrive(v, round);
  finish_columns(v, round, results);
  merge_parts(v, round, results);
  sync_block();
  store_outputs(v, round, results);
}

}  // namespace kvplan::kernels
