#pragma once
// From codes to the words of a packed tile (docs/formats/packing.md, "Pages and tiles"): twins of
// quant::byte_parts and quant::stream_parts, and the inverse of tile_bytes.cuh and tile_codes.cuh.
// Codes come as bytes in shared memory: byte y of register u of the lane that owns the code, as
// quant::byte_parts counts them.

#include "kernels/page_access.cuh"
#include "kernels/ptx.cuh"
#include "quant/page_layout.h"

namespace kvplan::kernels {

/// Bytes from a register of the lanes to their next: one word more than they take, so that neither
/// those who write the codes of a coordinate nor those who read registers meet in a bank.
inline constexpr int kRegisterBytes = 4 * quant::kWarpLanes + 4;

/// Where the codes of the tile that begins at a coordinate are, or how many bytes those before
/// take.
constexpr int codes_offset(int coordinate) { return coordinate / 8 * 4 * kRegisterBytes; }

// The byte of a code in its tile is token_byte() + coordinate_byte(). In operand A tokens are the
// rows of keys and the columns of values.
KVPLAN_DEVICE int column_byte(int column) {
  return 4 * (column / 2 % 4) + 2 * (column % 2) + column / 8 % 2;
}
KVPLAN_DEVICE int token_byte(int side, bool half_tile, int token) {
  const int step = half_tile ? kRegisterBytes : 2 * kRegisterBytes;
  const int second = half_tile ? 1 : kRegisterBytes;  // for rows 8..15
  return token / 16 * step +
         (side == kKeys ? 16 * (token % 8) + token / 8 % 2 * second : column_byte(token));
}
KVPLAN_DEVICE int coordinate_byte(int side, int coordinate) {
  return side == kKeys ? column_byte(coordinate)
                       : 16 * (coordinate % 8) + coordinate / 8 * kRegisterBytes;
}

/// Four bytes below 16 as nibbles.
KVPLAN_DEVICE std::uint32_t nibbles(std::uint32_t bytes) {
  return permute(bytes | bytes >> 4, 0, 0x4420);
}

/// The words of a lane from its registers of codes, of which a half tile has 4 and words of 16
/// bits.
template <int Width, bool Half>
KVPLAN_DEVICE void byte_words(const std::uint32_t (&codes)[Half ? 4 : 8],
                              std::uint32_t (&words)[Width]) {
  constexpr int kRegisters = Half ? 4 : 8;
  constexpr std::uint32_t kOnes = 0x01010101;
  // Of step k: one register of a half tile, two of a full one.
  const auto selector = [&](int k, int shift, std::uint32_t bits) {
    if constexpr (Half)
      return nibbles(codes[k] >> shift & bits * kOnes);
    else
      return nibbles(codes[2 * k] >> shift & bits * kOnes) |
             nibbles(codes[2 * k + 1] >> shift & bits * kOnes) << 16;
  };
#pragma unroll
  for (int k = 0; k < Width; ++k) words[k] = 0;
  if constexpr (Width == 8) {
#pragma unroll
    for (int u = 0; u < kRegisters; ++u)
      if constexpr (Half)
        words[2 * u] = codes[u] & 0xffff, words[2 * u + 1] = codes[u] >> 16;
      else
        words[u] = codes[u];
  } else if constexpr (Width == 2) {
#pragma unroll
    for (int u = 0; u < kRegisters; ++u) words[u / 4] |= codes[u] << 2 * (u % 4);
    if constexpr (Half) words[1] = words[0] >> 16, words[0] &= 0xffff;
  } else if constexpr (Width == 1) {
#pragma unroll
    for (int u = 0; u < kRegisters; ++u) words[0] |= (Half ? nibbles(codes[u]) : codes[u]) << u;
  } else if constexpr (Width == 3) {
    const std::uint32_t spread = selector(3, 0, 7);
#pragma unroll
    for (int k = 0; k < 3; ++k) words[k] = selector(k, 0, 7) | (spread >> k & 0x11111111) << 3;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      words[k] = selector(k, 0, 15);
#pragma unroll
      for (int bit = 4; bit < Width; ++bit) words[bit] |= selector(k, bit, 1) << k;
    }
  }
}

/// quant::stored_code of four codes.
template <int Width>
KVPLAN_DEVICE std::uint32_t stored_codes(std::uint32_t codes) {
  if constexpr (Width != 5 && Width != 6) return codes;
  const std::uint32_t negative = ~codes >> (Width - 1) & 0x01010101;
  return codes ^ ((negative << (Width - 1)) - negative);
}

