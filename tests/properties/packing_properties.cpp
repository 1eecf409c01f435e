// Bit fields, fp16 and pages come back as they went in.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "quant/packing.h"
#include "quant/page_layout.h"
#include "schemas/error.h"
#include "tests/quant/page_fixtures.h"

namespace kvplan::quant {
namespace {

RC_GTEST_PROP(Packing, FieldsComeBack, (const std::vector<std::uint64_t>& values)) {
  std::vector<std::pair<std::uint64_t, int>> fields;
  std::size_t bits = 0;
  for (const auto value : values) {
    const int width = *rc::gen::inRange(0, 65);
    fields.emplace_back(width == 64 ? value : value & ((std::uint64_t{1} << width) - 1), width);
    bits += static_cast<std::size_t>(width);
  }
  std::vector<std::byte> bytes((bits + 7) / 8);
  BitWriter writer(bytes);
  for (const auto& [value, width] : fields) writer.put(value, width);
  RC_ASSERT(writer.bit_position() == bits);
  BitReader reader(bytes);
  for (const auto& [value, width] : fields) RC_ASSERT(reader.get(width) == value);
  RC_ASSERT_THROWS_AS(reader.get(64), ArgumentError);
}

RC_GTEST_PROP(Packing, EveryHalfComesBack, (std::uint16_t bits)) {
  const float value = from_half(bits);
  if (std::isnan(value)) {
    RC_ASSERT(std::isnan(from_half(to_half(value))));
  } else {
    RC_ASSERT(to_half(value) == bits);
    RC_ASSERT(round_to_half(value) == value);
  }
}

RC_GTEST_PROP(Packing, HalfIsTheNearest, (std::uint32_t bits)) {
  const auto x = std::bit_cast<float>(bits);
  RC_PRE(std::isfinite(x) && std::abs(x) <= kHalfMax);
  const std::uint16_t half = to_half(x);
  const double error = std::abs(double{from_half(half)} - x);
  for (const int step : {-1, 1}) {
    const auto neighbour = static_cast<std::uint16_t>(half + step);
    const float other = from_half(neighbour);
    if (!std::isfinite(other)) continue;
    RC_ASSERT(error <= std::abs(double{other} - x));
  }
}

/// Widths of a head in groups of 8, descending, or all fp16.
std::vector<int> any_widths(int groups) {
  if (*rc::gen::inRange(0, 8) == 0) return std::vector<int>(static_cast<std::size_t>(groups), 16);
  auto widths = *rc::gen::container<std::vector<int>>(static_cast<std::size_t>(groups),
                                                      rc::gen::inRange(0, 9));
  std::sort(widths.rbegin(), widths.rend());
  return widths;
}

RC_GTEST_PROP(Pages, HoldTheLinearFormExactly, ()) {
  constexpr int kGroups = 6;
  PlanBundle plan =
      testing::calibrated_plan(8 * kGroups, 8, {any_widths(kGroups)}, {any_widths(kGroups)});
  if (*rc::gen::arbitrary<bool>()) plan = testing::with_trellis(plan);
  const auto format = page_format(plan);
  for (const Side side : kSides) {
    const HeadLayout& head = format[0].heads[0];
    const SideLayout& layout = head.side(side);
    const std::size_t bytes = linear_bytes(layout);
    std::vector<std::byte> linear(bytes * kPageTokens), page(head.page_bytes), back(linear.size());
    // The last byte of a token may have bits that belong to no code: those stay zero.
    const std::size_t code_bits = 8 * bytes;
    RC_ASSERT(code_bits % 8 == 0u);
    for (auto& b : linear) b = static_cast<std::byte>(*rc::gen::inRange(0, 256));
    to_page(layout, side, linear, bytes, page);
    from_page(layout, side, page, bytes, back);
    RC_ASSERT(linear == back);
  }
}

}  // namespace
}  // namespace kvplan::quant
