#pragma once
// How a page of the paged cache is laid out in memory: tiles, norms, offsets
// (docs/formats/packing.md, "Pages and tiles"). Plain values that the CPU reference and the CUDA
// runtime share.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "quant/codec.h"
#include "quant/transform_codec.h"

namespace kvplan::quant {

inline constexpr int kPageTokens = 64;
inline constexpr int kTileCoordinates = 16;  // a half tile has 8
inline constexpr int kWarpLanes = 32;
inline constexpr std::size_t kPageAlignment = 16;
inline constexpr int kMaxTileRuns = 18;
inline constexpr int kOutlierWidth = 8;  // signed integers, stored as code + 128

constexpr int tile_coordinates(bool half_tile) {
  return half_tile ? kTileCoordinates / 2 : kTileCoordinates;
}
constexpr std::size_t tile_bytes(int width, bool half_tile) {
  return static_cast<std::size_t>(width) * (half_tile ? 64 : 128);
}
/// Where the norm and the outlier scale of a token are among those of its page: those of the 8
/// tokens that a lane's scores belong to follow each other.
constexpr std::size_t token_index(int token) {
  return static_cast<std::size_t>(token % 8 * 8 + token / 8);
}

enum class TileCode : std::uint8_t {
  kTable = 0,    // level = table[code]
  kBytes = 1,    // the same with levels (byte + byte_offset) * step: quant/byte_levels.h
  kHalf = 2,     // width 16: plain fp16 numbers
  kInteger = 3,  // outlier channels: code - 128, times the outlier scale of the token
  kTrellis = 4,  // level = table[state], the 8 bits from the code on of the token's stream
};

/// Consecutive tiles of one width. A full tile takes 128 * width bytes, a half tile 64 * width; of
/// a trellis they lie in the side's streams.
struct TileRun {
  TileCode code = TileCode::kTable;
  std::uint8_t width = 0;        // 1..8, 16
  std::uint8_t half = 0;         // 1: a single tile of 8 coordinates
  std::uint8_t table = 0;        // index into LayerFormat::tables (kTable, kBytes, kTrellis)
  std::uint16_t tiles = 0;       // number of tiles
  std::uint16_t coordinate = 0;  // storage index of the first coordinate (kInteger: index into the
                                 // head's list of outlier channels)
  std::uint32_t offset = 0;      // bytes from the start of the page (kTrellis: of the streams)
  std::uint16_t bit = 0;         // kTrellis: of the stream, where the run's first code begins
  float step = 0, byte_offset = 0;  // kBytes
  bool operator==(const TileRun&) const = default;
};

/// One side of one KV head. Runs of outliers follow those of the codes.
struct SideLayout {
  TileRun runs[kMaxTileRuns];
  std::int32_t run_count = 0;       // without outlier runs
  std::int32_t outlier_runs = 0;    // runs[run_count .. run_count + outlier_runs)
  std::int32_t tiles = 0;           // of all runs, half tiles and outlier tiles count as one each
  std::int32_t coded = 0;           // coordinates of non-zero width (fp16: head_dim)
  std::int32_t outliers = 0;        // channels
  std::int32_t stream_bytes = 0;    // of the trellis, per token; 0: no trellis
  std::uint32_t stream_offset = 0;  // 64 streams, byte by byte as stream_byte() says
  std::uint32_t norm_offset = 0;    // 64 norms, each at its token_index
  std::uint32_t scale_offset = 0;   // 64 fp16 scales of the outliers in the same order
  std::int32_t norm_bytes = 0;      // per token: 1 (log8), 2 (fp16), 0 (a head stored as fp16)
  bool operator==(const SideLayout&) const = default;
};

/// One KV head. Order in a page: K runs, K streams, V runs, V streams, K norms, V norms, K scales,
/// V scales; each part starts on a multiple of its alignment (runs 16 bytes, norms 16, scales 16).
struct HeadLayout {
  SideLayout k, v;
  std::uint32_t page_bytes = 0;    // multiple of kPageAlignment
  std::uint32_t block_offset = 0;  // of this head's page in a block of the layer's pool
  const SideLayout& side(Side s) const { return s == Side::kKey ? k : v; }
  bool operator==(const HeadLayout&) const = default;
};

/// Bytes of the tiles of keys: where those of values begin.
constexpr std::uint32_t key_tile_bytes(const HeadLayout& head) {
  return head.v.run_count + head.v.outlier_runs > 0 ? head.v.runs[0].offset : head.k.norm_offset;
}

/// A layer of the cache. A *block* is the pages of all KV heads for the same 64 tokens; page tables
/// hold block numbers.
struct LayerFormat {
  std::vector<HeadLayout> heads;
  // [2^width] ascending levels, of a trellis [256] by state; equal ones are stored once.
  std::vector<std::vector<float>> tables;
  std::uint32_t block_bytes = 0;
  TransformCodecSpec k, v;  // transforms, runs with boundaries, scale rule, norm, means
};

/// The layout of every layer of a plan. InputError, with the field, for what pages cannot hold:
/// codecs other than calibrated, rotated (scalar codes, one fp16 or log8 norm per vector, absmax
/// outliers at 8 bits) and fp16; levels of one bit other than -x and x; counts of
/// coordinates of a width that are no multiple of 8; page_tokens other than 64.
std::vector<LayerFormat> page_format(const PlanBundle& bundle);

// Codes of a lane in a tile are counted in the order of registers: code 2 * pair + half. A code's
// bits in the lane's words (32 bits, of a half tile 16 bits) are one part, or several.

/// Bits from .. from + bits - 1 of a code are bits shift .. of word `word`.
struct CodePart {
  std::int8_t word = 0, shift = 0, from = 0, bits = 0;
};
struct CodeParts {
  CodePart part[3];
  int count = 0;
  constexpr void add(int word, int shift, int from, int bits) {
    part[count++] = {static_cast<std::int8_t>(word), static_cast<std::int8_t>(shift),
                     static_cast<std::int8_t>(from), static_cast<std::int8_t>(bits)};
  }
};

inline constexpr int kStreamStart = 7;  // bit of code 0 of full tiles, where codes are a stream

/// A stream: code after code, the last one goes on at bit 0.
constexpr CodeParts stream_parts(int width, bool half_tile, int code) {
  const int word_bits = half_tile ? 16 : 32, all = word_bits * width;
  const int first = ((half_tile || width > 8 ? 0 : kStreamStart) + width * code) % all;
  CodeParts parts;
  const int word = first / word_bits, shift = first % word_bits;
  const int here = shift + width <= word_bits ? width : word_bits - shift;
  parts.add(word, shift, 0, here);
  if (here < width) parts.add((word + 1) % width, 0, here, width - here);
  return parts;
}

/// kBytes: the four codes of a register of operand A (its bytes) as a selector of four nibbles, as
/// fields of four bytes, or spread over planes of one bit: whatever makes bytes in the fewest
/// instructions (docs/formats/packing.md). Byte y of a full tile's register u = 2 i + r0, of a
/// half tile's pair of registers u = i.
constexpr CodeParts byte_parts(int width, bool half_tile, int code) {
  const int pair = code / 2, half = code % 2;
  const int u = half_tile ? pair / 2 : 2 * (pair / 4) + pair % 2;
  const int y = 2 * half + (half_tile ? pair % 2 : pair / 2 % 2);
  const int word_bits = half_tile ? 16 : 32;
  const int selectors = word_bits / 16;  // of a word
  const int selector = u / selectors, nibble = 16 * (u % selectors) + 4 * y;
  CodeParts parts;
  const auto byte_field = [&](int first_bit) {  // in 32-bit words
    const int bit = 8 * y + first_bit % 32, word = first_bit / 32;
    if (half_tile)
      parts.add(2 * word + bit / 16, bit % 16, 0, width);
    else
      parts.add(word, bit, 0, width);
  };
  if (width == 1) {
    if (half_tile)
      parts.add(0, 4 * y + u, 0, 1);
    else
      byte_field(u);
  } else if (width == 2) {
    byte_field(32 * (u / 4) + 2 * (u % 4));
  } else if (width == 3) {
    if (selector < 3)
      parts.add(selector, nibble, 0, 3);
    else
      for (int b = 0; b < 3; ++b) parts.add(b, nibble + 3, b, 1);
  } else if (width == 8) {
    byte_field(32 * u);
  } else {
    parts.add(selector, nibble, 0, 4);
    for (int b = 4; b < width; ++b) parts.add(b, nibble + selector, b, 1);
  }
  return parts;
}

constexpr CodeParts code_parts(TileCode code_of_run, int width, bool half_tile, int code) {
  return code_of_run == TileCode::kBytes ? byte_parts(width, half_tile, code)
                                         : stream_parts(width, half_tile, code);
}

/// Codes of 5 and 6 bits with bytes are stored as sign (1: positive) and magnitude; its own
/// inverse.
constexpr std::uint32_t stored_code(TileCode code_of_run, int width, std::uint32_t code) {
  if (code_of_run != TileCode::kBytes || width < 5 || width > 6) return code;
  return (code >> (width - 1)) != 0 ? code : code ^ ((1u << (width - 1)) - 1);
}

/// Where a token is among the 64 of a word of the streams: those that a lane has in one row block
/// of operand A (keys) or one step (values), four in a row (docs/formats/packing.md).
constexpr std::size_t stream_index(Side side, int token) {
  const int step = token / 16, row = token % 16;
  return static_cast<std::size_t>(side == Side::kKey
                                      ? step / 2 * 32 + row % 8 * 4 + step % 2 * 2 + row / 8
                                      : step * 16 + row % 8 / 2 * 4 + row / 8 * 2 + row % 2);
}
/// Byte offset of byte `byte` of a token's stream in its side's streams: 32-bit words [word][64
/// tokens], then what is left in planes of bytes [byte][64].
constexpr std::size_t stream_byte(Side side, int stream_bytes, int token, int byte) {
  const std::size_t index = stream_index(side, token);
  if (byte < stream_bytes / 4 * 4)
    return 4 * (static_cast<std::size_t>(byte / 4) * kPageTokens + index) +
           static_cast<std::size_t>(byte % 4);
  return static_cast<std::size_t>(byte) * kPageTokens + index;
}

/// Byte offset in a tile of word `word` of lane `lane`: 32-bit words in sections of 4, 2 and 1 per
/// lane for a full tile, 16-bit words, word after word, for a half tile.
std::size_t word_offset(int width, int word, int lane, bool half_tile);

/// The place of (token, coordinate within the tile) in a tile of `side`: the fragment element of
/// mma.m16n8k16's operand A.
struct TilePlace {
  int lane = 0, pair = 0, half = 0;
};
TilePlace tile_place(Side side, int token, int coordinate, bool half_tile);

/// Bytes of one token of a KV head's side in the linear form.
std::size_t linear_bytes(const SideLayout& layout);

/// Linear form (docs/formats/packing.md) of the 64 tokens of one KV head, `linear` holding its
/// bytes token after token with stride `token_stride` -> one side of a page, and back. Exact both
/// ways. ArgumentError on sizes.
void to_page(const SideLayout& layout, Side side, std::span<const std::byte> linear,
             std::size_t token_stride, std::span<std::byte> page);
void from_page(const SideLayout& layout, Side side, std::span<const std::byte> page,
               std::size_t token_stride, std::span<std::byte> linear);

}  // namespace kvplan::quant
