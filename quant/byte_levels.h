#pragma once
// Levels as signed bytes, so that attention multiplies codes in integer matrix units: level = (byte
// + offset) * step.

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "quant/codebook.h"

namespace kvplan::quant {

inline constexpr int kMaxByteWidth = 6;  // of a table of bytes; width 8 is uniform

struct ByteLevels {
  float step = 0, offset = 0;
  std::vector<std::int8_t> bytes;  // [2^width], ascending
};

/// The bytes of ascending levels, to a relative 1e-6; none where levels are on no such grid. Widths
/// 1 (-x, x), 2 and 8 (uniform about 0), 3 (odd multiples of step / 2 up to 255), 4 (up to 127), 5
/// and 6 (up to 255, mirrored about 0).
std::optional<ByteLevels> byte_levels(std::span<const float> levels);

/// A codebook of 3 to 6 bits moved to the grid of byte_levels() that adds least to its distortion:
/// sum of mass * (level - nearest grid point)^2 over 512 steps. Adds .001 %, .3 %, .4 % and 3.5 %
/// at 3, 4, 5, 6 bits for N(0,1). Other widths stay as they are.
Codebook on_byte_grid(const Codebook& book);

}  // namespace kvplan::quant
