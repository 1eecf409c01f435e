#include "planner/knapsack.h"

#include <algorithm>
#include <string>
#include <utility>

#include "schemas/error.h"

namespace kvplan::planner {
namespace {

using Wide = __int128;  // products of a cost and a size

constexpr std::int64_t kMaxStates = std::int64_t{1} << 25;
constexpr std::int64_t kMaxTraceBytes = std::int64_t{1} << 30;

void require_states(std::int64_t states) {
  constexpr std::int64_t kBytesPerState = 2 * sizeof(std::int64_t);
  if (states > kMaxStates) {
    throw MemoryError(states * kBytesPerState, kMaxStates * kBytesPerState,
                      "allocation needs " + std::to_string(states) + " sizes, at most " +
                          std::to_string(kMaxStates) +
                          " are held: choose sizes with a larger common divisor (larger groups)");
  }
}

/// Whether the edge a -> c of a class lies on or below its point b, a < b < c in size.
bool hides(const KnapsackChoice& a, const KnapsackChoice& b, const KnapsackChoice& c) {
  return Wide{a.cost - c.cost} * (b.size - a.size) >= Wide{a.cost - b.cost} * (c.size - a.size);
}

std::vector<int> lower_hull(const KnapsackClass& choices) {
  std::vector<int> hull;
  const auto at = [&](int i) -> const KnapsackChoice& {
    return choices[static_cast<std::size_t>(i)];
  };
  for (int i = 0; i < static_cast<int>(choices.size()); ++i) {
    while (hull.size() >= 2 && hides(at(hull.end()[-2]), at(hull.back()), at(i))) hull.pop_back();
    hull.push_back(i);
  }
  return hull;
}

}  // namespace

Knapsack::Knapsack(std::vector<KnapsackClass> classes) : classes_(std::move(classes)) {
  for (std::size_t u = 0; u < classes_.size(); ++u) {
    const KnapsackClass& choices = classes_[u];
    max_size_ += choices.back().size;
    max_cost_ += choices.front().cost;
    const std::vector<int> hull = lower_hull(choices);
    for (std::size_t i = 1; i < hull.size(); ++i) {
      const KnapsackChoice& a = choices[static_cast<std::size_t>(hull[i - 1])];
      const KnapsackChoice& b = choices[static_cast<std::size_t>(hull[i])];
      steps_.push_back({u, hull[i - 1], hull[i], b.size - a.size, a.cost - b.cost});
    }
  }
  std::stable_sort(steps_.begin(), steps_.end(), [](const HullStep& a, const HullStep& b) {
    return Wide{a.saving} * b.size > Wide{b.saving} * a.size;
  });
}

Knapsack::Relaxation Knapsack::relax(std::int64_t capacity) const {
  Relaxation r{.next = 0, .size = 0, .cost = max_cost_};
  for (; r.next < steps_.size() && r.size + steps_[r.next].size <= capacity; ++r.next) {
    r.size += steps_[r.next].size;
    r.cost -= steps_[r.next].saving;
  }
  return r;
}

double Knapsack::relaxed_cost(std::int64_t capacity) const {
  const Relaxation r = relax(capacity);
  if (r.next == steps_.size()) return static_cast<double>(r.cost);
  const HullStep& partial = steps_[r.next];
  return static_cast<double>(r.cost) - static_cast<double>(partial.saving) *
                                           static_cast<double>(capacity - r.size) /
                                           static_cast<double>(partial.size);
}

/// What is left of a problem once choices that no optimal solution can contain are gone.
///
/// With a price p per size, a choice's reduced cost is r = cost + p size - min over its class >= 0,
/// and any solution costs (Lagrangian bound) + sum r + p (capacity - size). So with a feasible
/// solution at `gap` above the bound, every optimal one has sum r + p (capacity - size) <= gap.
/// Source: Dyer, Kayal, Walker, "A branch and bound algorithm for solving the multiple-choice
/// knapsack problem" (1984); Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), section 11.
struct Knapsack::Core {
  struct Choice {
    std::int64_t size = 0;     // above the smallest surviving size of the class
    std::int64_t reduced = 0;  // 0..gap
    int index = 0;             // in the class
  };
  struct Class {
    std::size_t class_index = 0;
    std::vector<Choice> choices;
  };
  std::vector<Class> classes;  // those that still have a choice to make, in class order
  std::vector<int> solution;   // choice per class of the whole problem; settled classes are final
  std::int64_t capacity = 0;   // left above the smallest surviving sizes
  std::int64_t price = 0;
  std::int64_t gap = 0;
};

Knapsack::Core Knapsack::reduce(std::int64_t capacity, const Relaxation& relaxation) const {
  Core core;
  // Rounded down: any price >= 0 gives a valid bound, and an integer keeps everything exact.
  core.price = steps_[relaxation.next].saving / steps_[relaxation.next].size;

  // A feasible solution: hull steps in order, leaving out those that no longer fit.
  core.solution.assign(classes_.size(), 0);
  std::int64_t left = capacity;
  for (const HullStep& step : steps_) {
    int& choice = core.solution[step.class_index];
    if (choice != step.from || step.size > left) continue;
    choice = step.to;
    left -= step.size;
  }

  const auto priced = [&](const KnapsackChoice& c) {
    return Wide{c.cost} + Wide{core.price} * c.size;
  };
  std::vector<Wide> least(classes_.size());
  Wide gap = Wide{core.price} * left;
  for (std::size_t u = 0; u < classes_.size(); ++u) {
    least[u] = priced(classes_[u].front());
    for (const KnapsackChoice& c : classes_[u]) least[u] = std::min(least[u], priced(c));
    gap += priced(classes_[u][static_cast<std::size_t>(core.solution[u])]) - least[u];
  }
  core.gap = static_cast<std::int64_t>(gap);

  core.capacity = capacity;
  for (std::size_t u = 0; u < classes_.size(); ++u) {
    Core::Class survivors{u, {}};
    std::int64_t smallest = 0;
    for (std::size_t c = 0; c < classes_[u].size(); ++c) {
      const Wide reduced = priced(classes_[u][c]) - least[u];
      if (reduced > gap) continue;
      if (survivors.choices.empty()) smallest = classes_[u][c].size;
      survivors.choices.push_back({classes_[u][c].size - smallest,
                                   static_cast<std::int64_t>(reduced), static_cast<int>(c)});
    }
    core.capacity -= smallest;
    if (survivors.choices.size() == 1) {
      core.solution[u] = survivors.choices.front().index;
    } else {
      core.classes.push_back(std::move(survivors));
    }
  }
  return core;
}

std::vector<int> Knapsack::solve(std::int64_t capacity) const {
  const Relaxation relaxation = relax(capacity);
  if (relaxation.next == steps_.size()) {  // every class affords its largest choice
    std::vector<int> largest;
    for (const KnapsackClass& choices : classes_) {
      largest.push_back(static_cast<int>(choices.size()) - 1);
    }
    return largest;
  }
  Core core = reduce(capacity, relaxation);

  // Dynamic programme from the last class to the first, so that the choices can be read off from
  // the first on and ties fall to the earliest class. values[s - first]: least sum of reduced costs
  // of the classes so far at size s; `dead` marks sums that cannot be part of an optimum.
  struct Layer {
    std::int64_t first = 0;
    std::vector<std::uint8_t> pick;
  };
  const std::int64_t dead = core.gap + 1;
  const std::int64_t slack = core.price > 0 ? core.gap / core.price : core.capacity;
  std::int64_t remaining = 0;  // largest size of the classes still to come
  for (const Core::Class& c : core.classes) remaining += c.choices.back().size;

  std::vector<Layer> layers(core.classes.size());
  std::vector<std::int64_t> values = {0}, next;
  std::int64_t first = 0, trace_bytes = 0;
  for (std::size_t i = core.classes.size(); i-- > 0;) {
    const std::vector<Core::Choice>& choices = core.classes[i].choices;
    remaining -= choices.back().size;
    const std::int64_t last = first + static_cast<std::int64_t>(values.size()) - 1;
    const std::int64_t next_first = std::max(first, core.capacity - remaining - slack);
    const std::int64_t next_last = std::min(last + choices.back().size, core.capacity);
    const std::int64_t states = next_last - next_first + 1;
    require_states(states);
    trace_bytes += states;
    if (trace_bytes > kMaxTraceBytes) {
      throw MemoryError(
          trace_bytes, kMaxTraceBytes,
          "allocation needs more than 1 GiB to remember its choices: use larger groups");
    }
    next.assign(static_cast<std::size_t>(states), dead);
    layers[i] = {next_first, std::vector<std::uint8_t>(static_cast<std::size_t>(states))};
    std::uint8_t* pick = layers[i].pick.data();
    for (std::size_t c = 0; c < choices.size(); ++c) {
      const std::int64_t shift = choices[c].size, reduced = choices[c].reduced;
      const std::int64_t end = std::min(next_last, last + shift);
      for (std::int64_t s = std::max(next_first, first + shift); s <= end; ++s) {
        const std::int64_t value = values[static_cast<std::size_t>(s - shift - first)] + reduced;
        std::int64_t& best = next[static_cast<std::size_t>(s - next_first)];
        if (value < best) {
          best = value;
          pick[s - next_first] = static_cast<std::uint8_t>(c);
        }
      }
    }
    const auto alive = [&](std::int64_t value) { return value < dead; };
    const auto begin = std::find_if(next.begin(), next.end(), alive);
    if (begin == next.end()) {
      throw InternalError("knapsack of capacity " + std::to_string(capacity) +
                          " lost its feasible solution (gap " + std::to_string(core.gap) + ")");
    }
    const auto end = std::find_if(next.rbegin(), next.rend(), alive).base();
    first = next_first + (begin - next.begin());
    values.assign(begin, end);
  }

  std::int64_t size = first, least = dead;
  for (std::size_t j = 0; j < values.size(); ++j) {
    if (values[j] == dead) continue;
    const std::int64_t s = first + static_cast<std::int64_t>(j);
    const std::int64_t cost = values[j] + core.price * (core.capacity - s);
    if (cost < least) {
      least = cost;
      size = s;
    }
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::uint8_t pick = layers[i].pick[static_cast<std::size_t>(size - layers[i].first)];
    const Core::Choice& choice = core.classes[i].choices[pick];
    core.solution[core.classes[i].class_index] = choice.index;
    size -= choice.size;
  }
  return core.solution;
}

std::vector<std::int64_t> Knapsack::least_costs() const {
  require_states(max_size_ + 1);
  std::int64_t widest = 0;
  for (const KnapsackClass& choices : classes_) widest = std::max(widest, choices.back().size);

  // Classes are added in place, from large sizes down; `widest` unreachable states in front stand
  // for negative sizes. Unreachable sums grow by less than kCostRange in all, so none overflows.
  std::vector<std::int64_t> padded(static_cast<std::size_t>(widest + max_size_ + 1), kCostRange);
  std::int64_t* const least = padded.data() + widest;
  least[0] = 0;
  std::int64_t reach = 0;
  for (const KnapsackClass& choices : classes_) {
    reach += choices.back().size;
    const KnapsackChoice* const begin = choices.data();
    const KnapsackChoice* const end = begin + choices.size();
    for (std::int64_t s = reach; s >= 0; --s) {
      std::int64_t best = least[s] + begin->cost;
      for (const KnapsackChoice* c = begin + 1; c != end; ++c) {
        best = std::min(best, least[s - c->size] + c->cost);
      }
      least[s] = best;
    }
  }
  return {padded.begin() + widest, padded.end()};
}

}  // namespace kvplan::planner
