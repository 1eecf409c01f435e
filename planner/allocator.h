#pragma once
// Exact allocation of widths to units: multiple-choice knapsack by dynamic programming.

#include <cstdint>
#include <vector>

#include "schemas/cost_table.h"

namespace kvplan::planner {

/// Least total cost with size_bits <= budget_bits (fixed_bits included). Exact (Kellerer, Pferschy, Pisinger, "Knapsack
/// Problems" (2004), section 11.5): D_u is not convex between 0, 1 and 2 bits, so hull methods are not.
/// Ties: smaller size, then the smaller choice in the earliest unit. InfeasibleError{requested, minimum} in bits.
Allocation allocate(const CostTable& table, std::int64_t budget_bits);

/// Smallest size whose least cost is <= max_cost. InfeasibleError with the least reachable cost.
Allocation allocate_for_cost(const CostTable& table, double max_cost);

/// All non-dominated (size, cost) pairs, ascending size; from one dynamic programme.
struct SizeCost {
  std::int64_t size_bits = 0;
  double cost = 0;
};
std::vector<SizeCost> pareto_front(const CostTable& table);

/// Lower bound on the cost at a budget by Lagrangian relaxation (convex hulls of the units); allocate() - bound is the gap that
/// greedy methods leave open.
double lagrangian_bound(const CostTable& table, std::int64_t budget_bits);

std::int64_t minimum_bits(const CostTable& table);

}  // namespace kvplan::planner
