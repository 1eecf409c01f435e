#pragma once
// What a plan of any codec should cost, from a profile alone: its codec is run on vectors drawn
// from the profile's moments.

#include <array>
#include <cstdint>
#include <vector>

#include "schemas/plan.h"
#include "schemas/profile.h"

namespace kvplan::quant {

struct SimulationOptions {
  std::int64_t tokens = 512;  // drawn per layer and side, in runs of 32; rounded up to whole runs
  std::uint64_t seed = 0;
  int threads = 1;  // 0: all cores; never changes a byte of the result
};

struct SimulatedCost {
  double kl = 0;                             // nats per token, the sum of all sides
  std::vector<std::array<double, 2>> sides;  // [layer][k, v]
};

/// Second-order KL divergence of a plan, 1/2 sum E[e^T F_t e] over layers, sides and heads: e is
/// the error of the plan's codec on x_t = R_t x, x ~ N(mean, C) of the profile's head (keys before
/// rotary), t uniform over the positions sink_tokens .. context-1 in runs of consecutive tokens,
/// F_t the Fisher matrix turned to t. Independent errors of tokens are assumed, so what all tokens
/// have in common (coordinates of width 0, a shift of the mean) is underrated. Rotary style half.
/// ArgumentError: a profile of another model, no tokens; InputError: a profile without its sums, a
/// plan that no codec can be made for.
SimulatedCost simulate_cost(const PlanBundle& bundle, const Profile& profile,
                            const SimulationOptions& options = {});

/// Sets predicted_kl and the layers' shares of it.
void set_prediction(const SimulatedCost& cost, Plan& plan);

}  // namespace kvplan::quant
