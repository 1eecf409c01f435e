#include "quant/byte_levels.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "quant/portable_math.h"

namespace kvplan::quant {
namespace {

constexpr double kTolerance = 1e-6;  // relative, of a level

// The largest odd multiple of half a step that a width's bytes reach; 0: the width has no bytes.
constexpr int largest_multiple(int width) {
  switch (width) {
    case 1:
      return 1;
    case 2:
      return 3;
    case 4:
      return 127;
    case 3:
    case 5:
    case 6:
    case 8:
      return 255;
    default:
      return 0;
  }
}

int width_of(std::size_t levels) {
  int width = 0;
  while ((std::size_t{1} << width) < levels) ++width;
  return (std::size_t{1} << width) == levels ? width : 0;
}

// Levels as odd multiples of half a step whose largest is `top`; empty if one is off.
std::vector<int> multiples(std::span<const float> levels, double half_step) {
  std::vector<int> result;
  for (const float level : levels) {
    const double ratio = level / half_step;
    const double odd = 2 * std::floor(ratio / 2) + 1;
    if (std::abs(ratio - odd) > kTolerance * std::abs(odd)) return {};
    result.push_back(static_cast<int>(odd));
  }
  return result;
}

bool mirrored(std::span<const int> multiples) {
  for (std::size_t i = 0; i < multiples.size(); ++i)
    if (multiples[i] != -multiples[multiples.size() - 1 - i]) return false;
  return true;
}

bool uniform(std::span<const int> multiples) {
  for (std::size_t i = 0; i + 1 < multiples.size(); ++i)
    if (multiples[i + 1] - multiples[i] != 2) return false;
  return mirrored(multiples);
}

// How the kernels make the byte of a level (kernels/tile_bytes.cuh): 0 or 64; 0, 32, 64, 96; the
// grid point; 64 above it.
ByteLevels make_bytes(int width, std::span<const int> multiples, double half_step) {
  ByteLevels result;
  int factor = 1, shift = 0;  // byte = factor * index + shift, index = (multiple - 1) / 2
  if (width == 1) factor = 64, shift = 64;
  if (width == 2) factor = 32, shift = 64;
  if (width == 4) shift = 64;
  result.step = static_cast<float>(2 * half_step / factor);
  result.offset = 0.5f * static_cast<float>(factor) - static_cast<float>(shift);
  for (const int m : multiples)
    result.bytes.push_back(static_cast<std::int8_t>(factor * ((m - 1) / 2) + shift));
  return result;
}

}  // namespace

std::optional<ByteLevels> byte_levels(std::span<const float> levels) {
  const int width = width_of(levels.size()), most = largest_multiple(width);
  if (most == 0 || !(levels.back() > 0)) return std::nullopt;
  for (int top = 1; top <= most; top += 2) {
    const double half_step = double{levels.back()} / top;
    const std::vector<int> found = multiples(levels, half_step);
    if (found.empty() || found.front() < -most) continue;
    if ((width == 2 || width == 8) && !uniform(found)) continue;
    if ((width == 1 || width > 4) && !mirrored(found)) continue;
    return make_bytes(width, found, half_step);
  }
  return std::nullopt;
}

Codebook on_byte_grid(const Codebook& book) {
  if (book.bits < 3 || book.bits > kMaxByteWidth) return book;
  const std::size_t n = book.levels.size() / 2;
  const std::span positive = std::span(book.levels).subspan(n);
  // Masses of the cells of N(0,1), which every coordinate is close to.
  std::vector<double> mass(n);
  double all = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double lower = i == 0 ? 0 : book.boundaries[n - 1 + i];
    const double upper =
        i + 1 < n ? double{book.boundaries[n + i]} : 2 * double{positive[i]} - lower;
    mass[i] = (upper - lower) * portable_exp(-0.5 * double{positive[i]} * positive[i]);
    all += 2 * mass[i];
  }
  const int most = largest_multiple(book.bits);
  constexpr int kSteps = 512;
  double least = 0, best = 0;
  const auto nearest = [](double level, double half_step) {
    return (2 * std::floor(level / half_step / 2) + 1) * half_step;
  };
  for (int k = 0; k < kSteps; ++k) {
    // The outermost level may lie inside the grid or a little beyond its end.
    const double half_step = double{positive.back()} / most * (0.95 + 0.65 * k / kSteps);
    double error = 0;
    bool distinct = true;
    for (std::size_t i = 0; i < n; ++i) {
      const double level = std::min(nearest(positive[i], half_step), most * half_step);
      distinct = distinct && (i == 0 || level > std::min(nearest(positive[i - 1], half_step),
                                                         most * half_step));
      error += 2 * mass[i] / all * (level - positive[i]) * (level - positive[i]);
    }
    if (!distinct || (best > 0 && error >= least)) continue;
    least = error;
    best = half_step;
  }
  Codebook moved = book;
  for (std::size_t i = 0; i < n; ++i) {
    const double level = std::min(nearest(positive[i], best), most * best);
    moved.levels[n + i] = static_cast<float>(level);
    moved.levels[n - 1 - i] = static_cast<float>(-level);
  }
  moved.boundaries = midpoints(moved.levels);
  moved.distortion = book.distortion + least;
  return moved;
}

}  // namespace kvplan::quant
