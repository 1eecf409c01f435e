// Exactness of the allocator against brute force and a textbook dynamic programme, ties, edge
// cases.

#include "planner/allocator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "schemas/error.h"

namespace kvplan::planner {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kRounding = 1e-12;  // relative, of double sums

CostUnit unit(std::vector<CostChoice> choices) {
  CostUnit u;
  u.choices = std::move(choices);
  return u;
}

CostTable table_of(std::vector<CostUnit> units, std::int64_t fixed_bits = 0) {
  CostTable table;
  table.units = std::move(units);
  table.fixed_bits = fixed_bits;
  return table;
}

/// Random tables are described by what makes a solver go wrong, not by a model.
struct Shape {
  const char* name;
  int units, choices;
  int max_step;     // sizes grow by 0..max_step grains per choice
  int cost_levels;  // costs are 0..cost_levels-1 times 2^-10, in any order: few levels, many ties
  std::int64_t grain;  // common divisor of the sizes
};

CostTable random_table(const Shape& shape, std::mt19937_64& rng) {
  const auto below = [&rng](int n) {
    return static_cast<int>(rng() % static_cast<std::uint64_t>(n));
  };
  CostTable table;
  table.fixed_bits = below(50);
  for (int u = 0; u < shape.units; ++u) {
    CostUnit next;
    next.layer = u;
    std::int64_t size = below(4) * shape.grain;
    const int choices = 1 + below(shape.choices);
    for (int c = 0; c < choices; ++c) {
      next.choices.push_back({c, size, below(shape.cost_levels) * 0x1p-10});
      size += below(shape.max_step + 1) * shape.grain;
    }
    table.units.push_back(next);
  }
  return table;
}

std::int64_t largest_bits(const CostTable& table) {
  std::int64_t bits = table.fixed_bits;
  for (const CostUnit& u : table.units) bits += u.choices.back().size_bits;
  return bits;
}

Allocation evaluate(const CostTable& table, const std::vector<int>& choice) {
  Allocation a{choice, table.fixed_bits, 0};
  for (std::size_t u = 0; u < choice.size(); ++u) {
    const CostChoice& c = table.units[u].choices[static_cast<std::size_t>(choice[u])];
    a.size_bits += c.size_bits;
    a.cost += c.cost;
  }
  return a;
}

/// All combinations, in lexicographic order of the choices.
std::vector<Allocation> enumerate(const CostTable& table) {
  std::vector<Allocation> all;
  std::vector<int> choice(table.units.size(), 0);
  while (true) {
    all.push_back(evaluate(table, choice));
    std::size_t u = choice.size();
    while (u > 0 && choice[u - 1] + 1 == static_cast<int>(table.units[u - 1].choices.size())) {
      choice[--u] = 0;
    }
    if (u == 0) return all;
    ++choice[u - 1];
  }
}

std::optional<Allocation> brute_force(const std::vector<Allocation>& all, std::int64_t budget) {
  std::optional<Allocation> best;
  for (const Allocation& a : all) {
    if (a.size_bits > budget) continue;
    if (!best || std::tie(a.cost, a.size_bits) < std::tie(best->cost, best->size_bits)) best = a;
  }
  return best;
}

/// Textbook dynamic programme over exact sizes 0..budget; infinity where a size is not reachable.
std::vector<double> textbook_costs(const CostTable& table, std::int64_t budget) {
  std::vector<double> least(static_cast<std::size_t>(budget) + 1, kInfinity);
  least[static_cast<std::size_t>(table.fixed_bits)] = 0;
  for (const CostUnit& u : table.units) {
    std::vector<double> next(least.size(), kInfinity);
    for (std::size_t s = 0; s < least.size(); ++s) {
      for (const CostChoice& c : u.choices) {
        const std::size_t t = s + static_cast<std::size_t>(c.size_bits);
        if (t < next.size()) next[t] = std::min(next[t], least[s] + c.cost);
      }
    }
    least = std::move(next);
  }
  return least;
}

class SmallTables : public testing::TestWithParam<Shape> {};

TEST_P(SmallTables, EveryBudgetAgreesWithBruteForceIncludingTies) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 rng(seed);
    const CostTable table = random_table(GetParam(), rng);
    const std::vector<Allocation> all = enumerate(table);
    for (std::int64_t budget = minimum_bits(table) - 1; budget <= largest_bits(table) + 1;
         ++budget) {
      const std::optional<Allocation> expected = brute_force(all, budget);
      if (!expected) {
        EXPECT_THROW(allocate(table, budget), InfeasibleError) << "budget " << budget;
        continue;
      }
      const Allocation found = allocate(table, budget);
      EXPECT_EQ(found.choice, expected->choice) << "budget " << budget;
      EXPECT_EQ(found.size_bits, expected->size_bits) << "budget " << budget;
      EXPECT_EQ(found.cost, expected->cost) << "budget " << budget;
      EXPECT_LE(lagrangian_bound(table, budget), found.cost + kRounding) << "budget " << budget;
    }
  }
}

