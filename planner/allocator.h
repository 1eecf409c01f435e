#pragma once
// Exact allocation of widths to units: multiple-choice knapsack by dynamic programming.

#include <cstdint>
#include <vector>

#include "schemas/cost_table.h"

namespace kvplan::planner {

// All functions throw ArgumentError for a table that is none: a unit without choices or with more
// than 256, choices not in ascending size, negative sizes, costs that are not finite. MemoryError
// when the sizes have too small a common divisor for the states to be held.
//
// Costs are compared as 60-bit fixed-point numbers relative to the table's range of costs, which is
// finer than the rounding of a double sum and makes results independent of the order of additions.

/// Least total cost with size_bits <= budget_bits (fixed_bits included). Exact (Kellerer, Pferschy,
/// Pisinger, "Knapsack Problems" (2004), section 11.5): D_u is not convex between 0, 1 and 2 bits,
/// so hull methods are not. Ties: smaller size, then the smaller choice in the earliest unit.
/// `cost` is the sum over the units in their order. InfeasibleError{requested, minimum} in bits.
Allocation allocate(const CostTable& table, std::int64_t budget_bits);

/// Smallest size whose least cost is <= max_cost. InfeasibleError{requested, minimum} with the
/// least reachable cost. ArgumentError for a max_cost that is NaN.
Allocation allocate_for_cost(const CostTable& table, double max_cost);

struct SizeCost {
  std::int64_t size_bits = 0;
  double cost = 0;
};

/// All non-dominated (size, cost) pairs, ascending size, descending cost; from one dynamic
/// programme. A cost may differ from that of allocate() at the same size in its last bits (relative
/// 1e-12), because no choices are summed.
std::vector<SizeCost> pareto_front(const CostTable& table);

/// Lower bound on the cost at a budget by Lagrangian relaxation (convex hulls of the units), up to
/// rounding (relative 1e-12): allocate() - bound is the gap that greedy methods may leave open.
/// InfeasibleError as in allocate.
double lagrangian_bound(const CostTable& table, std::int64_t budget_bits);

/// Size with the smallest choice everywhere, fixed_bits included.
std::int64_t minimum_bits(const CostTable& table);

}  // namespace kvplan::planner
