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

/// Slot of what this block has of a shared segment.
KVPLAN_DEVICE int part_slot(const Piece& piece) {
  return block() * quant::kBlockParts + (piece.begin > 0 ? kContinued : kBegun);
}
/// Outputs of a slot.
template <int Blocks>
KVPLAN_DEVICE Output<Blocks>* part_output(const AttentionView& v, int slot) {
  return reinterpret_cast<Output<Blocks>*>(v.part_output) +
         std::int64_t{slot} * v.output_tiles * quant::kWarpLanes;
}
/// Written by any block.
KVPLAN_DEVICE Output<1> load_output(const Output<1>* from) {
  const float2 x = load_written(reinterpret_cast<const float2*>(from));
  return {{x.x, x.y}};
}
KVPLAN_DEVICE Output<2> load_output(const Output<2>* from) {
  const float4 x = load_written(reinterpret_cast<const float4*>(from));
  return {{x.x, x.y, x.z, x.w}};
}

/// Calls visit(piece index, tile, whether it is there) for the V tiles of the pieces that are
/// this warp's to do; of values without tiles for tile 0.
template <class Visit>
KVPLAN_DEVICE void for_value_tiles(const AttentionView& v, const Round& round, Visit visit) {
  int next = warp();
#pragma unroll 1
  for (int p = 0; p < round.count; ++p) {
    const int there = v.layer.heads[round.pieces[p].head].v.tiles, tiles = there > 0 ? there : 1;
#pragma unroll 1
    for (; next < tiles; next += warps_of_block()) visit(p, next, next < there);
    next -= tiles;
  }
}

/// Where results are put together, once the feeds are at rest.
template <int Blocks>
struct Results {
  const BlockMemory<Blocks>& memory;
  ResultMemory map;

  KVPLAN_DEVICE Results(const AttentionView& v, const BlockMemory<Blocks>& block_memory)
      : memory(block_memory),
        map(v.layer.head_dim, BlockMemory<Blocks>::kColumnsKept, memory.map.most_pieces,
            has_direct(v.layer.codes)) {}

  KVPLAN_DEVICE float* merged(int piece, int column) const {
    return row(map.merged, piece, column);
  }
  KVPLAN_DEVICE float* plain(int piece, int column) const { return row(map.plain, piece, column); }
  KVPLAN_DEVICE float* direct(int piece, int column) const {
    return row(map.direct, piece, column);
  }
  KVPLAN_DEVICE float2* states(int piece) const {
    return at<float2>(map.states) + piece * kColumns;
  }
  KVPLAN_DEVICE ResultColumn* terms(int piece) const {
    return at<ResultColumn>(map.terms) + piece * kColumns;
  }
  KVPLAN_DEVICE std::uint16_t* slots(int piece) const {
    return at<std::uint16_t>(map.slots) + piece * kMaxBlocks;
  }
  KVPLAN_DEVICE int& slot_count(int piece) const { return at<int>(map.counts)[piece]; }

 private:
  KVPLAN_DEVICE float* row(int array, int piece, int column) const {
    return at<float>(array) + (piece * map.columns + column) * map.stride;
  }
  template <class T>
  KVPLAN_DEVICE T* at(int offset) const {
    return memory.template at<T>(memory.map.feeds + offset);
  }
};

template <int Blocks>
KVPLAN_DEVICE void clear_direct(const Results<Blocks>& results, int pieces) {
  const int floats = pieces * results.map.columns * results.map.stride;
  for (int i = thread(); i < floats; i += threads()) results.direct(0, 0)[i] = 0;
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

/// Keeps the merged outputs of a tile: `merged`, outlier channels and fp16 heads in `direct`.
template <int Blocks>
KVPLAN_DEVICE void keep_tile(const AttentionView& v, Round& round, const Results<Blocks>& results,
                             int p, int tile, const Output<Blocks>& sum, const Place& me) {
  const int g = me.g, t = me.t, columns = columns_in_use(v);
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
    if (g == 0 && most > 0) max_atomic(round.most[p][column], most);
  }
}

