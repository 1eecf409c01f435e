#pragma once
// Multiple-choice knapsack in integers: the exact solver behind planner/allocator.h. Internal to
// planner.

#include <cstdint>
#include <vector>

namespace kvplan::planner {

struct KnapsackChoice {
  std::int64_t size = 0;
  std::int64_t cost = 0;
};

/// Choices of one class without dominated ones: sizes strictly ascending from 0, costs strictly
/// descending to 0.
using KnapsackClass = std::vector<KnapsackChoice>;

/// Sum of costs of all classes stays below this, so no sum here overflows.
inline constexpr std::int64_t kCostRange = std::int64_t{1} << 61;

/// A problem that can be solved at many capacities. As costs are integers, sums do not depend on
/// their order and equal costs are recognised as equal.
class Knapsack {
 public:
  static constexpr std::size_t kMaxChoices = 256;

  /// At most kMaxChoices choices per class.
  explicit Knapsack(std::vector<KnapsackClass> classes);

  const std::vector<KnapsackClass>& classes() const { return classes_; }
  /// Size at which every class has its largest choice.
  std::int64_t max_size() const { return max_size_; }

  /// Choice per class of least cost with size <= capacity, capacity >= 0. Ties: smaller size, then
  /// the smaller choice in the earliest class. MemoryError when the search needs too many states.
  std::vector<int> solve(std::int64_t capacity) const;

  /// Least cost at each exact size 0..max_size(), kCostRange or more where no combination has that
  /// size. MemoryError as in solve.
  std::vector<std::int64_t> least_costs() const;

  /// Cost of the linear relaxation at a capacity: a lower bound on that of solve.
  double relaxed_cost(std::int64_t capacity) const;

 private:
  /// An edge of a class's lower convex hull: from choice `from` to `to`.
  struct HullStep {
    std::size_t class_index = 0;
    int from = 0, to = 0;
    std::int64_t size = 0;    // added
    std::int64_t saving = 0;  // cost removed
  };
  /// The steepest hull steps that fit, in order; `next` is the first that does not.
  struct Relaxation {
    std::size_t next = 0;
    std::int64_t size = 0;
    std::int64_t cost = 0;
  };
  struct Core;

  Relaxation relax(std::int64_t capacity) const;
  Core reduce(std::int64_t capacity, const Relaxation& relaxation) const;

  std::vector<KnapsackClass> classes_;
  std::vector<HullStep> steps_;  // saving per size descending, then class order
  std::int64_t max_size_ = 0;
  std::int64_t max_cost_ = 0;
};

}  // namespace kvplan::planner
