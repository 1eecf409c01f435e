#include "planner/constraints.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "schemas/error.h"
#include "schemas/plan.h"

namespace kvplan::planner {
namespace {

std::string list(const std::vector<int>& values) {
  std::string text;
  for (int value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
  return text;
}

/// Units with equal keys share one width.
std::pair<int, int> merge_key(Merge merge, const CostUnit& unit, int index) {
  const int side = static_cast<int>(unit.side);
  switch (merge) {
    case Merge::kNone:
      return {index, 0};
    case Merge::kTensor:
      return {unit.layer, side};
    case Merge::kLayer:
      return {unit.layer, 0};
    case Merge::kSides:
      return {0, side};
    case Merge::kAll:
      return {0, 0};
  }
  throw InternalError("unknown Merge value " + std::to_string(static_cast<int>(merge)));
}

/// What bound units have in common: width and number of outlier channels.
const CostChoice* find_alike(const CostUnit& unit, const CostChoice& wanted) {
  const auto found =
      std::find_if(unit.choices.begin(), unit.choices.end(), [&](const CostChoice& c) {
        return c.width == wanted.width && c.outliers == wanted.outliers;
      });
  return found == unit.choices.end() ? nullptr : &*found;
}

/// The allowed choices of one unit; width and outlier count are the key that binds units,
/// so each pair occurs once.
std::vector<CostChoice> allowed_choices(const CostUnit& unit, const std::vector<int>& widths) {
  std::vector<CostChoice> allowed;
  std::set<std::pair<int, int>> seen;
  for (const CostChoice& choice : unit.choices) {
    if (!seen.insert({choice.width, choice.outliers}).second) {
      throw ArgumentError(unit_name(unit) + " lists width " + std::to_string(choice.width) +
                          " twice: constraints need distinct widths");
    }
    if (widths.empty() || std::find(widths.begin(), widths.end(), choice.width) != widths.end()) {
      allowed.push_back(choice);
    }
  }
  if (allowed.empty()) {
    throw ArgumentError("the width set {" + list(widths) + "} leaves " + unit_name(unit) +
                        " without a choice: allow one of its widths");
  }
  return allowed;
}

/// Binds one more unit to a merged one: common widths stay, sizes and costs add up.
void bind(CostUnit& merged, const CostUnit& unit, const std::vector<CostChoice>& allowed) {
  std::vector<CostChoice> common;
  for (const CostChoice& choice : allowed) {
    if (const CostChoice* sum = find_alike(merged, choice)) {
      common.push_back({choice.width, sum->size_bits + choice.size_bits, sum->cost + choice.cost,
                        choice.outliers});
    }
  }
  if (common.empty()) {
    throw ArgumentError(unit_name(unit) + " shares no allowed width with the units it is bound to");
  }
  merged.choices = std::move(common);
  merged.elements += unit.elements;
}

/// Charges skipped units at fp16 and takes back the norms of their vectors.
std::int64_t fixed_bits_with_fp16(const CostTable& table, const std::vector<int>& fp16_units) {
  std::int64_t bits = table.fixed_bits;
  std::set<std::tuple<int, Side, int>> vectors;
  for (int u : fp16_units) {
    const CostUnit& unit = table.units[static_cast<std::size_t>(u)];
    if (unit.elements <= 0) {
      throw ArgumentError(unit_name(unit) + " names no elements, so its fp16 size is unknown");
    }
    bits += kFp16Width * unit.elements;
    if (vectors.insert({unit.layer, unit.side, unit.head}).second) bits -= table.vector_bits;
  }
  return bits;
}

}  // namespace

MergedTable merge_units(const CostTable& table, const Constraints& constraints) {
  std::set<int> missing(constraints.skip_layers.begin(), constraints.skip_layers.end());
  const std::set<int> skipped = missing;
  MergedTable merged;
  std::map<std::pair<int, int>, std::size_t> position;
  for (int u = 0; u < static_cast<int>(table.units.size()); ++u) {
    const CostUnit& unit = table.units[static_cast<std::size_t>(u)];
    if (skipped.contains(unit.layer)) {
      missing.erase(unit.layer);
      merged.fp16_units.push_back(u);
      continue;
    }
    std::vector<CostChoice> allowed = allowed_choices(unit, constraints.widths);
    const auto [at, is_new] =
        position.try_emplace(merge_key(constraints.merge, unit, u), merged.members.size());
    if (is_new) {
      merged.members.push_back({u});
      merged.table.units.push_back(unit);
      merged.table.units.back().choices = std::move(allowed);
    } else {
      merged.members[at->second].push_back(u);
      bind(merged.table.units[at->second], unit, allowed);
    }
  }
  if (!missing.empty()) {
    throw ArgumentError("layer " + std::to_string(*missing.begin()) +
                        " is to be skipped, but the model has no such layer");
  }
  merged.table.fixed_bits = fixed_bits_with_fp16(table, merged.fp16_units);
  merged.table.vector_bits = table.vector_bits;
  merged.table.elements = table.elements;
  return merged;
}

Allocation expand(const MergedTable& merged, const CostTable& original,
                  const Allocation& allocation) {
  if (allocation.choice.size() != merged.members.size()) {
    throw ArgumentError("the allocation has " + std::to_string(allocation.choice.size()) +
                        " choices, the merged table " + std::to_string(merged.members.size()) +
                        " units");
  }
  std::size_t units = merged.fp16_units.size();
  for (const std::vector<int>& members : merged.members) units += members.size();
  if (units != original.units.size()) {
    throw ArgumentError("the merged table binds " + std::to_string(units) +
                        " units, the original has " + std::to_string(original.units.size()));
  }
  Allocation result{std::vector<int>(original.units.size(), kFp16Choice), merged.table.fixed_bits,
                    0};
  for (std::size_t i = 0; i < merged.members.size(); ++i) {
    const std::vector<CostChoice>& choices = merged.table.units[i].choices;
    const int chosen = allocation.choice[i];
    if (chosen < 0 || static_cast<std::size_t>(chosen) >= choices.size()) {
      throw ArgumentError("choice " + std::to_string(chosen) + " of merged unit " +
                          std::to_string(i) + " is outside 0.." +
                          std::to_string(choices.size() - 1));
    }
    const CostChoice& wanted = choices[static_cast<std::size_t>(chosen)];
    for (int u : merged.members[i]) {
      const CostUnit& unit = original.units[static_cast<std::size_t>(u)];
      const CostChoice* choice = find_alike(unit, wanted);
      if (choice == nullptr) {
        throw ArgumentError(unit_name(unit) + " does not offer width " +
                            std::to_string(wanted.width) +
                            ": the merged table is of another table");
      }
      result.choice[static_cast<std::size_t>(u)] = static_cast<int>(choice - unit.choices.data());
      result.size_bits += choice->size_bits;
    }
  }
  for (std::size_t u = 0; u < original.units.size(); ++u) {
    if (result.choice[u] == kFp16Choice) continue;
    result.cost += original.units[u].choices[static_cast<std::size_t>(result.choice[u])].cost;
  }
  return result;
}

}  // namespace kvplan::planner
