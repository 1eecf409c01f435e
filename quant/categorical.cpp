#include "quant/categorical.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <numeric>

#include "quant/portable_math.h"

namespace kvplan::quant {
namespace {

constexpr std::size_t kBlock = 64;

float largest(std::span<const float> x) {
  // Several maxima at once: a compiler may not reorder a single one.
  std::array<float, 16> lanes{};
  std::size_t i = 0;
  for (; i + lanes.size() <= x.size(); i += lanes.size())
    for (std::size_t lane = 0; lane < lanes.size(); ++lane)
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  for (; i < x.size(); ++i) lanes[0] = std::max(lanes[0], x[i]);
  return *std::max_element(lanes.begin(), lanes.end());
}

}  // namespace

std::size_t draw_categorical(std::span<const float> weights, const RandomStream& stream) {
  double first = std::numeric_limits<double>::infinity();  // the earliest clock so far
  std::size_t winner = 0;
  for (std::size_t begin = 0; begin < weights.size(); begin += kBlock) {
    const auto block = weights.subspan(begin, std::min(kBlock, weights.size() - begin));
    const double peak = largest(block);
    if (!(peak > 0)) continue;
    RandomStream draws = stream.part(static_cast<std::uint32_t>(begin / kBlock));
    // The k-th smallest of n values Exp(1) is the one before plus Exp(n - k), at any free place.
    std::array<std::uint8_t, kBlock> places;
    std::iota(places.begin(), places.end(), std::uint8_t{0});
    double clock = 0;
    for (std::size_t left = block.size(); left > 0; --left) {
      const double u = draws.next_uniform(), reach = first * peak;
      // -log u >= 1 - u spares most blocks the logarithm.
      if (clock + (1 - u) / static_cast<double>(left) >= reach) break;
      clock -= portable_log(u) / static_cast<double>(left);
      if (clock >= reach) break;
      const std::uint32_t drawn = draws.next_below(static_cast<std::uint32_t>(left));
      const std::size_t place = places[drawn];
      places[drawn] = places[left - 1];
      const double weight = block[place];
      if (weight > 0 && clock / weight < first) {
        first = clock / weight;
        winner = begin + place;
      }
    }
  }
  return winner;
}

}  // namespace kvplan::quant
