#pragma once
// From the words of a packed tile whose levels are bytes to operand A of the integer mma, one
// struct per width (docs/formats/packing.md, "Pages and tiles"; quant::byte_parts). A lane's 32
// codes come out as 8 registers of four bytes; register 2 i + h is row block h (8 rows) of token
// block i (16 tokens) for keys, and of values row block h of channels in token block i. A half tile
// gives 4 registers. A table of up to 8 bytes is two registers and a look-up of four codes one
// instruction (select_bytes).

#include "kernels/ptx.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

/// Words of a full tile of Width words per lane at a shared address: sections of 4, 2 and 1 words.
template <int Width>
KVPLAN_DEVICE void load_full(std::uint32_t (&w)[Width], std::uint32_t tile) {
#pragma unroll
  for (int s = 0; s < Width / 4; ++s) {
    const uint4 v = load_shared4(tile + s * 512 + 16 * lane());
    w[4 * s] = v.x, w[4 * s + 1] = v.y, w[4 * s + 2] = v.z, w[4 * s + 3] = v.w;
  }
  constexpr int kDone = Width / 4 * 4;
  if constexpr ((Width & 2) != 0) {
    const uint2 v = load_shared2(tile + kDone * 128 + 8 * lane());
    w[kDone] = v.x, w[kDone + 1] = v.y;
  }
  if constexpr ((Width & 1) != 0)
    w[Width - 1] = load_shared1(tile + (Width - 1) * 128 + 4 * lane());
}

/// Words of a half tile: Width of 16 bits per lane.
template <int Width>
KVPLAN_DEVICE void load_half(std::uint32_t (&w)[Width], std::uint32_t tile) {
#pragma unroll
  for (int k = 0; k < Width; ++k) w[k] = load_shared_half(tile + 64 * k + 2 * lane());
}

// What the four bytes of a register come from. `w`: selectors of four nibbles in 16 bits, of a full
// tile two in a word.
template <int Width>
struct ByteTable;

/// 8 levels: three bits of a nibble.
template <>
struct ByteTable<3> {
  std::uint32_t low, high;
  KVPLAN_DEVICE explicit ByteTable(const std::uint32_t* levels) : low(levels[0]), high(levels[1]) {}
  /// Selectors of step k; the last one is spread over the nibbles' fourth bits.
  KVPLAN_DEVICE std::uint32_t selector(const std::uint32_t (&w)[3], int k) const {
    if (k < 3) return w[k] & 0x77777777;
    return mask_or<0x11111111>(w[0] >> 3, mask_or<0x22222222>(w[1] >> 2, (w[2] >> 1) & 0x44444444));
  }
  template <bool Half>
  KVPLAN_DEVICE void bytes(const std::uint32_t (&w)[3], int k, std::uint32_t* a) const {
    const std::uint32_t s = selector(w, k);
    a[0] = select_bytes(low, high, s);
    if constexpr (!Half) a[1] = select_bytes(low, high, s >> 16);
  }
};

/// 16 levels 0..127: an index with the fourth bit set selects a sign bit, which is 0.
struct SixteenBytes {
  std::uint32_t low[2], high[2];
  KVPLAN_DEVICE explicit SixteenBytes(const std::uint32_t* levels)
      : low{levels[0], levels[1]}, high{levels[2], levels[3]} {}
  KVPLAN_DEVICE std::uint32_t look_up(std::uint32_t x, std::uint32_t inverted) const {
    return select_bytes(low[0], low[1], x) | select_bytes(high[0], high[1], inverted);
  }
};

template <>
struct ByteTable<4> : SixteenBytes {
  using SixteenBytes::SixteenBytes;
  /// What adds up to bytes(): one of a pair of bytes is 0.
  KVPLAN_DEVICE void summands(const std::uint32_t (&w)[4], int k, std::uint32_t* a,
                              std::uint32_t* b) const {
    const std::uint32_t x = w[k], inverted = x ^ 0x88888888;
    a[0] = select_bytes(low[0], low[1], x), b[0] = select_bytes(high[0], high[1], inverted);
    a[1] = select_bytes(low[0], low[1], x >> 16);
    b[1] = select_bytes(high[0], high[1], inverted >> 16);
  }
  template <bool Half>
  KVPLAN_DEVICE void bytes(const std::uint32_t (&w)[4], int k, std::uint32_t* a) const {
    const std::uint32_t x = w[k], inverted = x ^ 0x88888888;
    a[0] = look_up(x, inverted);
    if constexpr (!Half) a[1] = look_up(x >> 16, inverted >> 16);
  }
};

