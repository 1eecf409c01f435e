// Times planner::allocate and planner::pareto_front on a synthetic cost table; prints JSON.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "planner/allocator.h"

namespace {

using kvplan::CostTable;
using kvplan::CostUnit;
using kvplan::Side;

constexpr int kLayers = 32, kHeads = 8, kGroups = 8, kGroupSize = 16;
constexpr int kRuns = 11;
// Relative error of Lloyd-Max widths 0..6 under the unbiased scale, D / (1 - D).
constexpr double kDistortion[] = {1, .570790, .133121, .035784, .009592, .002511, .000644};

/// Weights spread over six decades as in calibrated profiles: falling within a head, uneven
/// between.
CostTable synthetic_table() {
  CostTable table;
  std::uint64_t state = 1;
  const auto uniform = [&state] {  // xorshift64*, Vigna 2016
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<double>((state * 0x2545F4914F6CDD1DULL) >> 11) * 0x1p-53;
  };
  for (int layer = 0; layer < kLayers; ++layer) {
    for (Side side : kvplan::kSides) {
      for (int head = 0; head < kHeads; ++head) {
        for (int group = 0; group < kGroups; ++group) {
          CostUnit unit{layer, side, head, group, kGroupSize, {}};
          const double weight = std::pow(10.0, -0.5 * group - 2 * uniform());
          for (int width = 0; width <= 6; ++width) {
            const double coherent = width == 0 ? 1 + 2 * uniform() : 1;
            unit.choices.push_back(
                {width, std::int64_t{width} * kGroupSize, coherent * weight * kDistortion[width]});
          }
          table.units.push_back(unit);
          table.elements += kGroupSize;
        }
      }
    }
  }
  table.vector_bits = 8;
  table.fixed_bits = std::int64_t{kLayers} * 2 * kHeads * table.vector_bits;
  return table;
}

struct Timing {
  double median_ms = 0, min_ms = 0, max_ms = 0;
};

template <class Work>
Timing time_ms(Work work) {
  work();  // warm-up
  std::vector<double> ms;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    work();
    ms.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
                     .count());
  }
  std::sort(ms.begin(), ms.end());
  return {ms[kRuns / 2], ms.front(), ms.back()};
}

void print(const char* name, const Timing& t) {
  std::printf("  \"%s\": {\"median_ms\": %.3f, \"min_ms\": %.3f, \"max_ms\": %.3f},\n", name,
              t.median_ms, t.min_ms, t.max_ms);
}

}  // namespace

int main() {
  const CostTable table = synthetic_table();
  std::printf("{\n  \"benchmark\": \"planner\",\n  \"runs\": %d,\n", kRuns);
  double checksum = 0;
  for (const double bits : {1.75, 2.25, 3.25, 4.25}) {
    const auto budget = static_cast<std::int64_t>(bits * static_cast<double>(table.elements));
    char name[32];
    std::snprintf(name, sizeof name, "allocate_%.2f", bits);
    print(name, time_ms([&] { checksum += kvplan::planner::allocate(table, budget).cost; }));
  }
  const double ceiling = kvplan::planner::allocate(table, std::int64_t{3} * table.elements).cost;
  print("allocate_for_cost",
        time_ms([&] { checksum += kvplan::planner::allocate_for_cost(table, ceiling).cost; }));
  std::size_t front = 0;
  print("pareto_front", time_ms([&] { front = kvplan::planner::pareto_front(table).size(); }));
  std::printf(
      "  \"units\": %zu,\n  \"states\": %lld,\n  \"front_points\": %zu,\n  \"checksum\": %.9g\n}\n",
      table.units.size(), static_cast<long long>(6 * table.elements / kGroupSize + 1), front,
      checksum);
}
