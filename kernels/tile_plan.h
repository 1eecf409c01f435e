#pragma once
// What MixedPath keeps of a head in a warp's shared memory. Private to kernels.

#include <cstddef>
#include <cstdint>

namespace kvplan::kernels {

inline constexpr int kMaxMixedSteps = 8;  // of LayerView::phase_steps

/// The bytes of levels of 3, 4, 5 and 6 bits begin at these words of a side's table.
constexpr int table_word_of(int width) { return width < 6 ? 4 * (width - 3) : 12; }
constexpr int table_words(int width) { return width < 3 || width > 6 ? 0 : width < 6 ? 4 : 8; }

struct alignas(16) TileTables {
  std::uint32_t words[2][20];  // of keys, of values
};

/// TileTables and behind them how frequencies turn from a page to the one after the next:
/// [phase_steps][4 lanes t] cos, sin of frequencies 8 s + t and 8 s + 4 + t.
constexpr std::size_t mixed_bytes(int phase_steps) {
  return sizeof(TileTables) + static_cast<std::size_t>(phase_steps) * 4 * 4 * sizeof(float);
}

}  // namespace kvplan::kernels