template <int Width, bool Half>
KVPLAN_DEVICE void store_words(const std::uint32_t (&words)[Width], std::byte* tile) {
  if constexpr (Half) {
    auto* const to = reinterpret_cast<std::uint16_t*>(tile) + lane();
#pragma unroll
    for (int k = 0; k < Width; ++k)
      to[quant::kWarpLanes * k] = static_cast<std::uint16_t>(words[k]);
  } else {
    constexpr int kDone = Width / 4 * 4;
#pragma unroll
    for (int k = 0; k < kDone; k += 4)
      reinterpret_cast<uint4*>(tile + word_offset(Width, k, lane()))[0] =
          uint4{words[k], words[k + 1], words[k + 2], words[k + 3]};
    if constexpr ((Width & 2) != 0)
      reinterpret_cast<uint2*>(tile + word_offset(Width, kDone, lane()))[0] =
          uint2{words[kDone], words[kDone + 1]};
    if constexpr ((Width & 1) != 0)
      reinterpret_cast<std::uint32_t*>(tile + word_offset(Width, Width - 1, lane()))[0] =
          words[Width - 1];
  }
}

template <int Width, bool Half>
KVPLAN_DEVICE void store_bytes(std::uint32_t (&codes)[Half ? 4 : 8], std::byte* tile) {
#pragma unroll
  for (std::uint32_t& four : codes) four = stored_codes<Width>(four);
  std::uint32_t words[Width];
  byte_words<Width, Half>(codes, words);
  store_words<Width, Half>(words, tile);
}

/// A stream of codes; `from`: the lane's in a tile.
template <bool Half>
KVPLAN_DEVICE void store_stream(int width, const std::byte* from, std::byte* tile) {
  constexpr int kWordBits = Half ? 16 : 32, kFours = Half ? 4 : 8;
  const auto codes = [&](int u) {
    return *reinterpret_cast<const std::uint32_t*>(from + u * kRegisterBytes);
  };
  std::uint64_t bits = 0;
  std::uint32_t first = 0;  // word, to which the last code may come back
  int filled = Half ? 0 : quant::kStreamStart, word = 0;
#pragma unroll 1
  for (int i = 0; i < kFours; ++i) {
    // In the order of the stream, then side by side.
    const std::uint32_t four =
        Half ? permute(codes(i), 0, 0x3120)
             : permute(codes(i & ~1), codes(i | 1), i % 2 == 0 ? 0x6420 : 0x7531);
    const std::uint32_t pairs = (four & 0xff00ff) | (four >> 8 & 0xff00ff) << width;
    bits |= std::uint64_t{(pairs & 0xffff) | pairs >> 16 << 2 * width} << filled;
    filled += 4 * width;
#pragma unroll 1
    for (; filled >= kWordBits; filled -= kWordBits, bits >>= kWordBits, ++word) {
      const auto low = static_cast<std::uint32_t>(bits);
      if constexpr (Half)
        reinterpret_cast<std::uint16_t*>(tile)[quant::kWarpLanes * word + lane()] =
            static_cast<std::uint16_t>(low);
      else if (word == 0)
        first = low;
      else
        *reinterpret_cast<std::uint32_t*>(tile + word_offset(width, word, lane())) = low;
    }
  }
  if constexpr (!Half)
    *reinterpret_cast<std::uint32_t*>(tile + word_offset(width, 0, lane())) =
        first | static_cast<std::uint32_t>(bits);
}

/// A tile of widths up to 8. By a warp.
template <bool Half>
KVPLAN_DEVICE void store_tile(quant::TileCode code, int width, const std::byte* from,
                              std::byte* tile) {
  from += 4 * lane();
  if (code != quant::TileCode::kBytes) return store_stream<Half>(width, from, tile);
  std::uint32_t codes[Half ? 4 : 8];
#pragma unroll
  for (int u = 0; u < (Half ? 4 : 8); ++u)
    codes[u] = *reinterpret_cast<const std::uint32_t*>(from + u * kRegisterBytes);
  switch (width) {
    case 1:
      return store_bytes<1, Half>(codes, tile);
    case 2:
      return store_bytes<2, Half>(codes, tile);
    case 3:
      return store_bytes<3, Half>(codes, tile);
    case 4:
      return store_bytes<4, Half>(codes, tile);
    case 5:
      return store_bytes<5, Half>(codes, tile);
    case 6:
      return store_bytes<6, Half>(codes, tile);
    default:
      return store_bytes<8, Half>(codes, tile);
  }
}

}  // namespace kvplan::kernels
