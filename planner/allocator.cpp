#include "planner/allocator.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>

#include "planner/knapsack.h"
#include "schemas/error.h"

namespace kvplan::planner {
namespace {

constexpr int kCostBits = 60;
constexpr std::int64_t kMaxTableBits = std::int64_t{1} << 50;  // of all units together

void check(const CostTable& table) {
  if (table.fixed_bits < 0 || table.fixed_bits > kMaxTableBits) {
    throw ArgumentError("cost table: fixed_bits is " + std::to_string(table.fixed_bits) +
                        ", expected 0 to 2^50");
  }
  std::int64_t total = table.fixed_bits;
  for (const CostUnit& unit : table.units) {
    if (unit.choices.empty() || unit.choices.size() > Knapsack::kMaxChoices) {
      throw ArgumentError("cost table: " + unit_name(unit) + " has " +
                          std::to_string(unit.choices.size()) + " choices, expected 1 to " +
                          std::to_string(Knapsack::kMaxChoices));
    }
    std::int64_t previous = 0;
    for (const CostChoice& choice : unit.choices) {
      if (choice.size_bits < previous) {
        throw ArgumentError("cost table: " + unit_name(unit) + " has size " +
                            std::to_string(choice.size_bits) + " after " +
                            std::to_string(previous) + ", expected sizes >= 0 in ascending order");
      }
      if (!std::isfinite(choice.cost)) {
        throw ArgumentError("cost table: " + unit_name(unit) + " has a cost of " +
                            std::to_string(choice.cost) + " at width " +
                            std::to_string(choice.width) + ", expected a finite number");
      }
      previous = choice.size_bits;
    }
    if (previous > kMaxTableBits - total) {
      throw ArgumentError("cost table: sizes add up to more than 2^50 bits at " + unit_name(unit));
    }
    total += previous;
  }
}

double least_cost(const CostUnit& unit) {
  return std::min_element(unit.choices.begin(), unit.choices.end(),
                          [](const auto& a, const auto& b) { return a.cost < b.cost; })
      ->cost;
}

double greatest_cost(const CostUnit& unit) {
  return std::max_element(unit.choices.begin(), unit.choices.end(),
                          [](const auto& a, const auto& b) { return a.cost < b.cost; })
      ->cost;
}

/// The table as an integer knapsack: sizes above the minimum in units of their greatest common
/// divisor, costs above each unit's least in fixed point.
class IntegerTable {
 public:
  explicit IntegerTable(const CostTable& table)
      : table_(table), minimum_bits_(planner::minimum_bits(table)) {
    double range = 0;
    for (const CostUnit& unit : table.units) {
      range += greatest_cost(unit) - least_cost(unit);
      least_cost_ += least_cost(unit);
      for (const CostChoice& choice : unit.choices) {
        step_bits_ = std::gcd(step_bits_, choice.size_bits - unit.choices.front().size_bits);
      }
    }
    if (!std::isfinite(range) || !std::isfinite(least_cost_)) {
      throw ArgumentError("cost table: the costs add up to more than a double can hold");
    }
    step_bits_ = std::max<std::int64_t>(step_bits_, 1);
    std::frexp(range, &exponent_);
    std::vector<KnapsackClass> classes;
    classes.reserve(table.units.size());
    choice_index_.reserve(table.units.size());
    for (const CostUnit& unit : table.units) add_class(unit, classes);
    knapsack_ = Knapsack(std::move(classes));
  }

  const Knapsack& knapsack() const { return knapsack_; }

  std::int64_t capacity(std::int64_t budget_bits) const {
    if (budget_bits < minimum_bits_) {
      throw InfeasibleError(static_cast<double>(budget_bits), static_cast<double>(minimum_bits_),
                            "a budget of " + std::to_string(budget_bits) +
                                " bits per token is too small: the smallest feasible budget is " +
                                std::to_string(minimum_bits_) + " bits per token");
    }
    return (budget_bits - minimum_bits_) / step_bits_;
  }