/// All bits of the bytes whose sign is 0 (negative); signs: bit k < 3 of each nibble. Selected
/// bytes are 0 or 255, so it does not matter whether the fourth bit asks for their sign.
KVPLAN_DEVICE std::uint32_t negative_bytes(std::uint32_t signs, int k) {
  constexpr std::uint32_t kLow[] = {0x00ff00ff, 0x0000ffff, 0xffffffff};
  return select_bytes(kLow[k], k < 2 ? kLow[k] : 0, signs);
}

/// The signs of step k, bit k of each nibble, where negative_bytes finds them.
KVPLAN_DEVICE std::uint32_t shifted_signs(std::uint32_t plane, int k) {
  return k < 3 ? plane : plane >> 1;
}

/// Sign and 16 magnitudes.
template <>
struct ByteTable<5> : SixteenBytes {
  using SixteenBytes::SixteenBytes;
  template <bool Half>
  KVPLAN_DEVICE void bytes(const std::uint32_t (&w)[5], int k, std::uint32_t* a) const {
    const std::uint32_t x = w[k], inverted = x ^ 0x88888888, signs = shifted_signs(w[4], k);
    const int bit = k < 3 ? k : 2;
    a[0] = look_up(x, inverted) ^ negative_bytes(signs, bit);
    if constexpr (!Half) a[1] = look_up(x >> 16, inverted >> 16) ^ negative_bytes(signs >> 16, bit);
  }
};

/// Sign and 32 magnitudes.
template <>
struct ByteTable<6> {
  std::uint32_t table[8];
  KVPLAN_DEVICE explicit ByteTable(const std::uint32_t* levels) {
#pragma unroll
    for (int i = 0; i < 8; ++i) table[i] = levels[i];
  }
  template <bool Half>
  KVPLAN_DEVICE void bytes(const std::uint32_t (&w)[6], int k, std::uint32_t* a) const {
    constexpr std::uint32_t kFourth = 0x88888888;
    const std::uint32_t x = w[k], plane = (k < 3 ? w[4] << (3 - k) : w[4]) & kFourth;
    const std::uint32_t signs = shifted_signs(w[5], k), other = plane ^ kFourth;
    // The fourth bit of a nibble is clear in one of the four.
    const std::uint32_t selectors[4] = {x | plane, (x ^ kFourth) | plane, x | other,
                                        (x ^ kFourth) | other};
#pragma unroll
    for (int r = 0; r < (Half ? 1 : 2); ++r) {
      std::uint32_t sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum |= select_bytes(table[2 * i], table[2 * i + 1], selectors[i] >> 16 * r);
      a[r] = sum ^ negative_bytes(signs >> 16 * r, k < 3 ? k : 2);
    }
  }
};

/// A full tile whose levels are looked up.
template <int Width>
struct ByteTile {
  static constexpr int kWords = Width;
  static constexpr bool kHalfTile = false;
  KVPLAN_DEVICE explicit ByteTile(const std::uint32_t* levels) : table(levels) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[kWords], std::uint32_t tile) const {
    load_full<Width>(w, tile);
  }
  KVPLAN_DEVICE void registers(const std::uint32_t (&w)[kWords], std::uint32_t (&a)[8]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) table.template bytes<false>(w, k, a + 2 * k);
  }
  ByteTable<Width> table;
};