/// The parts of the block's warps, merged: of whole segments to shared memory, of others to their
/// slots.
template <int Blocks>
KVPLAN_DEVICE void merge_warps(const AttentionView& v, const BlockMemory<Blocks>& memory,
                               const Results<Blocks>& results) {
  Round& round = memory.round();
  const Place me;
  const int t = me.t;
  const int held = me.lane < warps_of_block() ? memory.state(me.lane).piece : -1;
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
    const int element = tile * quant::kWarpLanes + me.lane;
    Output<Blocks> of_aside = {};
    if (has_aside && there) of_aside = part_output<Blocks>(v, aside)[element];
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
    if (has_aside)
#pragma unroll
      for (int e = 0; e < Blocks; ++e) add(of_aside, e, kept[e]);
    for (std::uint32_t left = holders; left != 0; left &= left - 1) {
      const int w = first_bit(left);
      const Output<Blocks> o = there ? memory.output(w)[element] : Output<Blocks>{};
#pragma unroll
      for (int e = 0; e < Blocks; ++e) add(o, e, memory.state(w).state[t + 4 * e]);
    }
    const Piece& piece = round.pieces[p];
    const int slot = part_slot(piece);
    if (there) {
      if (piece.whole())
        keep_tile(v, round, results, p, tile, sum, me);
      else
        part_output<Blocks>(v, slot)[element] = sum;
    }
    if (tile == 0 && me.lane < 4) {
      float2* const states =
          piece.whole() ? results.states(p) : v.part_state + std::int64_t{slot} * kColumns;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        states[t + 4 * e] = e < Blocks ? float2{m[e % Blocks], l[e % Blocks]} : float2{kLowest, 0};
    }
  });
}

/// The slots of a shared segment's parts in the order of blocks. Pieces go to the last warps first:
/// the first ones merge.
template <int Blocks>
KVPLAN_DEVICE void list_slots(const AttentionView& v, const Round& round,
                              const Results<Blocks>& results) {
#pragma unroll 1
  for (int p = warps_of_block() - 1 - warp(); p < round.count; p += warps_of_block()) {
    const Piece& piece = round.pieces[p];
    if (piece.whole()) continue;
    std::uint16_t* const slots = results.slots(p);
    int count = 0;
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
        const int units = units_before(costs, piece, cut.begin(static_cast<std::uint32_t>(b + i)));
        (i == 0 ? begin : end) = units;
      }
      const bool has = b <= last && begin < end;
      const std::uint32_t found = ballot(has);
      if (has)
        slots[count + std::popcount(found & ((1u << lane()) - 1))] =
            static_cast<std::uint16_t>(b * quant::kBlockParts + (begin > 0 ? kContinued : kBegun));
      count += std::popcount(found);
    }
    if (lane() == 0) results.slot_count(p) = count;
  }
}

/// Tells which segments are complete: whose last units are this block's. The units of the others
/// are counted, and the last block to count finds all there.
KVPLAN_DEVICE void arrive(const AttentionView& v, Round& round) {
  sync_block();
  if (round.all_whole != 0) return;
  if (thread() < round.count && !round.pieces[thread()].whole()) {
    const Piece& piece = round.pieces[thread()];
    std::int32_t& arrived = v.arrived[piece.segment];
    const int units = piece.end - piece.begin;
    fence_device();
    const bool finishes = add_atomic(arrived, units) + units == piece.units();
    fence_device();
    if (finishes) arrived = 0;
    round.finishes[thread()] = finishes ? 1 : 0;
  }
  sync_block();
}

