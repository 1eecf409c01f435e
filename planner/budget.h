#pragma once
// Budgets as the user states them, turned into integer bits per token.

#include <cstdint>

#include "schemas/plan.h"

namespace kvplan::planner {

/// Everything stored for one sequence of `context` tokens: sinks at fp16, whole packed pages, the open page at fp16.
struct CacheGeometry {
  std::int64_t elements = 0;  // per token
  std::int64_t context = 0, batch = 1;
  int sink_tokens = 4, page_tokens = 64;
};

/// bits: floor(value x elements); bytes_per_token: 8 x value; gib: the largest packed bits per token such that batch sequences
/// of context tokens with their fp16 parts fit. ArgumentError for max_kl (planner::allocate_for_cost) or a non-positive value;
/// InfeasibleError when the fp16 parts alone exceed the GiB.
std::int64_t budget_bits(const BudgetSpec& budget, const CacheGeometry& geometry);

/// Effective bits when fp16 sinks and the open page are charged at `context`.
double effective_bits_at_context(double effective_bits, const CacheGeometry& geometry);

}  // namespace kvplan::planner
