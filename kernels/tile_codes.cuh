#pragma once
// From the words of a packed tile to operand A of mma.m16n8k16, one struct per kind of tile
// (docs/formats/packing.md, "Pages and tiles"). Level tables are in shared memory: an entry holds
// two halves, repeated for the 32 lanes so that every look-up is free of conflicts, and an entry's
// address is the table's base | index << 7 | lane * 4. Words are read once and never shuffled
// between lanes.

#include "kernels/ptx.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

/// Bits pos .. pos+Bits-1 of the words (wrapping round), moved to the index bits of a table
/// address.
template <int Bits, int Words>
KVPLAN_DEVICE std::uint32_t table_address(const std::uint32_t (&w)[Words], int pos,
                                          std::uint32_t base) {
  const int word = pos / 32, shift = pos % 32;
  std::uint32_t x;
  if (shift == kEntryShift)
    x = w[word];
  else if (shift + Bits > 32)
    x = funnel_right(w[word], w[(word + 1) % Words], shift - kEntryShift);
  else if (shift > kEntryShift)
    x = w[word] >> (shift - kEntryShift);
  else
    x = w[word] << (kEntryShift - shift);
  return mask_or<((1u << Bits) - 1) << kEntryShift>(x, base);
}

/// The two levels of pair `pair` whose codes start at `first` + 2 * Width * pair.
template <int Width, int Words>
KVPLAN_DEVICE std::uint32_t look_up(const std::uint32_t (&w)[Words], int first, int pair,
                                    std::uint32_t base) {
  const int pos = (first + 2 * Width * pair) % (32 * Words);
  if constexpr (Width <= kMaxPairWidth) {
    return load_shared(table_address<2 * Width>(w, pos, base));
  } else {
    const std::uint32_t low = load_shared(table_address<Width>(w, pos, base));
    const std::uint32_t high =
        load_shared(table_address<Width>(w, (pos + Width) % (32 * Words), base));
    return permute(low, high, 0x5410);
  }
}

/// A tile in a ring in shared memory: byte x of it is at ring | (position + x) % size.
struct RingTile {
  std::uint32_t ring, mask, position;
  KVPLAN_DEVICE std::uint32_t at(std::uint32_t x) const { return ((position + x) & mask) | ring; }
};

/// Words of a full tile of Width words per lane: sections of 4, 2 and 1 words.
template <int Width>
KVPLAN_DEVICE void load_full(std::uint32_t (&w)[Width], const RingTile& tile) {
#pragma unroll
  for (int s = 0; s < Width / 4; ++s) {
    const uint4 v = load_shared4(tile.at(s * 512 + 16 * lane()));
    w[4 * s] = v.x, w[4 * s + 1] = v.y, w[4 * s + 2] = v.z, w[4 * s + 3] = v.w;
  }
  constexpr int kDone = Width / 4 * 4;
  if constexpr ((Width & 2) != 0) {
    const uint2 v = load_shared2(tile.at(kDone * 128 + 8 * lane()));
    w[kDone] = v.x, w[kDone + 1] = v.y;
  }
  if constexpr ((Width & 1) != 0)
    w[Width - 1] = load_shared1(tile.at((Width - 1) * 128 + 4 * lane()));
}

/// Full tile, levels from a table.
template <int Width>
struct TableTile {
  static constexpr int kWords = Width;
  KVPLAN_DEVICE explicit TableTile(std::uint32_t table) : base(table) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[kWords], const RingTile& tile) const {
    load_full<Width>(w, tile);
  }
  template <bool Values>
  KVPLAN_DEVICE void operand(const std::uint32_t (&w)[kWords], int i, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = look_up<Width>(w, kEntryShift, 4 * i + r, base);
  }
  std::uint32_t base;
};

/// Width 1, levels -x and x: the code is the sign.
template <>
struct TableTile<1> {
  static constexpr int kWords = 1;
  KVPLAN_DEVICE explicit TableTile(std::uint32_t table) : low(load_shared(table)) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[1], const RingTile& tile) const {
    load_full<1>(w, tile);
  }
  template <bool Values>
  KVPLAN_DEVICE void operand(const std::uint32_t (&w)[1], int i, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = mask_xor<0x80008000>(w[0] << (15 - (4 * i + r)), low);
  }
  std::uint32_t low;  // -x twice
};

