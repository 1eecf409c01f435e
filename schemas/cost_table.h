#pragma once
// What the planner sees: units to be given a width each, with size and cost of every choice. quant builds it.

#include <cstdint>
#include <string>
#include <vector>

#include "schemas/types.h"

namespace kvplan {

struct CostChoice {
  int width = 0;                // bits per coordinate (label of the choice)
  std::int64_t size_bits = 0;   // payload bits per token
  double cost = 0;              // nats per token
};

/// One group of coordinates of one head, or, after planner::merge_units, several of them bound together.
struct CostUnit {
  int layer = 0;
  Side side = Side::kKey;
  int head = 0;
  int group = 0;  // in descending lambda order
  std::vector<CostChoice> choices;  // ascending size_bits
};

struct CostTable {
  std::vector<CostUnit> units;      // ordered by layer, side, head, group
  std::int64_t fixed_bits = 0;      // per token whatever the choices: norms and other side information
  std::int64_t elements = 0;        // cached elements per token, the denominator of effective bits
};

/// choice[i] indexes units[i].choices. size_bits includes fixed_bits.
struct Allocation {
  std::vector<int> choice;
  std::int64_t size_bits = 0;
  double cost = 0;
};

}  // namespace kvplan