/// Sums over the parts of finished shared segments, relative to the maximum of the packed tokens.
template <int Blocks>
KVPLAN_DEVICE void merge_parts(const AttentionView& v, Round& round,
                               const Results<Blocks>& results) {
  constexpr int kTogether = 8;  // slots: four lanes hold the states of one
  const Place me;
  const int g = me.g, t = me.t;
  for_value_tiles(v, round, [&](int p, int tile, bool there) {
    if (round.finishes[p] == 0 || round.pieces[p].whole()) return;
    const std::uint16_t* const slots = results.slots(p);
    const int count = results.slot_count(p);
    float m[Blocks], l[Blocks] = {};
#pragma unroll
    for (int e = 0; e < Blocks; ++e) m[e] = kLowest;
    Output<Blocks> sum = {};
#pragma unroll 1
    for (int base = 0; base < count; base += kTogether) {
      Output<Blocks> o[kTogether];
      float2 states[Blocks];
      // All loads of a group are on the way together. Behind the last slot it comes again, without
      // weight.
#pragma unroll
      for (int e = 0; e < Blocks; ++e) {
        states[e] = {kLowest, 0};
        if (base + g < count)
          states[e] = load_written(v.part_state + slots[base + g] * kColumns + t + 4 * e);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int slot = slots[base + k < count ? base + k : base];
        o[k] = there
                   ? load_output(part_output<Blocks>(v, slot) + tile * quant::kWarpLanes + me.lane)
                   : Output<Blocks>{};
      }
      float weight[Blocks];
#pragma unroll
      for (int e = 0; e < Blocks; ++e) {
        float top = fmaxf(m[e], states[e].x);
#pragma unroll
        for (int step = 4; step < quant::kWarpLanes; step *= 2)
          top = fmaxf(top, shuffle_xor(top, step));
        const float factor = exp2_fast(m[e] - top);
        m[e] = top;
        weight[e] = states[e].y > 0 ? exp2_fast(states[e].x - top) : 0;
        l[e] = fused(weight[e], states[e].y, l[e] * factor);
#pragma unroll
        for (int h = 0; h < 2; ++h) sum.x[2 * e + h] *= factor;
      }
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
    if (there) keep_tile(v, round, results, p, tile, sum, me);
    if (tile > 0) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Each of the eight lanes of a column has summed some slots' masses.
      float mass = l[e % Blocks];
#pragma unroll
      for (int step = 4; step < quant::kWarpLanes; step *= 2) mass += shuffle_xor(mass, step);
      if (g == 0)
        results.states(p)[t + 4 * e] =
            e < Blocks ? float2{m[e % Blocks], mass} : float2{kLowest, 0};
    }
  });
}

/// Sums over the chunks of fp16 tokens of finished segments, relative to their own maximum. A warp
/// does a column, four channels a lane.
template <int Blocks>
KVPLAN_DEVICE void merge_plain(const AttentionView& v, const Round& round,
                               const Results<Blocks>& results) {
  constexpr int kTogether = 5;  // chunks
  const Place me;
  const int d = v.layer.head_dim, columns = columns_in_use(v);
  int column = warps_of_block() - 1 - me.warp;  // the first warps merge parts
#pragma unroll 1
  for (int p = 0; p < round.count; ++p) {
#pragma unroll 1
    for (; column < columns; column += warps_of_block()) {
      if (round.finishes[p] == 0) continue;
      const int chunks = round.pieces[p].chunks;
      const std::int64_t segment = std::int64_t{round.pieces[p].segment} * v.plain_chunks;
#pragma unroll 1
      for (int channel = 4 * me.lane; channel < d; channel += 4 * quant::kWarpLanes) {
        const float2* from_state = v.plain_state + segment * kColumns + column;
        const float* from = v.plain_output + (segment * (4 * Blocks) + column) * d + channel;
        float m = kLowest;
        float4 sum{0, 0, 0, 0};
#pragma unroll 1
        for (int base = 0; base < chunks; base += kTogether) {
          float2 states[kTogether];
          float4 o[kTogether];
          float top = m;
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const bool there = base + k < chunks;
            states[k] = there ? load_written(from_state) : float2{kLowest, 0};
            o[k] = there ? load_written(reinterpret_cast<const float4*>(from)) : float4{0, 0, 0, 0};
            from_state += kColumns, from += 4 * Blocks * d;
          }
#pragma unroll
          for (int k = 0; k < kTogether; ++k) top = fmaxf(top, states[k].x);
          const float factor = exp2_fast(m - top);
          m = top;
          sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const float weight = states[k].y > 0 ? exp2_fast(states[k].x - top) : 0;
            sum.x = fused(weight, o[k].x, sum.x), sum.y = fused(weight, o[k].y, sum.y);
            sum.z = fused(weight, o[k].z, sum.z), sum.w = fused(weight, o[k].w, sum.w);
          }
        }
        *reinterpret_cast<float4*>(results.plain(p, column) + channel) = sum;
      }
    }
    column -= columns;
  }
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

