#include "quant/predict.h"

#include <gtest/gtest.h>

#include "quant/baselines.h"
#include "quant/fit.h"
#include "schemas/error.h"
#include "tests/quant/synthetic_profile.h"

namespace kvplan::quant {
namespace {

using testing::synthetic_profile;

const Profile& profile() {
  static const Profile made = synthetic_profile({.head_dim = 64, .rotary_dim = 64, .windows = 6});
  return made;
}

PlanBundle baseline(std::string_view name) {
  return baseline_plan(name, profile().model, profile().sink_tokens, 256, 3,
                       profile().layers[0].inv_freq, &profile());
}

PlanBundle fitted(const FitOptions& options, int width) {
  const Fit fit(profile(), options);
  std::vector<Fit::LayerWidths> widths(2);
  for (auto& layer : widths) layer.k = layer.v = width;
  return fit.assemble(widths, {});
}

TEST(SimulateCost, AgreesWithTheFitOfRotatedPlans) {
  for (const bool centre : {false, true})
    for (const int width : {2, 4}) {
      FitOptions options = default_fit_options("rotated");
      options.context = 256;
      options.centre = centre;
      const PlanBundle bundle = fitted(options, width);
      const SimulatedCost cost = simulate_cost(bundle, profile(), {.tokens = 2048});
      EXPECT_NEAR(cost.kl / bundle.plan.predicted_kl, 1, 0.1) << centre << width;
    }
}

TEST(SimulateCost, AgreesWithTheFitOfCalibratedPlans) {
  FitOptions options;
  options.context = 256;
  const PlanBundle bundle = fitted(options, 4);
  const SimulatedCost cost = simulate_cost(bundle, profile(), {.tokens = 2048});
  EXPECT_NEAR(cost.kl / bundle.plan.predicted_kl, 1, 0.1);
}

TEST(SimulateCost, OrdersPlansAndIsNearNothingForFp16) {
  double previous = 0;
  for (const auto* name : {"q8_0", "q5_0", "turboquant:4", "turboquant:3", "turboquant:3+prodkv"}) {
    const double kl = simulate_cost(baseline(name), profile()).kl;
    EXPECT_GT(kl, previous) << name;
    previous = kl;
  }
  EXPECT_LT(simulate_cost(baseline("fp16"), profile()).kl, 1e-5 * previous);
}

TEST(SimulateCost, DoesNotDependOnThreadsButOnTheSeed) {
  const PlanBundle bundle = baseline("kivi:2");
  const SimulationOptions options{.tokens = 70, .seed = 1, .threads = 1};
  SimulationOptions threads = options, seed = options;
  threads.threads = 3;
  seed.seed = 2;
  const SimulatedCost once = simulate_cost(bundle, profile(), options);
  EXPECT_EQ(once.sides, simulate_cost(bundle, profile(), threads).sides);
  EXPECT_NE(once.sides, simulate_cost(bundle, profile(), seed).sides);
}

TEST(SimulateCost, SharesOfLayersAddUpToOne) {
  PlanBundle bundle = baseline("int:4");
  const SimulatedCost cost = simulate_cost(bundle, profile());
  set_prediction(cost, bundle.plan);
  EXPECT_EQ(bundle.plan.predicted_kl, cost.kl);
  double shares = 0;
  for (const LayerPlan& layer : bundle.plan.layers) {
    EXPECT_GT(layer.predicted_kl_share, 0);
    shares += layer.predicted_kl_share;
  }
  EXPECT_NEAR(shares, 1, 1e-12);
}

TEST(SimulateCost, RefusesAnotherModelAndNoTokens) {
  PlanBundle bundle = baseline("q8_0");
  EXPECT_THROW(simulate_cost(bundle, profile(), {.tokens = 0}), ArgumentError);
  Profile broken = profile();
  broken.layers[1].k.fisher = {};
  EXPECT_THROW(simulate_cost(bundle, broken), InputError);
  bundle.plan.model.head_dim = 80;
  EXPECT_THROW(simulate_cost(bundle, profile()), ArgumentError);
}

}  // namespace
}  // namespace kvplan::quant
