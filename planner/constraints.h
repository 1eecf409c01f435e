#pragma once
// Stack and hardware constraints as merged units: one width per tensor, per layer or for K and V; width sets; skipped layers.

#include <string>
#include <vector>

#include "schemas/cost_table.h"

namespace kvplan::planner {

enum class Merge { kNone, kTensor /* one width per (layer, side) */, kLayer /* per layer, K = V */, kSides /* one K and one V width for all layers */, kAll };

struct Constraints {
  Merge merge = Merge::kNone;
  std::vector<int> widths;       // allowed widths; empty: all
  std::vector<int> skip_layers;  // kept at fp16
};

/// A smaller problem and the way back. `members[i]` lists the original units bound in merged unit i; merged choices are the
/// widths that all members offer.
struct MergedTable {
  CostTable table;
  std::vector<std::vector<int>> members;
  std::vector<int> fp16_units;  // original units of skipped layers
};

/// ArgumentError: a width set that leaves a unit without a choice, a layer index outside the model.
MergedTable merge_units(const CostTable& table, const Constraints& constraints, int head_dim_elements_per_group,
                        std::int64_t fixed_bits_per_skipped_side);

/// Allocation over the original units from one over the merged table. Skipped units get choice -1 (fp16).
Allocation expand(const MergedTable& merged, const CostTable& original, const Allocation& allocation);

}  // namespace kvplan::planner
