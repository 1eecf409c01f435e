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

/// The fp16 row of a sink, or of a token of the open page.
KVPLAN_DEVICE std::uint16_t* plain_row(const LayerView& layer, int slot, int side, int head,
                                       int position) {
  const bool sink = position < layer.sink_tokens;
  const int rows = sink ? layer.sink_tokens : kOpenTokens;
  const int row = sink ? position : (position - layer.sink_tokens) % kOpenTokens;
  const std::int64_t owner = (std::int64_t{slot} * 2 + side) * layer.kv_heads + head;
  return (sink ? layer.sinks : layer.open) + (owner * rows + row) * layer.head_dim;
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

constexpr int kStreamStart = kEntryShift;  // bit of code 0 among a lane's, widths 3..8

KVPLAN_DEVICE int stream_start(int width, bool half_tile) {
  return half_tile || width > 8 ? 0 : kStreamStart;
}

KVPLAN_DEVICE int code_bit(int width, bool half_tile, int code) {
  const int pair = code / 2, half = code % 2;
  if (!half_tile && width == 1) return pair + 16 * half;
  if (!half_tile && width == 2) return 32 * (pair / 8) + pair_start(pair) + 16 * half;
  const int bits = (half_tile ? 16 : 32) * width;
  return (stream_start(width, half_tile) + width * code) % bits;
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

/// A lane's word, code(c) giving its codes.
template <class Code>
KVPLAN_DEVICE std::uint32_t pack_word(int width, bool half_tile, int word, Code code) {
  std::uint32_t packed = 0;
  if (!half_tile && width <= 2) {
    const int codes = 32 / width;
    for (int c = codes * word; c < codes * (word + 1); ++c)
      packed |= code(c) << code_bit(width, false, c) % 32;
    return packed;
  }
  // The codes that have bits in the word; before the first comes the last.
  const int bits = half_tile ? 16 : 32, codes = bits;
  const int start = stream_start(width, half_tile);
  int c = (bits * word - start + codes * width) / width - codes;
  for (; start + width * c < bits * (word + 1); ++c) {
    const int shift = start + width * c - bits * word;
    const std::uint32_t value = code((c + codes) % codes);
    packed |= shift >= 0 ? value << shift : value >> -shift;
  }
  return packed;
}

/// The code of (token, coordinate of the tile).
KVPLAN_DEVICE std::uint32_t read_code(const std::byte* tile, int side, int width, bool half_tile,
                                      TileElement e) {
  const TileCodePlace place = tile_code_place(side, half_tile, e);
  const int bit = code_bit(width, half_tile, place.code);
  std::uint32_t both[2];
  for (int i = 0; i < 2; ++i) {
    const int word = (bit / (half_tile ? 16 : 32) + i) % width;
    both[i] =
        half_tile
            ? reinterpret_cast<const std::uint16_t*>(tile)[word * 32 + place.lane]
            : *reinterpret_cast<const std::uint32_t*>(tile + word_offset(width, word, place.lane));
  }
  if (half_tile) both[0] |= both[1] << 16;
  return funnel_right(both[0], both[1], bit % (half_tile ? 16 : 32)) & ((1u << width) - 1);
}

}  // namespace kvplan::kernels
