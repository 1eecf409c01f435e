#pragma once
// What MixedPath keeps of a head in a warp's shared memory. Private to kernels.

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace kvplan::kernels {

/// Warps of a block, at most: 168 registers per thread.
inline constexpr int kMixedWarps = 12;

/// The bytes of levels of 3, 4, 5 and 6 bits begin at these words of a side's table.
constexpr int table_word_of(int width) { return width < 6 ? 4 * (width - 3) : 12; }
constexpr int table_words(int width) { return width < 3 || width > 6 ? 0 : width < 6 ? 4 : 8; }

struct alignas(16) TileTables {
  std::uint32_t words[2][20];  // of keys, of values
  float2 norms[2][32];         // of a page: of keys, of values
};

/// Blocks of 16 positions of half a page, all that MixedPath needs of the rotary tile.
inline constexpr int kHalfPageRows = 2;

}  // namespace kvplan::kernels
