// Merged units, width sets and skipped layers, and the way back to the original units.

#include "planner/constraints.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "planner/allocator.h"
#include "schemas/error.h"

namespace kvplan::planner {
namespace {

using testing::ElementsAre;

constexpr int kGroupSize = 16;
constexpr std::int64_t kNormBits = 8;

/// Costs fall from weight x 4^0 with each bit; weights differ between units so that unbound widths
/// would too.
CostTable model(int layers, int heads, int groups, int max_width = 4) {
  CostTable table;
  double weight = 1;
  for (int layer = 0; layer < layers; ++layer) {
    for (Side side : kSides) {
      for (int head = 0; head < heads; ++head) {
        for (int group = 0; group < groups; ++group) {
          CostUnit unit{layer, side, head, group, kGroupSize, {}};
          double cost = weight;
          for (int width = 0; width <= max_width; ++width, cost /= 4) {
            unit.choices.push_back({width, std::int64_t{width} * kGroupSize, cost});
          }
          table.units.push_back(unit);
          table.elements += kGroupSize;
          weight *= 1.75;
        }
        table.fixed_bits += kNormBits;
      }
    }
  }
  table.vector_bits = kNormBits;
  return table;
}

int chosen_width(const CostTable& table, const Allocation& a, std::size_t u) {
  return table.units[u].choices[static_cast<std::size_t>(a.choice[u])].width;
}

struct MergeRow {
  const char* name;
  Merge merge;
  std::size_t units;  // of 3 layers x 2 sides x 2 heads x 2 groups
  bool (*bound)(const CostUnit&, const CostUnit&);
};

class Merges : public testing::TestWithParam<MergeRow> {};

TEST_P(Merges, BindExactlyTheirMembers) {
  const CostTable table = model(3, 2, 2);
  const MergedTable merged = merge_units(table, {.merge = GetParam().merge});
  ASSERT_EQ(merged.table.units.size(), GetParam().units);
  std::vector<std::size_t> unit_of(table.units.size());
  std::size_t seen = 0;
  for (std::size_t i = 0; i < merged.members.size(); ++i) {
    for (int u : merged.members[i]) {
      unit_of[static_cast<std::size_t>(u)] = i;
      ++seen;
    }
    EXPECT_EQ(merged.table.units[i].elements,
              kGroupSize * static_cast<std::int64_t>(merged.members[i].size()));
  }
  EXPECT_EQ(seen, table.units.size());
  for (std::size_t a = 0; a < table.units.size(); ++a) {
    for (std::size_t b = 0; b < table.units.size(); ++b) {
      if (a == b) continue;
      EXPECT_EQ(unit_of[a] == unit_of[b], GetParam().bound(table.units[a], table.units[b]))
          << "units " << a << ", " << b;
    }
  }
}

TEST_P(Merges, ExpandedAllocationIsOneOfTheOriginalTable) {
  const CostTable table = model(3, 2, 2);
  const MergedTable merged = merge_units(table, {.merge = GetParam().merge});
  const double free_cost = allocate(table, table.fixed_bits + 2 * table.elements).cost;
  const std::int64_t budget = table.fixed_bits + 2 * table.elements;
  const Allocation small = allocate(merged.table, budget);
  const Allocation a = expand(merged, table, small);
  ASSERT_EQ(a.choice.size(), table.units.size());
  EXPECT_EQ(a.size_bits, small.size_bits);
  EXPECT_LE(a.size_bits, budget);
  EXPECT_NEAR(a.cost, small.cost, 1e-12 * small.cost);
  EXPECT_GE(a.cost, free_cost * (1 - 1e-12));
  double cost = 0;
  for (std::size_t u = 0; u < table.units.size(); ++u) {
    cost += table.units[u].choices[static_cast<std::size_t>(a.choice[u])].cost;
  }
  EXPECT_EQ(a.cost, cost);
  for (std::size_t i = 0; i < merged.members.size(); ++i) {
    for (int u : merged.members[i]) {
      EXPECT_EQ(chosen_width(table, a, static_cast<std::size_t>(u)),
                chosen_width(merged.table, small, i));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Rows, Merges,
    testing::Values(
        MergeRow{"None", Merge::kNone, 24, [](const CostUnit&, const CostUnit&) { return false; }},
        MergeRow{"Tensor", Merge::kTensor, 6,
                 [](const CostUnit& a, const CostUnit& b) {
                   return a.layer == b.layer && a.side == b.side;
                 }},
        MergeRow{"Layer", Merge::kLayer, 3,
                 [](const CostUnit& a, const CostUnit& b) { return a.layer == b.layer; }},
        MergeRow{"Sides", Merge::kSides, 2,
                 [](const CostUnit& a, const CostUnit& b) { return a.side == b.side; }},
        MergeRow{"All", Merge::kAll, 1, [](const CostUnit&, const CostUnit&) { return true; }}),
    [](const auto& row) { return row.param.name; });

TEST(Constraints, MergedChoicesAreSums) {
  CostTable table = model(1, 1, 1);
  table.units[0].choices = {{0, 0, 8}, {2, 32, 2}, {4, 64, .5}};
  table.units[1].choices = {{1, 16, 4}, {2, 40, 1}, {3, 48, .75}, {4, 64, .25}};
  const MergedTable merged = merge_units(table, {.merge = Merge::kAll});
  const std::vector<CostChoice>& choices = merged.table.units.at(0).choices;
  ASSERT_EQ(choices.size(), 2u);  // widths 2 and 4 are common
  EXPECT_EQ(choices[0].width, 2);
  EXPECT_EQ(choices[0].size_bits, 72);
  EXPECT_EQ(choices[0].cost, 3);
  EXPECT_EQ(choices[1].width, 4);
  EXPECT_THAT(expand(merged, table, allocate(merged.table, merged.table.fixed_bits + 128)).choice,
              ElementsAre(2, 3));
}

TEST(Constraints, WidthSetLimitsChoices) {
  const CostTable table = model(2, 1, 2);
  const MergedTable merged = merge_units(table, {.widths = {4, 2, 7}});
  for (const CostUnit& unit : merged.table.units) {
    ASSERT_EQ(unit.choices.size(), 2u);
    EXPECT_EQ(unit.choices[0].width, 2);
    EXPECT_EQ(unit.choices[1].width, 4);
  }
  const Allocation a =
      expand(merged, table, allocate(merged.table, table.fixed_bits + 3 * table.elements));
  for (std::size_t u = 0; u < table.units.size(); ++u) {
    EXPECT_THAT(chosen_width(table, a, u), testing::AnyOf(2, 4));
  }
}

TEST(Constraints, SkippedLayersCostFp16WithoutNorm) {
  const CostTable table = model(3, 2, 2);
  const MergedTable merged = merge_units(table, {.skip_layers = {1, 1}});
  // Layer 1: 2 sides x 2 heads x 32 elements at 16 bits, 4 norms of 8 bits fewer.
  EXPECT_EQ(merged.table.fixed_bits, table.fixed_bits + 128 * 16 - 4 * kNormBits);
  EXPECT_EQ(merged.table.elements, table.elements);
  EXPECT_THAT(merged.fp16_units, ElementsAre(8, 9, 10, 11, 12, 13, 14, 15));
  EXPECT_EQ(merged.table.units.size(), 16u);

  const Allocation a = expand(merged, table, allocate(merged.table, 10'000));
  double cost = 0;
  for (std::size_t u = 0; u < table.units.size(); ++u) {
    EXPECT_EQ(a.choice[u] == kFp16Choice, table.units[u].layer == 1);
    if (a.choice[u] != kFp16Choice) cost += table.units[u].choices.back().cost;
  }
  EXPECT_EQ(a.cost, cost);
  EXPECT_EQ(a.size_bits, merged.table.fixed_bits + 16 * 64);
}

TEST(Constraints, SkippingEveryLayerLeavesFp16) {
  const CostTable table = model(2, 1, 2);
  const MergedTable merged = merge_units(table, {.merge = Merge::kAll, .skip_layers = {0, 1}});
  EXPECT_TRUE(merged.table.units.empty());
  EXPECT_EQ(merged.table.fixed_bits, 16 * table.elements);
  const Allocation a = expand(merged, table, allocate(merged.table, 16 * table.elements));
  EXPECT_THAT(a.choice, testing::Each(kFp16Choice));
  EXPECT_EQ(a.cost, 0);
}

TEST(Constraints, RefusesImpossibleConstraints) {
  const CostTable table = model(2, 1, 2);
  EXPECT_THAT([&] { merge_units(table, {.widths = {5, 8}}); },
              testing::ThrowsMessage<ArgumentError>(testing::HasSubstr("{5, 8}")));
  EXPECT_THAT([&] { merge_units(table, {.skip_layers = {2}}); },
              testing::ThrowsMessage<ArgumentError>(testing::HasSubstr("layer 2")));
  EXPECT_THROW(merge_units(table, {.skip_layers = {-1}}), ArgumentError);

  CostTable disjoint = table;
  disjoint.units[1].choices = {{7, 112, 0}};
  EXPECT_NO_THROW(merge_units(disjoint, {}));
  EXPECT_THAT([&] { merge_units(disjoint, {.merge = Merge::kTensor}); },
              testing::ThrowsMessage<ArgumentError>(testing::HasSubstr("group 1")));

  CostTable repeated = table;
  repeated.units[0].choices = {{2, 32, 1}, {2, 40, .5}};
  EXPECT_THROW(merge_units(repeated, {}), ArgumentError);

  CostTable no_elements = table;
  no_elements.units[3].elements = 0;
  EXPECT_NO_THROW(merge_units(no_elements, {}));
  EXPECT_THROW(merge_units(no_elements, {.skip_layers = {0, 1}}), ArgumentError);
}

TEST(Constraints, ExpandRefusesAnAllocationOfAnotherTable) {
  const CostTable table = model(2, 1, 2);
  const MergedTable merged = merge_units(table, {.merge = Merge::kLayer});
  Allocation a = allocate(merged.table, 10'000);
  Allocation short_one = a, outside = a, negative = a;
  short_one.choice.pop_back();
  outside.choice[0] = 5;
  negative.choice[1] = kFp16Choice;
  for (const Allocation& bad : {short_one, outside, negative}) {
    EXPECT_THROW(expand(merged, table, bad), ArgumentError);
  }
  EXPECT_THROW(expand(merged, model(1, 1, 1), a), ArgumentError);
  EXPECT_THROW(expand(merged, model(2, 1, 2, 1), a), ArgumentError);
}

}  // namespace
}  // namespace kvplan::planner
