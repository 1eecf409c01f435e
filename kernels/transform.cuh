#pragma once
// Product of a head's [head_dim, head_dim] matrix with 16 columns on the matrix units, to about 21
// bits: how queries are brought into the transformed domain and outputs back. The matrix lies in
// memory as operands B of mma.m16n8k16, each number as an fp16 and what that left of it
// (static_data.cpp): a warp brings 16 rows of it to registers without shared memory.

#include "kernels/ptx.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kProductColumns = 16;

/// Tiles of 16 rows, and of 16 terms of a sum.
constexpr int matrix_tiles(int head_dim) { return (head_dim + 15) / 16; }

/// Rows 16 tile + (2t, 2t + 1, 2t + 8, 2t + 9) of matrix . columns for columns g and g + 8: sums[0]
/// those of column g, sums[1] of g + 8. Operand A of terms 16 step .. is operands(load(step), high,
/// low); low, times kLowScale, may be left 0. load() reads what is far away. `matrix`: of the head.
template <class Load, class Operands>
KVPLAN_DEVICE void multiply_tile(const uint4* matrix, int tiles, int tile, Load load,
                                 Operands operands, float (&sums)[2][4]) {
  constexpr int kLoaded = 4;  // steps whose operands are on their way together
  float high[2][4] = {}, low[2][4] = {};
  const uint4* from = matrix + std::int64_t{tile} * tiles * 64 + lane();
#pragma unroll 1
  for (int first = 0; first < tiles; first += kLoaded) {
    uint4 loaded[kLoaded][2];
    decltype(load(0)) terms[kLoaded];
#pragma unroll
    for (int k = 0; k < kLoaded; ++k) {
      const bool there = first + k < tiles;
#pragma unroll
      for (int part = 0; part < 2; ++part)
        loaded[k][part] = there ? from[(first + k) * 64 + 32 * part] : uint4{0, 0, 0, 0};
      if (there) terms[k] = load(first + k);
    }
#pragma unroll
    for (int k = 0; k < kLoaded; ++k) {
      if (first + k >= tiles) break;
      std::uint32_t a[4], rest[4] = {0, 0, 0, 0};
      operands(terms[k], a, rest);
      mma(high[0], a, loaded[k][0].x, loaded[k][0].y);
      mma(high[1], a, loaded[k][0].z, loaded[k][0].w);
      mma(low[0], a, loaded[k][1].x, loaded[k][1].y);
      mma(low[1], a, loaded[k][1].z, loaded[k][1].w);
      mma(low[0], rest, loaded[k][0].x, loaded[k][0].y);
      mma(low[1], rest, loaded[k][0].z, loaded[k][0].w);
    }
  }
#pragma unroll
  for (int block = 0; block < 2; ++block)
#pragma unroll
    for (int k = 0; k < 4; ++k)
      sums[k / 2][2 * block + k % 2] = high[block][k] + low[block][k] * (1 / kLowScale);
}

/// Row of sums[..][k] of multiply_tile in the tile.
KVPLAN_DEVICE int tile_row(int k) { return 2 * (lane() % 4) + k % 2 + 8 * (k / 2); }

}  // namespace kvplan::kernels
