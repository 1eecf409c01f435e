#pragma once
// What the warps of a block find ready of the pieces of a round: queries as fragments of the
// transformed domain, what the centring of keys and the offsets of bytes add to scores, and the
// runs of tiles of a page. Private to the decode kernels.

#include <cmath>

#include "kernels/block_memory.cuh"
#include "kernels/page_access.cuh"
#include "kernels/ptx.cuh"
#include "kernels/round.cuh"
#include "kernels/tile_bytes.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/transform.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr float kTopDigits = 32000;  // of 127 * 256 + 127

/// products = transform . queries, times the step where levels are bytes, and what ColumnTerms
/// needs of them. A warp makes 16 coordinates of the columns of a head.
template <int Blocks>
class QueryTransform {
 public:
  KVPLAN_DEVICE QueryTransform(const AttentionView& v, const BlockMemory<Blocks>& memory)
      : v_(v), memory_(memory), round_(memory.round()), tiles_(matrix_tiles(v.layer.head_dim)) {}

  /// meanwhile(): what every warp does while what it reads first is on its way.
  template <class Meanwhile>
  KVPLAN_DEVICE void run(Meanwhile meanwhile) {
    bool first_reads = true;
    int index = me_.warp;
#pragma unroll 1
    do {
      const MatrixTask task(round_, tiles_, index);
      const auto* const from = reinterpret_cast<const float4*>(
          v_.layer.k_terms + (task.head * tiles_ + task.tile) * quant::kTileCoordinates +
          2 * me_.t);
      const Terms terms{{from[0], from[4]},
                        v_.scale * kLog2e * v_.layer.matrix_scales[task.head].x};
      int pass = task.first_pass;
#pragma unroll 1
      do {
        ColumnProduct product;
#pragma unroll 1
        for (int first = 0; first < tiles_; first += kStepsHeld) {
          rows_.load(v_.layer.k_matrix, tiles_, task.head, task.tile, first, me_);
          load_queries(pass, first);
          if (first_reads) meanwhile();
          first_reads = false;
          product.add<false>(rows_, [&](int k, std::uint32_t(&a)[4], std::uint32_t(&)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = queries_[k][i];
          });
        }
        if (task.there && !v_.layer.fp16[kKeys].has(task.head)) keep(task, terms, pass, product);
      } while (++pass < task.end_pass);
      index += warps_of_block();
    } while (index < tiles_ * round_.groups);
  }

 private:
  // Of the lane's rows of a tile.
  struct Terms {
    float4 pairs[2];  // LayerView::k_terms
    float scale;
  };

  // Operands of the columns of a pass, of the terms from 16 first on.
  KVPLAN_DEVICE void load_queries(int pass, int first) {
    const int d = v_.layer.head_dim;
    const std::uint16_t* columns[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int32_t row = round_.columns[pass][me_.g + 8 * i].row;
      columns[i] = row < 0 ? nullptr : v_.q + std::int64_t{row} * d + 16 * first + 2 * me_.t;
    }
    const int left = d - 16 * first - 2 * me_.t;
#pragma unroll
    for (int k = 0; k < kStepsHeld; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 16 * k + 8 * (i / 2);
        queries_[k][i] = columns[i % 2] != nullptr && channel < left
                             ? *reinterpret_cast<const std::uint32_t*>(columns[i % 2] + channel)
                             : 0;
      }
  }

  KVPLAN_DEVICE void keep(const MatrixTask& task, const Terms& terms, int pass,
                          const ColumnProduct& product) {
    float sums[2][4];
    product.take(sums);
    const float4(&pairs)[2] = terms.pairs;
    const float steps[4] = {pairs[0].x, pairs[0].z, pairs[1].x, pairs[1].z};
    const float offsets[4] = {pairs[0].y, pairs[0].w, pairs[1].y, pairs[1].w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PassColumn column = round_.columns[pass][me_.g + 8 * i];
      float most = 0, bias = 0;
      float* const to =
          memory_.product(column.piece < 0 ? 0 : column.piece, column.column) + 16 * task.tile;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float x = terms.scale * sums[i][k], y = x * steps[k];
        most = fmaxf(most, fabsf(y));
        bias = fused(x, offsets[k], bias);
        if (column.piece >= 0) to[tile_row(me_, k)] = steps[k] != 0 ? y : x;
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        most = fmaxf(most, shuffle_xor(most, step));
        bias += shuffle_xor(bias, step);
      }
      if (me_.t == 0 && column.piece >= 0)
        memory_.measures(column.piece, column.column)[task.tile] = {most, bias};
    }
  }

  const Place me_;
  const AttentionView& v_;
  const BlockMemory<Blocks>& memory_;
  const Round& round_;
  const int tiles_;
  MatrixRows rows_;
  std::uint32_t queries_[kStepsHeld][4];
};

