#pragma once
// Where the cache keeps the vectors of a token, and single codes and norms of a page (the kernels
// that pack and unpack; `decode` reads whole tiles, tile_codes.cuh). Twins of the functions of
// quant/page_layout.h.

#include "kernels/ptx.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kKeys = 0, kValues = 1;  // sides

KVPLAN_DEVICE const quant::SideLayout& side_layout(const LayerView& layer, int side, int head) {
  return side == kKeys ? layer.heads[head].k : layer.heads[head].v;
}

/// The fp16 row of a sink, or of a token of the open page. Up to 2^16 sequences and kMaxKvHeads.
KVPLAN_DEVICE std::uint16_t* plain_row(const LayerView& layer, int slot, int side, int head,
                                       int position) {
  const int owner = (2 * slot + side) * layer.kv_heads + head;
  if (position < layer.sink_tokens)
    return layer.sinks +
           (std::int64_t{owner} * layer.sink_tokens + position) * std::int64_t{layer.head_dim};
  const int row = static_cast<unsigned>(position - layer.sink_tokens) % kOpenTokens;
  return layer.open + std::int64_t{owner * kOpenTokens + row} * layer.head_dim;
}

KVPLAN_DEVICE std::byte* page_of(const LayerView& layer, int block, int head) {
  return layer.pool + std::int64_t{block} * layer.block_bytes + layer.heads[head].block_offset;
}

KVPLAN_DEVICE int run_coordinates(const quant::TileRun& run) {
  return run.tiles * quant::tile_coordinates(run.half != 0);
}

/// What a code of a lane stands for.
struct TileElement {
  int token = 0, coordinate = 0;
};

/// code: 2 * pair + half, 0..31, of a half tile 0..15.
KVPLAN_DEVICE TileElement tile_element(int side, bool half_tile, int lane, int code) {
  const int registers = half_tile ? 2 : 4;  // of operand A that hold codes
  const int step = code / 2 / registers, r = code / 2 % registers;
  const int row_block = half_tile && side == kValues ? 0 : r & 1;
  const int column_block = half_tile ? r - row_block : r >> 1;
  const int row = lane / 4 + 8 * row_block, column = lane % 4 * 2 + code % 2 + 8 * column_block;
  return side == kKeys ? TileElement{16 * step + row, column}
                       : TileElement{16 * step + column, row};
}

struct TileCodePlace {
  int lane = 0, code = 0;
};

KVPLAN_DEVICE TileCodePlace tile_code_place(int side, bool half_tile, TileElement e) {
  const int row = side == kKeys ? e.token % 16 : e.coordinate;
  const int column = side == kKeys ? e.coordinate : e.token % 16;
  const int r = row / 8 + (half_tile ? 1 : 2) * (column / 8);
  const int pair = (half_tile ? 2 : 4) * (e.token / 16) + r;
  return {row % 8 * 4 + column % 8 / 2, 2 * pair + column % 2};
}

/// Word `index` of a tile in memory order: whose it is and which. 32-bit words, of a half tile
/// 16-bit words.
struct LaneWord {
  int lane = 0, word = 0;
};

KVPLAN_DEVICE LaneWord lane_word(int width, bool half_tile, int index) {
  if (half_tile) return {index % 32, index / 32};
  const int fours = width / 4 * 4, twos = width & 2;
  if (index < 32 * fours) return {index % 128 / 4, index / 128 * 4 + index % 4};
  index -= 32 * fours;
  if (index < 32 * twos) return {index / 2, fours + index % 2};
  return {index - 32 * twos, width - 1};
}

KVPLAN_DEVICE int word_offset(int width, int word, int lane) {
  const int fours = width / 4 * 4, twos = width & 2;
  if (word < fours) return 4 * (word / 4 * 128 + 4 * lane + word % 4);
  if (word < fours + twos) return 4 * (32 * fours + 2 * lane + word - fours);
  return 4 * (32 * (fours + twos) + lane);
}

/// The code of (token, coordinate of the tile).
KVPLAN_DEVICE std::uint32_t read_code(const std::byte* tile, int side, const quant::TileRun& run,
                                      TileElement e) {
  const bool half_tile = run.half != 0;
  const TileCodePlace place = tile_code_place(side, half_tile, e);
  const quant::CodeParts parts = quant::code_parts(run.code, run.width, half_tile, place.code);
  std::uint32_t code = 0;
  for (int i = 0; i < parts.count; ++i) {
    const quant::CodePart part = parts.part[i];
    const std::uint32_t word =
        half_tile ? reinterpret_cast<const std::uint16_t*>(tile)[part.word * 32 + place.lane]
                  : *reinterpret_cast<const std::uint32_t*>(
                        tile + word_offset(run.width, part.word, place.lane));
    code |= (word >> part.shift & ((1u << part.bits) - 1)) << part.from;
  }
  return quant::stored_code(run.code, run.width, code);
}

}  // namespace kvplan::kernels