  Allocation solve(std::int64_t capacity) const {
    Allocation result{knapsack_.solve(capacity), table_.fixed_bits, 0};
    for (std::size_t u = 0; u < table_.units.size(); ++u) {
      int& choice = result.choice[u];
      choice = choice_index_[u][static_cast<std::size_t>(choice)];
      const CostChoice& chosen = table_.units[u].choices[static_cast<std::size_t>(choice)];
      result.size_bits += chosen.size_bits;
      result.cost += chosen.cost;
    }
    return result;
  }

  std::int64_t size_bits(std::int64_t size) const { return minimum_bits_ + size * step_bits_; }
  double cost(double fixed_point) const {
    return least_cost_ + std::ldexp(fixed_point, exponent_ - kCostBits);
  }

 private:
  void add_class(const CostUnit& unit, std::vector<KnapsackClass>& classes) {
    KnapsackClass kept;
    std::vector<int> index;
    const double least = least_cost(unit);
    for (std::size_t c = 0; c < unit.choices.size(); ++c) {
      const CostChoice& choice = unit.choices[c];
      const KnapsackChoice candidate{
          (choice.size_bits - unit.choices.front().size_bits) / step_bits_,
          std::llround(std::ldexp(choice.cost - least, kCostBits - exponent_))};
      if (!kept.empty() && candidate.cost >= kept.back().cost) continue;  // dominated
      if (!kept.empty() && candidate.size == kept.back().size) {
        kept.pop_back();
        index.pop_back();
      }
      kept.push_back(candidate);
      index.push_back(static_cast<int>(c));
    }
    classes.push_back(std::move(kept));
    choice_index_.push_back(std::move(index));
  }

  const CostTable& table_;
  std::int64_t minimum_bits_ = 0;
  std::int64_t step_bits_ = 0;
  double least_cost_ = 0;  // sum over the units
  int exponent_ = 0;       // all ranges of costs add up to less than 2^exponent_
  std::vector<std::vector<int>> choice_index_;  // knapsack choice -> table choice
  Knapsack knapsack_{{}};
};

}  // namespace

std::int64_t minimum_bits(const CostTable& table) {
  check(table);
  std::int64_t bits = table.fixed_bits;
  for (const CostUnit& unit : table.units) bits += unit.choices.front().size_bits;
  return bits;
}

Allocation allocate(const CostTable& table, std::int64_t budget_bits) {
  const IntegerTable problem(table);
  return problem.solve(problem.capacity(budget_bits));
}

Allocation allocate_for_cost(const CostTable& table, double max_cost) {
  if (std::isnan(max_cost)) throw ArgumentError("the cost ceiling is not a number");
  const IntegerTable problem(table);
  Allocation best = problem.solve(problem.knapsack().max_size());
  if (best.cost > max_cost) {
    throw InfeasibleError(max_cost, best.cost,
                          "a predicted cost of " + std::to_string(max_cost) +
                              " nats per token cannot be met: the least reachable one is " +
                              std::to_string(best.cost));
  }
  std::int64_t low = 0, high = problem.knapsack().max_size();  // high meets the ceiling
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    Allocation candidate = problem.solve(middle);
    if (candidate.cost <= max_cost) {
      high = middle;
      best = std::move(candidate);
    } else {
      low = middle + 1;
    }
  }
  return best;
}

std::vector<SizeCost> pareto_front(const CostTable& table) {
  const IntegerTable problem(table);
  const std::vector<std::int64_t> costs = problem.knapsack().least_costs();
  std::vector<SizeCost> front;
  std::int64_t least = kCostRange;
  for (std::size_t size = 0; size < costs.size(); ++size) {
    if (costs[size] >= least) continue;
    least = costs[size];
    front.push_back({problem.size_bits(static_cast<std::int64_t>(size)),
                     problem.cost(static_cast<double>(least))});
  }
  return front;
}

double lagrangian_bound(const CostTable& table, std::int64_t budget_bits) {
  const IntegerTable problem(table);
  return problem.cost(problem.knapsack().relaxed_cost(problem.capacity(budget_bits)));
}

}  // namespace kvplan::planner