/// A scaled query, outside the transform.
struct PlainColumn {
  const std::uint16_t* query;  // null: none
  float scale;
  KVPLAN_DEVICE PlainColumn(const AttentionView& v, const Round& round, int piece, int column)
      : query(nullptr), scale(v.scale * kLog2e) {
    const int row = round.rows[piece][column];
    if (row >= 0) query = v.q + std::int64_t{row} * v.layer.head_dim;
  }
  KVPLAN_DEVICE float operator[](int channel) const {
    return query != nullptr ? scale * from_half(query[channel]) : 0;
  }
};

/// The lists of runs. A warp copies those of a piece.
template <int Blocks>
KVPLAN_DEVICE void list_runs(const AttentionView& v, const BlockMemory<Blocks>& memory) {
  const Round& round = memory.round();
  for (int p = warp(); p < round.count; p += warps_of_block()) {
    constexpr int kQuads = sizeof(RunEntry) / sizeof(uint4);
    const auto* const from =
        reinterpret_cast<const uint4*>(v.layer.runs + round.pieces[p].head * v.layer.most_runs);
    RunEntry* const runs = memory.runs(p);
    for (int i = lane(); i < v.layer.most_runs * kQuads; i += quant::kWarpLanes)
      reinterpret_cast<uint4*>(runs)[i] = from[i];
    if (memory.map.tables == 0) continue;
    sync_warp();
    for (int i = lane(); i < v.layer.most_runs; i += quant::kWarpLanes)
      runs[i].table = static_cast<std::uint16_t>(
          memory.map.table_address[runs[i].table % kMaxLevelTables] >> kEntryShift);
  }
}

/// R_t mean . q as a function of t. Heads stored as fp16 are not centred.
template <int Blocks>
KVPLAN_DEVICE void centre_queries(const AttentionView& v, const BlockMemory<Blocks>& memory) {
  constexpr int kKept = BlockMemory<Blocks>::kColumnsKept;
  const LayerView& layer = v.layer;
  const Round& round = memory.round();
  const int frequencies = 8 * layer.phase_steps, all = frequencies * kKept;
  for (int p = 0; p < round.count; ++p) {
    const Piece& piece = round.pieces[p];
    const float* const mean = layer.k_mean + piece.head * layer.head_dim;
    const bool fp16 = layer.fp16[kKeys].has(piece.head);
    for (int i = thread(); i < all; i += threads()) {
      const int f = i / (2 * kKept) * 2 + i % 2;
      const PlainColumn q(v, round, p, i / 2 % kKept);
      float2 centre{0, 0};
      if (!fp16 && f < layer.pairs) {
        const int a = f * layer.pair_stride, b = a + layer.pair_distance;
        const float q_a = q[a], q_b = q[b];
        centre.x = fused(q_a, mean[a], q_b * mean[b]);
        centre.y = fused(q_a, mean[b], -(q_b * mean[a]));
      }
      memory.centre(p)[i] = centre;
    }
  }
  // Channels without rotary embedding. A warp does a column.
  for (int item = warp(); item < round.count * kKept; item += warps_of_block()) {
    const Piece& piece = round.pieces[item / kKept];
    const PlainColumn q(v, round, item / kKept, item % kKept);
    const float* const mean = layer.k_mean + piece.head * layer.head_dim;
    float constant = 0;
    if (!layer.fp16[kKeys].has(piece.head))
      for (int channel = 2 * layer.pairs + lane(); channel < layer.head_dim;
           channel += quant::kWarpLanes)
        constant = fused(q[channel], mean[channel], constant);
    for (int step = 1; step < quant::kWarpLanes; step *= 2) constant += shuffle_xor(constant, step);
    if (lane() == 0) memory.terms(item / kKept)[item % kKept].constant = constant;
  }
}

/// A lane's part of fragments of digits, of columns lane / 8 + 4 e: see AttentionView.
template <int Blocks>
struct DigitColumns {
  const float* products[Blocks];
  float inverse[Blocks];  // 1 / unit; 0: nothing there
  bool high;