/// Where the pairs of a width 2 tile start in their half words, in units of 2 bits.
KVPLAN_DEVICE int pair_start(int pair) {
  constexpr std::uint32_t kStarts = 0x75061324;  // 4 2 3 1 6 0 5 7, the first in the low nibble
  return 2 * static_cast<int>(kStarts >> 4 * (pair % 8) & 7);
}

template <>
struct TableTile<2> {
  static constexpr int kWords = 2;
  KVPLAN_DEVICE explicit TableTile(std::uint32_t table) : base(table) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[2], const RingTile& tile) const {
    load_full<2>(w, tile);
  }
  template <bool Values>
  KVPLAN_DEVICE void operand(const std::uint32_t (&w)[2], int i, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int pair = 4 * i + r, start = pair_start(pair);
      const std::uint32_t x = w[pair / 8];
      const std::uint32_t first =
          start >= kEntryShift ? x >> (start - kEntryShift) : x << (kEntryShift - start);
      const std::uint32_t second = x >> (16 + start - kEntryShift - 2);
      a[r] = load_shared(
          mask_or<3u << kEntryShift>(first, mask_or<3u << (kEntryShift + 2)>(second, base)));
    }
  }
  std::uint32_t base;
};

/// Width 2 with levels (code - 1.5) * step, by arithmetic on the exponent field: registers 0 and 1
/// come out as 4 + code, 2 and 3 as 4 + code / 4. Factor and offsets are in the other operand and
/// in a correction (AttentionView::query, bias).
struct UniformTile {
  static constexpr int kWords = 2;
  static constexpr float kLowOffset = 5.5f, kHighOffset = 17.5f, kHighFactor = 4;
  KVPLAN_DEVICE explicit UniformTile(std::uint32_t) : four(opaque(0x44004400)) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[2], const RingTile& tile) const {
    load_full<2>(w, tile);
  }
  template <bool Values>
  KVPLAN_DEVICE void operand(const std::uint32_t (&w)[2], int i, std::uint32_t (&a)[4]) const {
    constexpr std::uint32_t kOnes = 0x03000300, kQuarters = 0x00c000c0;
    const std::uint32_t x = w[i / 2];
    const std::uint32_t even = i % 2 == 0 ? x : x >> 4;
    a[0] = mask_or<kOnes>(even, four);
    a[2] = mask_or<kQuarters>(even, four);
    if (i % 2 == 0) {
      const std::uint32_t odd = x << 4;
      a[1] = mask_or<kOnes>(odd, four);
      a[3] = mask_or<kQuarters>(odd, four);
    } else {
      a[1] = mask_or<kOnes>(x << 8, four);
      a[3] = mask_or<kQuarters>(x >> 8, four);
    }
  }
  std::uint32_t four;
};

/// 16 coordinates in fp16.
struct HalfPrecisionTile {
  static constexpr int kWords = 16;
  KVPLAN_DEVICE explicit HalfPrecisionTile(std::uint32_t) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[16], const RingTile& tile) const {
    load_full<16>(w, tile);
  }
  template <bool Values>
  KVPLAN_DEVICE void operand(const std::uint32_t (&w)[16], int i, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = w[4 * i + r];
  }
};

/// Signed integers stored as code + 128, at the positions of width 8; `First` as in look_up.
template <int First, int Words>
KVPLAN_DEVICE std::uint32_t integer_pair(const std::uint32_t (&w)[Words], int pair) {
  std::uint32_t code[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int pos = (First + 8 * (2 * pair + h)) % (32 * Words), word = pos / 32, shift = pos % 32;
    code[h] =
        (shift > 24 ? funnel_right(w[word], w[(word + 1) % Words], shift) : w[word] >> shift) &
        0xff;
  }
  // 0x6400 | n is 1024 + n; 0xe480 is -1152.
  return add_halves((code[0] | code[1] << 16) | 0x64006400, 0xe480e480);
}

struct IntegerTile {
  static constexpr int kWords = 8;
  KVPLAN_DEVICE explicit IntegerTile(std::uint32_t) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[8], const RingTile& tile) const {
    load_full<8>(w, tile);
  }
  template <bool Values>
  KVPLAN_DEVICE void operand(const std::uint32_t (&w)[8], int i, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = integer_pair<kEntryShift>(w, 4 * i + r);
  }
};

