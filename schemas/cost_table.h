#pragma once
// What the planner sees: units to be given a width each, with size and cost of every choice. quant
// builds it.

#include <cstdint>
#include <string>
#include <vector>

#include "schemas/types.h"

namespace kvplan {

struct CostChoice {
  int width = 0;               // bits per coordinate (label of the choice)
  std::int64_t size_bits = 0;  // payload bits per token
  double cost = 0;             // nats per token
  int outliers = 0;            // channels of the head at 8 bits beside `width` (rotated codecs)
};

/// One group of coordinates of one head, or, after planner::merge_units, several of them bound
/// together.
struct CostUnit {
  int layer = 0;
  Side side = Side::kKey;
  int head = 0;
  int group = 0;                    // in descending lambda order
  std::int64_t elements = 0;        // cached elements per token that the unit covers
  std::vector<CostChoice> choices;  // ascending size_bits
};

/// "unit (layer 3, k, head 0, group 2)", for messages.
inline std::string unit_name(const CostUnit& unit) {
  return "unit (layer " + std::to_string(unit.layer) + ", " + side_name(unit.side) + ", head " +
         std::to_string(unit.head) + ", group " + std::to_string(unit.group) + ")";
}

struct CostTable {
  std::vector<CostUnit> units;  // ordered by layer, side, head, group
  std::int64_t fixed_bits = 0;  // per token whatever the choices: norms and other side information
  std::int64_t vector_bits =
      0;  // the part of fixed_bits that each vector (layer, side, head) stores: its norm
  std::int64_t elements = 0;  // cached elements per token, the denominator of effective bits
};

/// A choice that no table lists: the unit stays at fp16 (kFp16Width), costs nothing and stores no
/// norm.
inline constexpr int kFp16Choice = -1;

/// choice[i] indexes units[i].choices, or is kFp16Choice for the whole (layer, side). size_bits
/// includes fixed_bits.
struct Allocation {
  std::vector<int> choice;
  std::int64_t size_bits = 0;
  double cost = 0;
};

}  // namespace kvplan