  /// Takes the columns' units, so that the largest number takes all digits, and biases.
  KVPLAN_DEVICE DigitColumns(const AttentionView& v, const BlockMemory<Blocks>& memory, int p,
                             bool writes)
      : high(lane() / 4 % 2 == 0) {
    const Round& round = memory.round();
    const int tiles = matrix_tiles(v.layer.head_dim);
    const bool transformed = !v.layer.fp16[kKeys].has(round.pieces[p].head);
#pragma unroll
    for (int e = 0; e < Blocks; ++e) {
      const int column = lane() / 8 + 4 * e;
      float most = 0, bias = 0;
      if (transformed && column < columns_in_use(v)) {
        const float2* const measures = memory.measures(p, column);
#pragma unroll 4
        for (int tile = 0; tile < tiles; ++tile) {
          most = fmaxf(most, measures[tile].x);
          bias += measures[tile].y;
        }
      }
      products[e] = memory.product(p, column);
      inverse[e] = most > 0 ? kTopDigits * reciprocal_fast(most) : 0;
      if (writes && lane() % 8 == 0) {
        ColumnTerms& terms = memory.terms(p)[column];
        terms.bias = bias, terms.unit = most * (1 / kTopDigits);
      }
    }
  }
  KVPLAN_DEVICE uint2 fragment(int coordinate, int coordinates) const {
    const int row = 2 * (lane() % 4);
    std::uint32_t words[2] = {0, 0};
#pragma unroll
    for (int e = 0; e < Blocks; ++e) {
#pragma unroll
      for (int y = 0; y < 4; ++y) {
        const int at = row + y / 2 + 8 * (y % 2);
        const float x =
            inverse[e] > 0 && at < coordinates ? products[e][coordinate + at] * inverse[e] : 0;
        const int integer = static_cast<int>(std::rint(x));
        const int digit = high ? (integer + 128) >> 8 : integer;
        words[e] |= (static_cast<std::uint32_t>(digit) & 0xff) << 8 * y;
      }
    }
    return {words[0], words[1]};
  }
};

/// A lane's part of a fragment of 16-bit numbers.
template <int Blocks>
KVPLAN_DEVICE uint2 half_fragment(const AttentionView& v, const BlockMemory<Blocks>& memory, int p,
                                  quant::TileCode code, int coordinate, int coordinates) {
  const Round& round = memory.round();
  const int column = lane() / 8 + 4 * (lane() / 4 % 2), row = 2 * (lane() % 4);
  const PlainColumn plain(v, round, p, column);
  const std::int32_t* const outliers =
      v.layer.encoders[kKeys * v.layer.kv_heads + round.pieces[p].head].outliers;
  float x[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int at = row + k % 2 + 8 * (k / 2);
    x[k] = 0;
    if (plain.query == nullptr || at >= coordinates) continue;
    if (code == quant::TileCode::kTable || code == quant::TileCode::kTrellis)
      x[k] = memory.product(p, column)[coordinate + at];
    else
      x[k] = plain[code == quant::TileCode::kInteger ? outliers[coordinate + at] : coordinate + at];
  }
  return {pack_halves(x[0], x[1]), pack_halves(x[2], x[3])};
}

/// Fragments, units and biases from the products. Warps share the tiles of a piece.
template <int Blocks>
KVPLAN_DEVICE void fragment_queries(const AttentionView& v, const BlockMemory<Blocks>& memory) {
  const Round& round = memory.round();
  const int share = warps_of_block() / round.count > 0 ? warps_of_block() / round.count : 1;
  const int first = warp() / share, member = warp() - first * share;
  const int together = warps_of_block() / share;  // pieces
  if (first >= together) return;
#pragma unroll 1
  for (int p = first; p < round.count; p += together) {
    const quant::SideLayout& keys = v.layer.heads[round.pieces[p].head].k;
    const DigitColumns<Blocks> digit_columns(v, memory, p, member == 0);
    int tile = 0, next = member;
#pragma unroll 1
    for (int r = 0; r < keys.run_count + keys.outlier_runs; ++r) {
      const quant::TileRun& run = keys.runs[r];
      const int coordinates = quant::tile_coordinates(run.half != 0);
#pragma unroll 1
      for (; next < tile + run.tiles; next += share) {
        const int coordinate = run.coordinate + (next - tile) * coordinates;
        memory.query(p)[next * quant::kWarpLanes + lane()] =
            run.code == quant::TileCode::kBytes
                ? digit_columns.fragment(coordinate, coordinates)
                : half_fragment(v, memory, p, run.code, coordinate, coordinates);
      }
      tile += run.tiles;
    }
  }
}

}  // namespace kvplan::kernels
