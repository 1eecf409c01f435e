#pragma once
// From the words of a packed tile whose levels are no bytes (tile_bytes.cuh) to operand A of
// mma.m16n8k16 in fp16, one struct per kind of tile
// (docs/formats/packing.md, "Pages and tiles"). Level tables are in shared memory: an entry holds
// two halves, repeated for the 32 lanes so that every look-up is free of conflicts, and an entry's
// address is the table's base | index << 7 | lane * 4. Words are read once and never shuffled
// between lanes.

#include "kernels/ptx.cuh"
#include "kernels/tile_bytes.cuh"
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

/// Full tile, levels from a table.
template <int Width>
struct TableTile {
  static constexpr int kWords = Width;
  KVPLAN_DEVICE explicit TableTile(std::uint32_t table) : base(table) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[kWords], std::uint32_t tile) const {
    load_full<Width>(w, tile);
  }
  template <bool Values>
  KVPLAN_DEVICE void operand(const std::uint32_t (&w)[kWords], int i, std::uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = look_up<Width>(w, kEntryShift, 4 * i + r, base);
  }
  std::uint32_t base;
};

/// 16 coordinates in fp16.
struct HalfPrecisionTile {
  static constexpr int kWords = 16;
  KVPLAN_DEVICE explicit HalfPrecisionTile(std::uint32_t) {}
  KVPLAN_DEVICE void load(std::uint32_t (&w)[16], std::uint32_t tile) const {
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
  KVPLAN_DEVICE void load(std::uint32_t (&w)[8], std::uint32_t tile) const {
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
  KVPLAN_DEVICE void load(std::uint32_t (&w)[kWords], std::uint32_t tile) const {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      w[k] = load_shared_half(tile + 128 * k + 2 * lane());
      if (2 * k + 1 < kWidth) w[k] |= load_shared_half(tile + 128 * k + 64 + 2 * lane()) << 16;
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

/// Calls visit(tile) with the struct of a 16-bit tile's kind; `table` is its table's base | lane *
/// 4.
template <class Visit>
KVPLAN_DEVICE void with_tile(int kind, std::uint32_t table, Visit visit) {
  switch (kind) {
    case kOtherKinds + 2:
      return visit(TableTile<2>(table));
    case kOtherKinds + 3:
      return visit(TableTile<3>(table));
    case kOtherKinds + 4:
      return visit(TableTile<4>(table));
    case kOtherKinds + 5:
      return visit(TableTile<5>(table));
    case kOtherKinds + 6:
      return visit(TableTile<6>(table));
    case kOtherKinds + 7:
      return visit(TableTile<7>(table));
    case kOtherKinds + 8:
      return visit(TableTile<8>(table));
    case kOtherKinds + 16:
      return visit(HalfPrecisionTile(table));
    case kIntegerKind:
      return visit(IntegerTile(table));
    case kHalfKinds + kOtherKinds + 2:
      return visit(HalfTile<TablePairs<2>>(table));
    case kHalfKinds + kOtherKinds + 3:
      return visit(HalfTile<TablePairs<3>>(table));
    case kHalfKinds + kOtherKinds + 4:
      return visit(HalfTile<TablePairs<4>>(table));
    case kHalfKinds + kOtherKinds + 5:
      return visit(HalfTile<TablePairs<5>>(table));
    case kHalfKinds + kOtherKinds + 6:
      return visit(HalfTile<TablePairs<6>>(table));
    case kHalfKinds + kOtherKinds + 7:
      return visit(HalfTile<TablePairs<7>>(table));
    case kHalfKinds + kOtherKinds + 8:
      return visit(HalfTile<TablePairs<8>>(table));
    case kHalfKinds + kOtherKinds + 16:
      return visit(HalfTile<HalfPrecisionPairs>(table));
    default:
      return visit(HalfTile<IntegerPairs>(table));
  }
}

}  // namespace kvplan::kernels
