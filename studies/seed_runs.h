#pragma once
// One codec under many seeds: how much its scores spread, and whether a chosen seed keeps its lead.

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "schemas/plan.h"
#include "studies/model_lab.h"
#include "studies/study.h"

namespace kvplan::studies {

struct Spread {
  double mean = 0, sd = 0;  // sd with n - 1
  double min = 0, max = 0;
  double cv() const { return mean != 0 ? sd / mean : 0; }
};
/// ArgumentError for fewer than two values.
Spread spread(std::span<const double> values);

/// One value per seed.
struct SeedRuns {
  std::string name;
  std::vector<double> distortion;  // mean E|x - x_hat|^2 / |x|^2 over layers and sides
  std::vector<double> kl;          // nats per token
  std::vector<double> perplexity, perplexity_rise;
  std::vector<double> first_kl, second_kl;  // on the two halves of the windows
};

/// Bundles of seeds 0 .. count-1, scored on all windows of the lab.
SeedRuns seed_runs(ModelLab& lab, const std::string& name, int count,
                   const std::function<PlanBundle(std::uint64_t seed)>& bundle);

/// The seed of least first_kl.
struct SeedChoice {
  std::size_t winner = 0;
  double chosen_lead = 0;    // standard deviations below the mean where it was chosen
  double held_out_lead = 0;  // the same on the other half
};
SeedChoice choose_seed(const SeedRuns& runs);

/// Mean, sd, CV, min and max of distortion, KL and perplexity.
StudyTable spread_table(const std::vector<SeedRuns>& runs);

}  // namespace kvplan::studies
