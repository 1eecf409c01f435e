#pragma once
// `plan --try` and `plan --seeds`: candidates measured on folds of calibration windows.

#include <functional>
#include <string>
#include <vector>

#include "cli/options.h"
#include "schemas/plan.h"

namespace kvplan::cli {

struct TrialFlags {
  ModelTextOptions input;
  std::vector<std::string> tries;  // OPTION=VALUE
  int seeds = 0;
  int folds = 3;
  std::int64_t windows = 12;
  bool asked() const { return seeds > 0 || !tries.empty(); }
};

void add_trial_options(CLI::App& command, TrialFlags& flags);

/// Makes the plan with some OPTION=VALUE changes and a seed.
using MakePlan =
    std::function<PlanBundle(const std::vector<std::string>& changes, std::uint64_t seed)>;

/// The plan that wins: first a change is taken if it lowers KL by more than chance, then the seed
/// of smallest worst-fold KL. Trials and their text go into the plan; a table of both rounds, and
/// over seeds mean, sd, CV, min and max, is added to `summary`.
PlanBundle plan_by_trials(const TrialFlags& flags, const GlobalOptions& global,
                          const MakePlan& make_plan, std::string& summary);

}  // namespace kvplan::cli
