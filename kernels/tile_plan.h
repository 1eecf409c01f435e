#pragma once
// What MixedPath keeps of a head in a warp's shared memory. Private to kernels.

#include <cstddef>
#include <cstdint>

namespace kvplan::kernels {

/// Warps of a block, at most: 255 registers per thread. Two pages side by side hide more latency
/// than more warps would.
inline constexpr int kMixedWarps = 8;

/// The bytes of levels of 3, 4, 5 and 6 bits begin at these words of a side's table.
constexpr int table_word_of(int width) { return width < 6 ? 4 * (width - 3) : 12; }
constexpr int table_words(int width) { return width < 3 || width > 6 ? 0 : width < 6 ? 4 : 8; }

struct alignas(16) TileTables {
  std::uint32_t words[2][20];  // of keys, of values
};

/// Bytes of the largest tile of a page: so far behind a half of a page tiles are read ahead.
inline constexpr std::size_t kReadAhead = 1024;

/// Between the phases of two pages, so that both can be read at once from shared memory.
inline constexpr int kPhaseGap = 32;

/// TileTables and behind them LayerView::page_phase of two pages, kPhaseGap bytes apart.
constexpr std::size_t mixed_bytes(int phase_steps) {
  return sizeof(TileTables) + 2 * 64 * static_cast<std::size_t>(phase_steps) + kPhaseGap;
}

}  // namespace kvplan::kernels