TEST_P(SmallTables, FrontAgreesWithBruteForce) {
  for (std::uint64_t seed = 100; seed < 140; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 rng(seed);
    const CostTable table = random_table(GetParam(), rng);
    std::vector<Allocation> all = enumerate(table);
    std::sort(all.begin(), all.end(), [](const Allocation& a, const Allocation& b) {
      return std::tie(a.size_bits, a.cost) < std::tie(b.size_bits, b.cost);
    });
    std::vector<SizeCost> expected;
    for (const Allocation& a : all) {
      if (expected.empty() || a.cost < expected.back().cost)
        expected.push_back({a.size_bits, a.cost});
    }
    const std::vector<SizeCost> front = pareto_front(table);
    ASSERT_EQ(front.size(), expected.size());
    for (std::size_t i = 0; i < front.size(); ++i) {
      EXPECT_EQ(front[i].size_bits, expected[i].size_bits);
      EXPECT_DOUBLE_EQ(front[i].cost, expected[i].cost);
      // A ceiling at a point of the front leads to that point, one just below to the next point.
      EXPECT_EQ(allocate_for_cost(table, expected[i].cost).size_bits, expected[i].size_bits);
      const double below = std::nextafter(expected[i].cost, -1.0);
      if (i + 1 < front.size()) {
        EXPECT_EQ(allocate_for_cost(table, below).size_bits, expected[i + 1].size_bits);
      } else {
        EXPECT_THROW(allocate_for_cost(table, below), InfeasibleError);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, SmallTables,
    testing::Values(Shape{"OneUnit", 1, 9, 5, 1000, 1},
                    Shape{"PairsUnequalSizes", 2, 9, 13, 1000, 1}, Shape{"ManyTies", 6, 4, 2, 3, 1},
                    Shape{"AllCostsZero", 5, 4, 3, 1, 1}, Shape{"UnequalSizes", 5, 5, 9, 100000, 1},
                    Shape{"Grain", 6, 4, 3, 1000, 16}, Shape{"EqualSizes", 4, 6, 0, 50, 1},
                    Shape{"BinaryChoices", 10, 2, 7, 20, 1}),
    [](const auto& row) { return row.param.name; });

class LargerTables : public testing::TestWithParam<Shape> {};

TEST_P(LargerTables, AgreesWithTextbookProgramme) {
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 rng(seed);
    const CostTable table = random_table(GetParam(), rng);
    const std::int64_t low = minimum_bits(table), high = largest_bits(table);
    std::vector<double> least = textbook_costs(table, high);
    for (std::size_t s = 1; s < least.size(); ++s) least[s] = std::min(least[s], least[s - 1]);
    for (int i = 0; i <= 40; ++i) {
      const std::int64_t budget = low + (high - low) * i / 40;
      const Allocation found = allocate(table, budget);
      EXPECT_EQ(found.cost, least[static_cast<std::size_t>(budget)]) << "budget " << budget;
      EXPECT_LE(found.size_bits, budget);
      const Allocation again = evaluate(table, found.choice);
      EXPECT_EQ(found.size_bits, again.size_bits);
      EXPECT_EQ(found.cost, again.cost);
    }
    std::size_t points = 0;
    double previous = kInfinity;
    for (const SizeCost& p : pareto_front(table)) {
      ASSERT_DOUBLE_EQ(p.cost, least[static_cast<std::size_t>(p.size_bits)]);
      ASSERT_LT(p.cost, previous);
      previous = p.cost;
      ++points;
    }
    // The running minimum falls exactly at the points of the front.
    std::size_t falls = 1;
    for (std::int64_t s = low + 1; s <= high; ++s) {
      falls += least[static_cast<std::size_t>(s)] < least[static_cast<std::size_t>(s - 1)] ? 1 : 0;
    }
    EXPECT_EQ(points, falls);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, LargerTables,
                         testing::Values(Shape{"Many", 300, 7, 3, 1 << 20, 1},
                                         Shape{"ManyTies", 200, 7, 3, 4, 1},
                                         Shape{"Grain", 150, 7, 2, 1 << 20, 8},
                                         Shape{"WideSteps", 60, 8, 60, 1 << 20, 1},
                                         Shape{"Subsets", 120, 2, 50, 1000, 1}),
                         [](const auto& row) { return row.param.name; });

/// A calibrated profile's structure: widths 0..6 of groups, costs over decades that are no dyadics.
CostTable calibrated_table(int units, int group_size) {
  constexpr double kDistortion[] = {1.7, .570790, .133121, .035784, .009592, .002511, .000644};
  CostTable table = table_of({}, 8 * units / 4);
  std::mt19937_64 rng(7);
  for (int u = 0; u < units; ++u) {
    const double weight = std::pow(10.0, -static_cast<double>(rng() % 4000) / 1000);
    CostUnit next;
    next.layer = u;
    for (int width = 0; width <= 6; ++width) {
      next.choices.push_back(
          {width, std::int64_t{width} * group_size, weight * kDistortion[width]});
    }
    table.units.push_back(next);
  }
  return table;
}

TEST(Allocator, CalibratedTableAgreesWithTextbookProgramme) {
  const CostTable table = calibrated_table(400, 8);
  std::vector<double> least = textbook_costs(table, largest_bits(table));
  for (std::size_t s = 1; s < least.size(); ++s) least[s] = std::min(least[s], least[s - 1]);
  for (std::int64_t bits = 1; bits <= 6; ++bits) {
    const std::int64_t budget = table.fixed_bits + bits * 400 * 8 - 3;
    const double expected = least[static_cast<std::size_t>(budget)];
    EXPECT_NEAR(allocate(table, budget).cost, expected, kRounding * expected) << bits << " bits";
  }
}

TEST(Allocator, IdenticalUnitsFavourTheSmallerChoiceInEarlierUnits) {
  // 0 -> 2 bits is the steepest step, so 3 units of budget over 3 twins leave one bit for one of
  // them.
  const CostUnit twin = unit({{0, 0, 8}, {1, 1, 5}, {2, 2, 1}, {3, 3, 0}});
  EXPECT_EQ(allocate(table_of({twin, twin, twin}), 3).choice, (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(allocate(table_of({twin, twin, twin}), 4).choice, (std::vector<int>{0, 2, 2}));
  const CostTable many = table_of(std::vector<CostUnit>(500, twin));
  const std::vector<int> choice = allocate(many, 501).choice;
  EXPECT_TRUE(std::is_sorted(choice.begin(), choice.end()));
}

TEST(Allocator, HullMethodsWouldMissTheOptimum) {
  // The hull of each unit is 0 -> 2; at 2 units over both the greedy fill is exact, at 1 it buys
  // nothing.
  const CostTable table = table_of(
      {unit({{0, 0, 8}, {1, 1, 6}, {2, 2, 0}}), unit({{0, 0, 4}, {1, 1, 2.5}, {2, 2, 0}})});
  EXPECT_EQ(allocate(table, 1).choice, (std::vector<int>{1, 0}));
  EXPECT_EQ(allocate(table, 1).cost, 10);
  EXPECT_DOUBLE_EQ(lagrangian_bound(table, 1), 8);
  EXPECT_DOUBLE_EQ(lagrangian_bound(table, 2), 4);
  EXPECT_DOUBLE_EQ(lagrangian_bound(table, 100), 0);
}

TEST(Allocator, EqualCostTakesTheSmallerSize) {
  const CostTable table = table_of({unit({{0, 0, 3}, {1, 4, 1}, {2, 8, 1}})}, 5);
  const Allocation a = allocate(table, 100);
  EXPECT_EQ(a.choice, std::vector<int>{1});
  EXPECT_EQ(a.size_bits, 9);
}

TEST(Allocator, EqualSizesTakeTheCheaperThenTheFirst) {
  const CostTable table = table_of({unit({{0, 4, 3}, {1, 4, 1}, {2, 4, 1}})});
  EXPECT_EQ(allocate(table, 4).choice, std::vector<int>{1});
}

TEST(Allocator, EmptyTableIsItsFixedBits) {
  const CostTable table = table_of({}, 12);
  const Allocation a = allocate(table, 12);
  EXPECT_TRUE(a.choice.empty());
  EXPECT_EQ(a.size_bits, 12);
  EXPECT_EQ(a.cost, 0);
  ASSERT_EQ(pareto_front(table).size(), 1u);
  EXPECT_EQ(pareto_front(table)[0].size_bits, 12);
  EXPECT_EQ(lagrangian_bound(table, 12), 0);
  EXPECT_EQ(allocate_for_cost(table, 0).size_bits, 12);
  EXPECT_THROW(allocate(table, 11), InfeasibleError);
}

TEST(Allocator, RejectsBudgetBelowMinimum) {
  const CostTable table = table_of({unit({{1, 16, 2}, {2, 32, 1}}), unit({{3, 48, 1}})}, 8);
  EXPECT_EQ(minimum_bits(table), 72);
  EXPECT_EQ(allocate(table, 72).choice, (std::vector<int>{0, 0}));
  for (std::int64_t budget : {std::int64_t{71}, std::int64_t{0}, std::int64_t{-5},
                              std::numeric_limits<std::int64_t>::min()}) {
    try {
      allocate(table, budget);
      ADD_FAILURE() << "budget " << budget;
    } catch (const InfeasibleError& e) {
      EXPECT_EQ(e.requested(), static_cast<double>(budget));
      EXPECT_EQ(e.minimum(), 72);
      EXPECT_THAT(e.what(), testing::HasSubstr("72 bits"));
    }
    EXPECT_THROW(lagrangian_bound(table, budget), InfeasibleError);
  }
}

TEST(Allocator, BudgetBeyondMaximumTakesTheCheapest) {
  const CostTable table = table_of({unit({{1, 16, 2}, {2, 32, 1}}), unit({{3, 48, 1}})}, 8);
  const Allocation a = allocate(table, std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(a.choice, (std::vector<int>{1, 0}));
  EXPECT_EQ(a.size_bits, 88);
}

TEST(Allocator, CostCeilingNamesTheLeastReachableCost) {
  const CostTable table = table_of({unit({{0, 0, 2}, {1, 1, .5}}), unit({{0, 0, .25}})});
  EXPECT_EQ(allocate_for_cost(table, kInfinity).size_bits, 0);
  EXPECT_EQ(allocate_for_cost(table, .75).size_bits, 1);
  try {
    allocate_for_cost(table, .7);
    ADD_FAILURE();
  } catch (const InfeasibleError& e) {
    EXPECT_EQ(e.requested(), .7);
    EXPECT_EQ(e.minimum(), .75);
  }
  EXPECT_THROW(allocate_for_cost(table, kNan), ArgumentError);
}

TEST(Allocator, NegativeCostsFromRoundingAreHarmless) {
  const CostTable table =
      table_of({unit({{0, 0, 1}, {1, 1, -0x1p-60}}), unit({{0, 0, 2}, {1, 1, 0}})});
  EXPECT_EQ(allocate(table, 1).choice, (std::vector<int>{0, 1}));
  EXPECT_EQ(allocate(table, 2).choice, (std::vector<int>{1, 1}));
}

TEST(Allocator, ScaleOfCostsDoesNotMatter) {
  std::mt19937_64 rng(3);
  const CostTable table = random_table({"", 40, 7, 4, 1 << 20, 1}, rng);
  const std::int64_t budget = (minimum_bits(table) + largest_bits(table)) / 2;
  const std::vector<int> expected = allocate(table, budget).choice;
  for (const int exponent : {-900, -60, 60, 900}) {
    CostTable scaled = table;
    for (CostUnit& u : scaled.units) {
      for (CostChoice& c : u.choices) c.cost = std::ldexp(c.cost, exponent);
    }
    EXPECT_EQ(allocate(scaled, budget).choice, expected) << "2^" << exponent;
  }
}

TEST(Allocator, RefusesTooManyStates) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 40;
  const CostTable table =
      table_of({unit({{0, 0, 2}, {1, kHuge, 1}}), unit({{0, 0, 2}, {1, 1, 1}})});
  EXPECT_THROW(pareto_front(table), MemoryError);
  EXPECT_THROW(allocate(table, kHuge), MemoryError);
  EXPECT_EQ(allocate(table, 1).choice, (std::vector<int>{0, 1}));
}

struct BadTable {
  const char* name;
  CostTable table;
  const char* message;
};

class BadTables : public testing::TestWithParam<BadTable> {};

TEST_P(BadTables, AreRefusedByEveryFunction) {
  const auto refuses = [](auto call) {
    EXPECT_THAT(call,
                testing::ThrowsMessage<ArgumentError>(testing::HasSubstr(GetParam().message)));
  };
  const CostTable& table = GetParam().table;
  refuses([&] { allocate(table, 1000); });
  refuses([&] { allocate_for_cost(table, 1000); });
  refuses([&] { pareto_front(table); });
  refuses([&] { lagrangian_bound(table, 1000); });
}

constexpr std::int64_t kMaxInt = std::numeric_limits<std::int64_t>::max();

INSTANTIATE_TEST_SUITE_P(
    Tables, BadTables,
    testing::Values(
        BadTable{"NoChoices", table_of({unit({{0, 0, 1}}), unit({})}), "0 choices"},
        BadTable{"TooManyChoices", table_of({unit(std::vector<CostChoice>(257))}), "257 choices"},
        BadTable{"NanCost", table_of({unit({{0, 0, kNan}})}), "finite"},
        BadTable{"InfiniteCost", table_of({unit({{0, 0, kInfinity}, {1, 1, 0}})}), "finite"},
        BadTable{"CostsOverflow",
                 table_of({unit({{0, 0, 1.7e308}, {1, 1, 0}}), unit({{0, 0, 1.7e308}, {1, 1, 0}})}),
                 "more than a double"},
        BadTable{"NegativeSize", table_of({unit({{0, -1, 1}})}), "size -1"},
        BadTable{"DescendingSizes", table_of({unit({{1, 16, 1}, {0, 0, 2}})}), "size 0 after 16"},
        BadTable{"SizesOverflow", table_of({unit({{0, kMaxInt, 1}}), unit({{0, kMaxInt, 1}})}),
                 "2^50"},
        BadTable{"NegativeFixedBits", table_of({unit({{0, 0, 1}})}, -1), "fixed_bits"}),
    [](const auto& row) { return row.param.name; });

}  // namespace
}  // namespace kvplan::planner