/// The terms of the columns of finished segments, and lse. A lane does a column.
template <int Blocks>
KVPLAN_DEVICE void finish_columns(const AttentionView& v, const Round& round,
                                  const Results<Blocks>& results) {
  for (int i = thread(); i < round.count * kColumns; i += threads()) {
    const int p = i / kColumns, c = i % kColumns;
    if (round.finishes[p] == 0 || c >= columns_in_use(v)) continue;
    const Piece& piece = round.pieces[p];
    const float2* const states =
        v.plain_state + std::int64_t{piece.segment} * v.plain_chunks * kColumns + c;
    Mass plain;
#pragma unroll 5
    for (int k = 0; k < piece.chunks; ++k) plain.add(load_written(states + k * kColumns));
    const float2 packed = results.states(p)[c];
    const float maximum = fmaxf(packed.x, plain.m);
    const float factor = packed.y > 0 ? exp2_fast(packed.x - maximum) : 0;
    const float plain_factor = exp2_fast(plain.m - maximum);
    const float mass = factor * packed.y;
    const float total = fused(plain.l, plain_factor, mass);
    results.terms(p)[c] = {factor, plain_factor, mass, total > 0 ? 1 / total : 0};
    constexpr float kLn2 = 0.693147180559945309417f;
    const int row = round.rows[p][c];
    if (v.lse != nullptr && row >= 0) v.lse[row] = kLn2 * (maximum + std::log2(total));
  }
}

/// Finished segments, out of the transform. A warp makes 16 channels of the columns of a head.
template <int Blocks>
class OutputTransform {
 public:
  KVPLAN_DEVICE OutputTransform(const AttentionView& v, const Round& round,
                                const Results<Blocks>& results)
      : v_(v), round_(round), results_(results), tiles_(matrix_tiles(v.layer.head_dim)) {}

