// The allocator against every allocation there is.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "planner/allocator.h"
#include "schemas/error.h"

namespace kvplan::planner {
namespace {

constexpr double kRounding = 1e-12;

/// Up to five units of up to four choices, with costs in any order and many ties.
CostTable any_table() {
  CostTable table;
  table.fixed_bits = *rc::gen::inRange(0, 20);
  const int units = *rc::gen::inRange(1, 6);
  for (int u = 0; u < units; ++u) {
    CostUnit unit;
    unit.layer = u;
    std::int64_t size = *rc::gen::inRange(0, 6);
    const int choices = *rc::gen::inRange(1, 5);
    for (int c = 0; c < choices; ++c) {
      unit.choices.push_back({c, size, *rc::gen::inRange(0, 50) * 0x1p-6});
      size += *rc::gen::inRange(0, 9);
    }
    table.units.push_back(std::move(unit));
  }
  return table;
}

/// Least cost of all allocations of at most `budget` bits; none when there is none.
std::optional<double> brute_force(const CostTable& table, std::size_t unit, std::int64_t budget) {
  if (unit == table.units.size()) return budget >= 0 ? std::optional(0.0) : std::nullopt;
  std::optional<double> best;
  for (const auto& choice : table.units[unit].choices) {
    const auto rest = brute_force(table, unit + 1, budget - choice.size_bits);
    if (rest && (!best || *rest + choice.cost < *best)) best = *rest + choice.cost;
  }
  return best;
}

RC_GTEST_PROP(Allocator, FindsTheLeastCost, ()) {
  const CostTable table = any_table();
  const std::int64_t budget = *rc::gen::inRange(0, 120);
  const auto best = brute_force(table, 0, budget - table.fixed_bits);
  if (!best) {
    RC_ASSERT_THROWS_AS(allocate(table, budget), InfeasibleError);
    RC_ASSERT(minimum_bits(table) > budget);
    return;
  }
  const Allocation found = allocate(table, budget);
  RC_ASSERT(found.size_bits <= budget);
  RC_ASSERT(std::abs(found.cost - *best) <= kRounding * (1 + *best));
  RC_ASSERT(lagrangian_bound(table, budget) <= *best + kRounding * (1 + *best));
}

RC_GTEST_PROP(Allocator, FrontIsWhatBudgetsReach, ()) {
  const CostTable table = any_table();
  for (const auto& point : pareto_front(table)) {
    const Allocation at = allocate(table, point.size_bits);
    RC_ASSERT(at.size_bits == point.size_bits);
    RC_ASSERT(std::abs(at.cost - point.cost) <= kRounding * (1 + point.cost));
    RC_ASSERT(allocate_for_cost(table, point.cost + kRounding).size_bits <= point.size_bits);
  }
}

}  // namespace
}  // namespace kvplan::planner
