#pragma once
// The best of everything that a stack can be told, exactly: what projection, `--allow-lower` and
// `plan --for` minimise differs in the cost alone.

#include <array>
#include <functional>
#include <limits>
#include <optional>

#include "exporters/stack.h"

namespace kvplan::exporters {

/// What a stack is told.
struct Assignment {
  const Setting* setting = nullptr;       // into Stack::settings; null with segments
  std::array<Segments, 2> segments = {};  // K, V
  std::vector<LayerFormat> layers = {};
  std::int64_t bytes_per_token = 0;
  double cost = 0;
};

/// Cost of storing one side of a layer in a format; infinity forbids it. Called once for each
/// (layer, side, format).
using FormatCost = std::function<double(int layer, Side side, const Format& format)>;

inline constexpr double kForbidden = std::numeric_limits<double>::infinity();
inline constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();

/// Least total cost with bytes_per_token <= byte_limit; ties: fewest bytes, then fewest layers at
/// 16 bits, then the earliest setting and choices. Nothing if no assignment is both allowed and
/// small enough. The stack must outlive the assignment.
std::optional<Assignment> choose(const Stack& stack, const CacheShape& shape,
                                 const FormatCost& cost, std::int64_t byte_limit = kNoLimit);

}  // namespace kvplan::exporters
