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
inline constexpr int kTilePairs =
    16;  // pairs of codes that a lane owns in a tile; 8 in a half tile
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
  kUniform = 1,  // full tiles of width 2 whose levels are (code - 1.5) times `step`
  kHalf = 2,     // width 16: plain fp16 numbers
  kInteger = 3,  // outlier channels: code - 128, times the outlier scale of the token
};

/// Consecutive tiles of one width. A full tile takes 128 * width bytes, a half tile 64 * width.
struct TileRun {
  TileCode code = TileCode::kTable;
  std::uint8_t width = 0;        // 1..8, 16
  std::uint8_t half = 0;         // 1: a single tile of 8 coordinates
  std::uint8_t table = 0;        // index into LayerFormat::tables (kTable, kUniform)
  std::uint16_t tiles = 0;       // number of tiles
  std::uint16_t coordinate = 0;  // storage index of the first coordinate (kInteger: index into the
                                 // head's list of outlier channels)
  std::uint32_t offset = 0;      // bytes from the start of the page
  float step = 0;                // kUniform: distance of neighbouring levels
  bool operator==(const TileRun&) const = default;
};

/// One side of one KV head. Runs of outliers follow those of the codes.
struct SideLayout {
  TileRun runs[kMaxTileRuns];
  std::int32_t run_count = 0;      // without outlier runs
  std::int32_t outlier_runs = 0;   // runs[run_count .. run_count + outlier_runs)
  std::int32_t tiles = 0;          // of all runs, half tiles and outlier tiles count as one each
  std::int32_t coded = 0;          // coordinates of non-zero width (fp16: head_dim)
  std::int32_t outliers = 0;       // channels
  std::uint32_t norm_offset = 0;   // 64 norms, each at its token_index
  std::uint32_t scale_offset = 0;  // 64 fp16 scales of the outliers in the same order
  std::int32_t norm_bytes = 0;     // per token: 1 (log8), 2 (fp16), 0 (a head stored as fp16)
  bool operator==(const SideLayout&) const = default;
};

/// One KV head. Order in a page: K runs, V runs, K norms, V norms, K scales, V scales; each part
/// starts on a multiple of its alignment (runs 16 bytes, norms 16, scales 16).
struct HeadLayout {
  SideLayout k, v;
  std::uint32_t page_bytes = 0;    // multiple of kPageAlignment
  std::uint32_t block_offset = 0;  // of this head's page in a block of the layer's pool
  const SideLayout& side(Side s) const { return s == Side::kKey ? k : v; }
  bool operator==(const HeadLayout&) const = default;
};

/// A layer of the cache. A *block* is the pages of all KV heads for the same 64 tokens; page tables
/// hold block numbers.
struct LayerFormat {
  std::vector<HeadLayout> heads;
  std::vector<std::vector<float>> tables;  // [2^width] ascending levels; equal ones are stored once
  std::uint32_t block_bytes = 0;
  TransformCodecSpec k, v;  // transforms, runs with boundaries, scale rule, norm, means
};

/// The layout of every layer of a plan. InputError, with the field, for what pages cannot hold:
/// codecs other than calibrated, rotated (scalar codes, one fp16 or log8 norm per vector, absmax
/// outliers at 8 bits) and fp16; code tcq; levels of one bit other than -x and x; counts of
/// coordinates of a width that are no multiple of 8; page_tokens other than 64.
std::vector<LayerFormat> page_format(const PlanBundle& bundle);

/// Where code `half` (0, 1) of pair `pair` of a lane is in the lane's words of a full tile (bit
/// within the 32 * width bits of the lane's `width` words), resp. of a half tile (bit within 16 *
/// width bits).
int code_bit(int width, int pair, int half, bool half_tile);

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
