#pragma once
// Product of a head's [head_dim, head_dim] matrix with 16 columns on the matrix units, to about 21
// bits: how queries are brought into the transformed domain and outputs back. The matrix lies in
// memory as operands B of mma.m16n8k16, each number as an fp16 and what that left of it
// (static_data.cpp): a warp brings 16 rows of it to registers without shared memory, early, and
// uses them for all columns. Private to the decode kernels.

#include "kernels/ptx.cuh"
#include "kernels/round.h"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kStepsHeld = 8;  // terms of a sum that are held together, over 16

/// Tiles of 16 rows, and of 16 terms of a sum.
constexpr int matrix_tiles(int head_dim) { return (head_dim + 15) / 16; }

/// 16 rows of a matrix, of the terms 16 first .. 16 (first + kStepsHeld) - 1.
struct MatrixRows {
  uint4 parts[kStepsHeld][2];
  int first, steps;

  /// `matrix`: of all heads.
  KVPLAN_DEVICE void load(const uint4* matrix, int tiles, int head, int tile, int first_step,
                          const Place& me) {
    first = first_step;
    steps = tiles - first_step < kStepsHeld ? tiles - first_step : kStepsHeld;
    const uint4* const from =
        matrix + ((std::int64_t{head} * tiles + tile) * tiles + first_step) * 64 + me.lane;
#pragma unroll
    for (int k = 0; k < kStepsHeld; ++k)
#pragma unroll
      for (int part = 0; part < 2; ++part)
        parts[k][part] = k < steps ? from[k * 64 + 32 * part] : uint4{0, 0, 0, 0};
  }
};

/// Rows 16 tile + (2t, 2t + 1, 2t + 8, 2t + 9) of matrix . columns for columns g and g + 8.
class ColumnProduct {
 public:
  /// Operand A of the terms 16 (rows.first + k) .. is operands(k, high, low); low: what fp16 left
  /// of high, times kLowScale, if `WithRest`.
  template <bool WithRest, class Operands>
  KVPLAN_DEVICE void add(const MatrixRows& rows, Operands operands) {
#pragma unroll
    for (int k = 0; k < kStepsHeld; ++k) {
      if (k >= rows.steps) break;
      std::uint32_t a[4], rest[4];
      operands(k, a, rest);
      const uint4 &high = rows.parts[k][0], &low = rows.parts[k][1];
      mma(high_[0], a, high.x, high.y);
      mma(high_[1], a, high.z, high.w);
      mma(low_[0], a, low.x, low.y);
      mma(low_[1], a, low.z, low.w);
      if constexpr (WithRest) {
        mma(low_[0], rest, high.x, high.y);
        mma(low_[1], rest, high.z, high.w);
      }
    }
  }
  /// sums[0] those of column g, sums[1] of g + 8.
  KVPLAN_DEVICE void take(float (&sums)[2][4]) const {
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sums[k / 2][2 * block + k % 2] = high_[block][k] + low_[block][k] * (1 / kLowScale);
  }

 private:
  float high_[2][4] = {}, low_[2][4] = {};
};

/// Row of sums[..][k] of ColumnProduct in the tile.
KVPLAN_DEVICE int tile_row(const Place& me, int k) { return 2 * me.t + k % 2 + 8 * (k / 2); }

}  // namespace kvplan::kernels