/// Width 1: 0 or 64.
template <>
struct ByteTile<1> {
  static constexpr int kWords = 1;
  static constexpr bool kHalfTile = false;
  KVPLAN_DEVICE explicit ByteTile(const std::uint32_t*) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[1], std::uint32_t tile) const {
    load_full<1>(w, tile);
  }
  KVPLAN_DEVICE void registers(const std::uint32_t (&w)[1], std::uint32_t (&a)[8]) const {
#pragma unroll
    for (int u = 0; u < 8; ++u) a[u] = (u < 7 ? w[0] << (6 - u) : w[0] >> 1) & 0x40404040;
  }
};

/// Width 2: 32 times the code.
template <>
struct ByteTile<2> {
  static constexpr int kWords = 2;
  static constexpr bool kHalfTile = false;
  KVPLAN_DEVICE explicit ByteTile(const std::uint32_t*) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[2], std::uint32_t tile) const {
    load_full<2>(w, tile);
  }
  KVPLAN_DEVICE static std::uint32_t field(std::uint32_t x, int f) {
    return (f < 3 ? x << (5 - 2 * f) : x >> 1) & 0x60606060;
  }
  KVPLAN_DEVICE void registers(const std::uint32_t (&w)[2], std::uint32_t (&a)[8]) const {
#pragma unroll
    for (int u = 0; u < 8; ++u) a[u] = field(w[u / 4], u % 4);
  }
};

/// Width 8: code - 128.
template <>
struct ByteTile<8> {
  static constexpr int kWords = 8;
  static constexpr bool kHalfTile = false;
  KVPLAN_DEVICE explicit ByteTile(const std::uint32_t*) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[8], std::uint32_t tile) const {
    load_full<8>(w, tile);
  }
  KVPLAN_DEVICE void registers(const std::uint32_t (&w)[8], std::uint32_t (&a)[8]) const {
#pragma unroll
    for (int u = 0; u < 8; ++u) a[u] = w[u] ^ 0x80808080;
  }
};

/// A half tile, 8 coordinates: the codes of a token block in one register.
template <int Width>
struct ByteHalfTile {
  static constexpr int kWords = Width;
  static constexpr bool kHalfTile = true;
  KVPLAN_DEVICE explicit ByteHalfTile(const std::uint32_t* run_levels) : levels(run_levels) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[kWords], std::uint32_t tile) const {
    load_half<Width>(w, tile);
  }
  KVPLAN_DEVICE void registers(const std::uint32_t (&w)[kWords], std::uint32_t (&a)[4]) const {
    if constexpr (Width == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = select_bytes(0x4000, 0, w[0] >> i & 0x1111);
    } else if constexpr (Width == 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = ByteTile<2>::field(w[0] | w[1] << 16, i);
    } else if constexpr (Width == 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = (w[2 * i] | w[2 * i + 1] << 16) ^ 0x80808080;
    } else {
      const ByteTable<Width> table(levels);
#pragma unroll
      for (int i = 0; i < 4; ++i) table.template bytes<true>(w, i, a + i);
    }
  }
  const std::uint32_t* levels;
};

/// Calls visit(tile) with the struct of a run's tiles.
template <class Visit>
KVPLAN_DEVICE void with_byte_tile(const RunEntry& run, bool half_tile, int width, Visit visit) {
  if (half_tile) {
    switch (width) {
      case 1:
        return visit(ByteHalfTile<1>(run.levels));
      case 2:
        return visit(ByteHalfTile<2>(run.levels));
      case 3:
        return visit(ByteHalfTile<3>(run.levels));
      case 4:
        return visit(ByteHalfTile<4>(run.levels));
      case 5:
        return visit(ByteHalfTile<5>(run.levels));
      case 6:
        return visit(ByteHalfTile<6>(run.levels));
      default:
        return visit(ByteHalfTile<8>(run.levels));
    }
  }
  switch (width) {
    case 1:
      return visit(ByteTile<1>(run.levels));
    case 2:
      return visit(ByteTile<2>(run.levels));
    case 3:
      return visit(ByteTile<3>(run.levels));
    case 4:
      return visit(ByteTile<4>(run.levels));
    case 5:
      return visit(ByteTile<5>(run.levels));
    case 6:
      return visit(ByteTile<6>(run.levels));
    default:
      return visit(ByteTile<8>(run.levels));
  }
}

}  // namespace kvplan::kernels
