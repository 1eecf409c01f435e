#pragma once
// Budgets as the user states them, turned into integer bits per token.

#include <cstdint>

#include "schemas/plan.h"

namespace kvplan::planner {

/// What `batch` sequences of `context` tokens store. Sinks and the open page are kept at fp16;
/// floor((context - sink_tokens) / page_tokens) x page_tokens tokens are packed.
struct CacheGeometry {
  std::int64_t elements = 0;  // cached per token
  std::int64_t context = 0, batch = 1;
  int sink_tokens = 4, page_tokens = 64;
};

/// Bytes of the whole cache when a packed token takes `packed_bits`, rounded up to bytes per token:
/// batch x (fp16 tokens x 2 x elements + packed tokens x ceil(packed_bits / 8)).
/// ArgumentError: geometry that is not positive, a negative size, more than 2^63 bytes.
std::int64_t cache_bytes(std::int64_t packed_bits, const CacheGeometry& geometry);

/// The largest packed bits per token within a budget, per kind:
///   bits             floor(value x elements); a product within 1e-9 (relative) of an integer is
///   that
///                    integer, so that 2.3 bits x 1280 elements is 2944
///   bytes_per_token  8 x floor(value), as tokens are stored in whole bytes
///   gib              the largest for which cache_bytes <= value x 2^30; never above 16 x elements
///                    (fp16), which is also the result when no page is full
/// ArgumentError for max_kl (planner::allocate_for_cost takes it), none, unknown kinds, a value
/// that is not positive and finite or is beyond 2^53 bits. InfeasibleError{requested, minimum} in
/// GiB when the fp16 parts alone exceed it.
std::int64_t budget_bits(const BudgetSpec& budget, const CacheGeometry& geometry);

/// Bits per element when fp16 sinks and the open page are charged at `context`: cache_bytes of one
/// sequence over its elements.
double effective_bits_at_context(double effective_bits, const CacheGeometry& geometry);

}  // namespace kvplan::planner
