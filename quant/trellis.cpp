#include "quant/trellis.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "data/trellis/tables.h"
#include "quant/linalg.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kStateBits = 8;
/// Distinct predecessors' low bits: 256 / 2^width at most.
constexpr int kMostJoins = kTrellisStates / 2;
/// Coordinates on each side of the joint that decide its state. With 16 the error of 64 coordinates
/// is up to 2 % larger.
constexpr int kReach = kMinTrellisLength;

/// Of one step, by the high 8 - width bits of the new state: the high `width` bits of its best
/// predecessor, whose other bits they are.
using Predecessors = std::array<std::uint8_t, kMostJoins>;
using Costs = std::array<float, kTrellisStates>;

constexpr int kLanes = 8;
using Floats [[gnu::vector_size(4 * kLanes)]] = float;
using Integers [[gnu::vector_size(4 * kLanes)]] = std::int32_t;
using Bytes [[gnu::vector_size(kLanes)]] = std::uint8_t;
using UnalignedFloats [[gnu::vector_size(4 * kLanes), gnu::aligned(4), gnu::may_alias]] = float;
using UnalignedBytes [[gnu::vector_size(kLanes), gnu::aligned(1), gnu::may_alias]] = std::uint8_t;

template <int Width>
[[gnu::always_inline]] inline void advance(const TrellisStep& step, float x, const float* costs,
                                           float* new_costs, std::uint8_t* predecessors) {
  const float weight = step.weight;
  constexpr int kBranches = 1 << Width, kJoinVectors = kTrellisStates / kBranches / kLanes;
  const UnalignedFloats* const from = reinterpret_cast<const UnalignedFloats*>(costs);
  const UnalignedFloats* const values = reinterpret_cast<const UnalignedFloats*>(step.values);
  UnalignedFloats* const to = reinterpret_cast<UnalignedFloats*>(new_costs);
  for (int v = 0; v < kJoinVectors; ++v) {
    Floats least = from[v];
    Integers branch = {};
    for (int b = 1; b < kBranches; ++b) {
      const Floats cost = from[b * kJoinVectors + v];
      const Integers less = cost < least;
      branch = less ? Integers{} + b : branch;
      least = less ? cost : least;
    }
    reinterpret_cast<UnalignedBytes*>(predecessors)[v] = __builtin_convertvector(branch, Bytes);
    // Each of the eight joins leads to 2^Width neighbouring states.
#pragma GCC unroll 16
    for (int k = 0; k < kBranches; ++k) {
      const auto join = [&](int lane) { return least[(kLanes * k + lane) >> Width]; };
      const Floats joins = {join(0), join(1), join(2), join(3), join(4), join(5), join(6), join(7)};
      const Floats error = x - values[v * kBranches + k];
      to[v * kBranches + k] = joins + weight * (error * error);
    }
  }
}

// Extends the best path into each state by the coordinates first, first - 1, ..., first - count +
// 1.
KVPLAN_VECTOR_CLONES void run_viterbi(const TrellisStep* steps, const float* x, int first,
                                      int count, float* costs, Predecessors* predecessors) {
  float spare[kTrellisStates];
  float* from = costs;
  float* to = spare;
  for (int k = 0; k < count; ++k, std::swap(from, to)) {
    const int i = first - k;
    switch (steps[i].width) {
      case 1:
        advance<1>(steps[i], x[i], from, to, predecessors[k].data());
        break;
      case 2:
        advance<2>(steps[i], x[i], from, to, predecessors[k].data());
        break;
      case 3:
        advance<3>(steps[i], x[i], from, to, predecessors[k].data());
        break;
      default:
        advance<4>(steps[i], x[i], from, to, predecessors[k].data());
    }
  }
  if (from != costs) std::copy_n(from, kTrellisStates, costs);
}

int predecessor(int state, int width, const Predecessors& best) {
  const int join = state >> width;
  return best[static_cast<std::size_t>(join)] << (kStateBits - width) | join;
}

}  // namespace

const TrellisTable& trellis_table(int width) {
  if (width < 1 || width > kMaxTrellisWidth)
    throw ArgumentError("a trellis code has 1 to " + std::to_string(kMaxTrellisWidth) +
                        " bits, got " + std::to_string(width));
  return kTrellisTables[static_cast<std::size_t>(width - 1)];
}

double trellis_distortion(int width) { return trellis_table(width).distortion; }

bool uses_trellis(std::span<const int> widths, int group_size) {
  const auto groups = std::count_if(widths.begin(), widths.end(), [](int width) {
    return width >= 1 && width <= kMaxTrellisWidth;
  });
  return groups * group_size >= kMinTrellisLength;
}

Trellis::Trellis(std::vector<TrellisStep> steps) : steps_(std::move(steps)) {
  if (size() < kMinTrellisLength)
    throw ArgumentError("a trellis needs at least " + std::to_string(kMinTrellisLength) +
                        " coordinates, got " + std::to_string(size()));
  for (const TrellisStep& step : steps_)
    if (step.width < 1 || step.width > kMaxTrellisWidth)
      throw ArgumentError("a trellis code has 1 to " + std::to_string(kMaxTrellisWidth) +
                          " bits, got " + std::to_string(step.width));
}

void Trellis::encode(std::span<const float> x, std::span<std::uint8_t> states) const {
  const int n = size();
  if (std::ssize(x) != n || std::ssize(states) != n)
    throw ArgumentError("a trellis of " + std::to_string(n) + " coordinates got buffers of " +
                        std::to_string(x.size()) + " and " + std::to_string(states.size()));
  std::vector<Predecessors> predecessors(static_cast<std::size_t>(n));
  const auto width = [&](int i) { return steps_[static_cast<std::size_t>(i)].width; };

  // The joint lies between coordinates 0 and n - 1, where the trellis ends and begins.
  Costs costs{};
  run_viterbi(steps_.data(), x.data(), kReach - 1, kReach, costs.data(), predecessors.data());
  run_viterbi(steps_.data(), x.data(), n - 1, kReach, costs.data(), predecessors.data());
  int joint = static_cast<int>(std::min_element(costs.begin(), costs.end()) - costs.begin());
  for (int k = kReach - 1; k >= 0; --k)
    joint = predecessor(joint, width(n - 1 - k), predecessors[static_cast<std::size_t>(k)]);

  costs.fill(std::numeric_limits<float>::infinity());
  costs[static_cast<std::size_t>(joint)] = 0;
  run_viterbi(steps_.data(), x.data(), n - 1, n, costs.data(), predecessors.data());
  int state = joint;
  for (int i = 0; i < n; ++i) {
    states[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(state);
    state = predecessor(state, width(i), predecessors[static_cast<std::size_t>(n - 1 - i)]);
  }
}

}  // namespace kvplan::quant