/// A half tile: 8 coordinates, Width 16-bit words per lane. Pair 2i is register 0, pair 2i+1
/// register 1 of keys and 2 of values; the others are 0.
template <class Pairs>
struct HalfTile {
  static constexpr int kWidth = Pairs::kWidth;
  static constexpr int kWords = (kWidth + 1) / 2;
  KVPLAN_DEVICE explicit HalfTile(std::uint32_t table) : pairs{table} {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[kWords], const RingTile& tile) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      w[k] = load_shared_half(tile.at(128 * k + 2 * lane()));
      if (2 * k + 1 < kWidth) w[k] |= load_shared_half(tile.at(128 * k + 64 + 2 * lane())) << 16;
    }
  }
  template <bool Values>
  KVPLAN_DEVICE void operand(const std::uint32_t (&w)[kWords], int i, std::uint32_t (&a)[4]) const {
    const std::uint32_t first = pairs.pair(w, 2 * i), second = pairs.pair(w, 2 * i + 1);
    a[0] = first, a[1] = Values ? 0 : second, a[2] = Values ? second : 0, a[3] = 0;
  }
  Pairs pairs;
};

template <int Width>
struct TablePairs {
  static constexpr int kWidth = Width;
  template <int Words>
  KVPLAN_DEVICE std::uint32_t pair(const std::uint32_t (&w)[Words], int p) const {
    return look_up<Width>(w, 0, p, base);
  }
  std::uint32_t base;
};
struct IntegerPairs {
  static constexpr int kWidth = quant::kOutlierWidth;
  template <int Words>
  KVPLAN_DEVICE std::uint32_t pair(const std::uint32_t (&w)[Words], int p) const {
    return integer_pair<0>(w, p);
  }
  std::uint32_t unused;
};
struct HalfPrecisionPairs {
  static constexpr int kWidth = 16;
  template <int Words>
  KVPLAN_DEVICE std::uint32_t pair(const std::uint32_t (&w)[Words], int p) const {
    return w[p];
  }
  std::uint32_t unused;
};

/// One number for width, code and half of a run.
inline constexpr int kUniformKind = 17, kIntegerKind = 18, kHalfKinds = 32;
KVPLAN_DEVICE std::uint8_t tile_kind(const quant::TileRun& run) {
  const int full = run.code == quant::TileCode::kUniform   ? kUniformKind
                   : run.code == quant::TileCode::kInteger ? kIntegerKind
                                                           : run.width;
  return static_cast<std::uint8_t>(full + (run.half != 0 ? kHalfKinds : 0));
}

/// Calls visit(tile) with the struct of a tile's kind; `table` is its table's base | lane * 4.
template <class Visit>
KVPLAN_DEVICE void with_tile(int kind, std::uint32_t table, Visit visit) {
  switch (kind) {
    case 1:
      return visit(TableTile<1>(table));
    case 2:
      return visit(TableTile<2>(table));
    case 3:
      return visit(TableTile<3>(table));
    case 4:
      return visit(TableTile<4>(table));
    case 5:
      return visit(TableTile<5>(table));
    case 6:
      return visit(TableTile<6>(table));
    case 7:
      return visit(TableTile<7>(table));
    case 8:
      return visit(TableTile<8>(table));
    case 16:
      return visit(HalfPrecisionTile(table));
    case kUniformKind:
      return visit(UniformTile(table));
    case kIntegerKind:
      return visit(IntegerTile(table));
    case kHalfKinds + 1:
      return visit(HalfTile<TablePairs<1>>(table));
    case kHalfKinds + 2:
      return visit(HalfTile<TablePairs<2>>(table));
    case kHalfKinds + 3:
      return visit(HalfTile<TablePairs<3>>(table));
    case kHalfKinds + 4:
      return visit(HalfTile<TablePairs<4>>(table));
    case kHalfKinds + 5:
      return visit(HalfTile<TablePairs<5>>(table));
    case kHalfKinds + 6:
      return visit(HalfTile<TablePairs<6>>(table));
    case kHalfKinds + 7:
      return visit(HalfTile<TablePairs<7>>(table));
    case kHalfKinds + 8:
      return visit(HalfTile<TablePairs<8>>(table));
    case kHalfKinds + 16:
      return visit(HalfTile<HalfPrecisionPairs>(table));
    default:
      return visit(HalfTile<IntegerPairs>(table));
  }
}

}  // namespace kvplan::kernels