  /// meanwhile(): what every warp does while what it reads first is on its way; it makes what the
  /// outputs are made of.
  template <class Meanwhile>
  KVPLAN_DEVICE void run(Meanwhile meanwhile) {
    bool first_reads = true;
    int index = me_.warp;
#pragma unroll 1
    do {
      const MatrixTask task(round_, tiles_, index);
      const int coded =
          v_.layer.fp16[kValues].has(task.head) ? 0 : v_.layer.heads[task.head].v.coded;
      const float scale = v_.layer.matrix_scales[task.head].y;
      int pass = task.first_pass;
#pragma unroll 1
      do {
        ColumnProduct product;
        Column columns[2];
#pragma unroll 1
        for (int first = 0; first < tiles_; first += kStepsHeld) {
          rows_.load(v_.layer.v_matrix, tiles_, task.head, task.tile, first, me_);
          if (first_reads) meanwhile();
          first_reads = false;
#pragma unroll
          for (int i = 0; i < 2; ++i) columns[i] = column(pass, i);
          if (any(columns[0].merged != nullptr || columns[1].merged != nullptr))
            add(product, columns, first, coded);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (task.there && columns[i].merged != nullptr) {
            float sums[2][4];
            product.take(sums);
            store(task, round_.columns[pass][me_.g + 8 * i], columns[i].most * scale, sums[i]);
          }
      } while (++pass < task.end_pass);
      index += warps_of_block();
    } while (index < tiles_ * round_.groups);
  }

 private:
  // A column of the lane.
  struct Column {
    const float* merged;  // null: not finished here
    float most;
  };
  KVPLAN_DEVICE Column column(int pass, int i) const {
    const PassColumn of = round_.columns[pass][me_.g + 8 * i];
    if (of.row < 0 || round_.finishes[of.piece] == 0) return {nullptr, 0};
    return {results_.merged(of.piece, of.column) + 2 * me_.t, round_.most[of.piece][of.column]};
  }

  // Coordinates from `coded` on are not there.
  KVPLAN_DEVICE void add(ColumnProduct& product, const Column (&columns)[2], int first,
                         int coded) const {
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      inverse[i] = columns[i].most > 0 ? reciprocal_fast(columns[i].most) : 0;
    const int left = coded - 16 * first - 2 * me_.t;
    product.template add<true>(rows_, [&](int step, std::uint32_t(&a)[4], std::uint32_t(&rest)[4]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Column& c = columns[k % 2];
        const int at = 16 * step + 8 * (k / 2);
        const float2 x = c.merged != nullptr && at < left
                             ? *reinterpret_cast<const float2*>(c.merged + 16 * first + at)
                             : float2{0, 0};
        const float low = x.x * inverse[k % 2], high = x.y * inverse[k % 2];
        a[k] = pack_halves(low, high);
        rest[k] =
            pack_halves((low - low_half(a[k])) * kLowScale, (high - high_half(a[k])) * kLowScale);
      }
    });
  }

  KVPLAN_DEVICE void store(const MatrixTask& task, const PassColumn& column, float factor,
                           const float (&sums)[4]) const {
    const int d = v_.layer.head_dim, first = 16 * task.tile + 2 * me_.t;
    const ResultColumn terms = results_.terms(column.piece)[column.column];
    const float* const plain = results_.plain(column.piece, column.column);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = first + 8 * h;
      if (channel >= d) continue;
      float x = factor * sums[2 * h], y = factor * sums[2 * h + 1];
      if (has_direct(v_.layer.codes)) {
        const float* const direct = results_.direct(column.piece, column.column) + channel;
        x += direct[0], y += direct[1];
      }
      x *= terms.packed, y *= terms.packed;
      x = fused(terms.plain, plain[channel], x), y = fused(terms.plain, plain[channel + 1], y);
      if (v_.layer.v_mean != nullptr) {
        const auto mean =
            *reinterpret_cast<const float2*>(v_.layer.v_mean + task.head * d + channel);
        x = fused(mean.x, terms.mass, x), y = fused(mean.y, terms.mass, y);
      }
      x *= terms.inverse, y *= terms.inverse;
      const std::int64_t at = std::int64_t{column.row} * d + channel;
      if (v_.out != nullptr) *reinterpret_cast<std::uint32_t*>(v_.out + at) = pack_halves(x, y);
      if (v_.out_float != nullptr) *reinterpret_cast<float2*>(v_.out_float + at) = {x, y};
    }
  }

  const Place me_;
  const AttentionView& v_;
  const Round& round_;
  const Results<Blocks>& results_;
  const int tiles_;
  MatrixRows rows_;
};

/// What the warps have found, to memory; the segments that are complete, to the outputs. By the
/// block, all of whose warps are done.
template <int Blocks>
KVPLAN_DEVICE void leave_results(const AttentionView& v, const BlockMemory<Blocks>& memory) {
  Round& round = memory.round();
  const Results<Blocks> results(v, memory);
  if (has_direct(v.layer.codes)) {
    clear_direct(results, round.count);
    sync_block();
  }
  list_slots(v, round, results);
  merge_warps(v, memory, results);
  OutputTransform<Blocks>(v, round, results).run([&] {
    arrive(v, round);
    merge_plain(v, round, results);
    if (round.all_whole == 0) {
      merge_parts(v, round, results);
      sync_block();
    }
    finish_columns(v, round, results);
    sync_block();
  });
}

}  // namespace kvplan::kernels
