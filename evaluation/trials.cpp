#include "evaluation/trials.h"

#include <algorithm>
#include <cmath>

#include "schemas/error.h"

namespace kvplan::evaluation {

std::vector<Trial> run_trials(const models::ModelReader& model,
                              const std::vector<tokenizers::TextWindow>& windows,
                              const std::vector<Candidate>& candidates, int folds,
                              const EvaluateOptions& options, const RunControl& control) {
  const std::size_t held_out = std::max<std::size_t>(1, windows.size() / 4);
  if (folds < 1 || windows.size() < static_cast<std::size_t>(folds) + held_out)
    throw ArgumentError("choosing between plans on " + std::to_string(folds) +
                        " folds needs at least " + std::to_string(folds + 1) +
                        " windows, the last quarter of which only checks the choice; found " +
                        std::to_string(windows.size()));
  if (candidates.empty()) throw ArgumentError("no candidate to choose from");
  EvaluateOptions worst = options;
  worst.modes = {"worst"};
  worst.plan_name.clear();
  const EvaluationState state = score_tokens(model, windows, candidates, worst, control);
  const std::size_t choosing = windows.size() - held_out;
  const std::vector<double> reference = window_means(state.reference_nll);

  std::vector<Trial> trials;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const std::vector<double> kl = window_means(state.passes[i].kl);
    std::vector<double> rise = window_means(state.passes[i].nll);
    for (std::size_t w = 0; w < rise.size(); ++w) rise[w] -= reference[w];
    const auto perplexity_rise = [&](std::size_t begin, std::size_t end) {
      return std::expm1(mean(std::span(rise).subspan(begin, end - begin)));
    };
    Trial& trial = trials.emplace_back();
    trial.name = candidates[i].name;
    trial.window_kl.assign(kl.begin(), kl.begin() + static_cast<std::ptrdiff_t>(choosing));
    trial.kl = mean(trial.window_kl);
    trial.perplexity_rise = perplexity_rise(0, choosing);
    for (std::size_t fold = 0; fold < static_cast<std::size_t>(folds); ++fold) {
      std::vector<double> of_fold;
      for (std::size_t w = fold; w < choosing; w += static_cast<std::size_t>(folds))
        of_fold.push_back(kl[w]);
      trial.worst_fold_kl = std::max(trial.worst_fold_kl, mean(of_fold));
    }
    trial.held_out_kl = mean(std::span(kl).subspan(choosing));
    trial.held_out_perplexity_rise = perplexity_rise(choosing, kl.size());
  }
  return trials;
}

std::size_t smallest_worst_fold(std::span<const Trial> trials) {
  const auto best = std::ranges::min_element(trials, {}, &Trial::worst_fold_kl);
  return static_cast<std::size_t>(best - trials.begin());
}

std::size_t gated_choice(std::span<const Trial> trials, int samples, std::uint64_t seed) {
  std::size_t chosen = 0;
  for (std::size_t i = 1; i < trials.size(); ++i) {
    const std::vector<double>&now = trials[chosen].window_kl, &next = trials[i].window_kl;
    const Interval gain = bootstrap_interval(static_cast<std::int64_t>(now.size()), samples, seed,
                                             [&](std::span<const std::uint32_t> drawn) {
                                               double sum = 0;
                                               for (const std::uint32_t w : drawn)
                                                 sum += next[w] - now[w];
                                               return sum / static_cast<double>(drawn.size());
                                             });
    if (gain.high < 0) chosen = i;
  }
  return chosen;
}

Spread spread(std::span<const double> values) {
  if (values.empty()) return {};
  Spread out;
  out.mean = mean(values);
  double squares = 0;
  for (const double value : values) squares += (value - out.mean) * (value - out.mean);
  out.sd = values.size() > 1 ? std::sqrt(squares / static_cast<double>(values.size() - 1)) : 0;
  out.cv = out.mean != 0 ? out.sd / std::abs(out.mean) : 0;
  out.min = std::ranges::min(values);
  out.max = std::ranges::max(values);
  return out;
}

}  // namespace kvplan::evaluation
