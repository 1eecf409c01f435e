#pragma once
// Choosing between candidate plans by measuring them on folds of calibration windows.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "evaluation/evaluator.h"

namespace kvplan::evaluation {

/// One candidate, measured in mode worst. The last quarter of the windows (at least one) has no
/// part in choosing: its figures show how much of a winner's lead was luck.
struct Trial {
  std::string name;
  std::vector<double> window_kl;  // of each choosing window, nats per token
  double kl = 0, perplexity_rise = 0;
  double worst_fold_kl = 0;  // largest mean over a fold of choosing windows
  double held_out_kl = 0, held_out_perplexity_rise = 0;
};

/// Windows are dealt to `folds` folds in turn. ArgumentError: fewer than folds + 1 windows, no
/// candidate; else as evaluate().
std::vector<Trial> run_trials(const models::ModelReader& model,
                              const std::vector<tokenizers::TextWindow>& windows,
                              const std::vector<Candidate>& candidates, int folds,
                              const EvaluateOptions& options, const RunControl& control);

/// The trial of smallest worst-fold KL; the first of equal ones.
std::size_t smallest_worst_fold(std::span<const Trial> trials);

/// Begins with trial 0 and moves on to each later one whose mean KL is smaller than the present
/// choice's by more than chance: 95 % paired bootstrap interval over the choosing windows below 0.
std::size_t gated_choice(std::span<const Trial> trials, int samples, std::uint64_t seed);

struct Spread {
  double mean = 0, sd = 0, cv = 0, min = 0, max = 0;  // sd of the sample (n - 1)
};
Spread spread(std::span<const double> values);

}  // namespace kvplan::evaluation
