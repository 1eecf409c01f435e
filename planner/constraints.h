#pragma once
// Stack and hardware constraints as merged units: one width per tensor, per layer or for K and V;
// width sets; skipped layers.

#include <vector>

#include "schemas/cost_table.h"

namespace kvplan::planner {

enum class Merge {
  kNone,
  kTensor,  // one width per (layer, side)
  kLayer,   // one per layer, K = V
  kSides,   // one for all K, one for all V
  kAll,     // one for everything
};

struct Constraints {
  Merge merge = Merge::kNone;
  std::vector<int> widths = {};       // allowed widths; empty: all
  std::vector<int> skip_layers = {};  // kept at fp16: 16 bits per element, no norm, no cost
};

/// A smaller problem and the way back. members[i] lists the original units bound in merged unit i,
/// ascending; merged units are in the order of their first member and carry its layer, side, head
/// and group. Skipped layers are part of the merged table's fixed_bits.
struct MergedTable {
  CostTable table;
  std::vector<std::vector<int>> members;
  std::vector<int> fp16_units;  // original units of skipped layers
};

/// Merged choices are the allowed widths that all members offer; sizes and costs are sums in unit
/// order. ArgumentError: a width set that leaves a unit without a choice, members without a common
/// width, a width listed twice in a unit, a layer to skip that the table lacks, or one whose units
/// name no elements.
MergedTable merge_units(const CostTable& table, const Constraints& constraints);

/// Allocation over the original units from one over the merged table; `cost` is the sum in original
/// unit order. Skipped units get kFp16Choice. ArgumentError when the arguments do not belong
/// together.
Allocation expand(const MergedTable& merged, const CostTable& original,
                  const Allocation& allocation);

}  // namespace kvplan::planner
