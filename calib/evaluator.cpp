#include "calib/evaluator.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <span>

#include "calib/evaluation_state.h"
#include "calib/evaluation_statistics.h"
#include "calib/stored_cache.h"
#include "calib/window_scorer.h"
#include "quant/codec.h"
#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan::calib {
namespace {

constexpr double kFp16Bits = 16;

void check_arguments(const std::vector<TextWindow>& windows,
                     const std::vector<Candidate>& candidates, const EvaluateOptions& options) {
  if (windows.empty())
    throw ArgumentError("no window of text to evaluate on; give a longer text or smaller windows");
  if (scored_range(options.window).count < kPositionBins)
    throw ArgumentError("windows of " + std::to_string(options.window) +
                        " tokens are too short to score; give at least 24");
  for (const TextWindow& window : windows)
    if (window.tokens.size() != static_cast<std::size_t>(options.window))
      throw ArgumentError("window " + std::to_string(window.index) + " holds " +
                          std::to_string(window.tokens.size()) + " tokens where " +
                          std::to_string(options.window) + " were declared");
  if (options.modes.empty())
    throw ArgumentError("no evaluation mode given; choose from worst, decode");
  for (const std::string& mode : options.modes)
    if (mode != "worst" && mode != "decode")
      throw ArgumentError("unknown evaluation mode '" + mode + "'; choose from worst, decode");
  if (options.bootstrap_samples < 1)
    throw ArgumentError("bootstrap_samples is " + std::to_string(options.bootstrap_samples) +
                        "; at least 1 is needed");
  std::set<std::string> names;
  for (const Candidate& candidate : candidates) {
    if (!names.insert(candidate.name).second)
      throw ArgumentError("two candidates are named '" + candidate.name + "'");
    if (candidate.name == kReferenceName && candidate.bundle)
      throw ArgumentError("the name fp16 is kept for the reference; name the candidate otherwise");
    if (candidate.bundle && candidate.bundle->plan.sink_tokens >= options.window)
      throw ArgumentError("candidate '" + candidate.name + "' keeps " +
                          std::to_string(candidate.bundle->plan.sink_tokens) +
                          " sink tokens, so a window of " + std::to_string(options.window) +
                          " leaves nothing to quantise");
  }
  if (!options.plan_name.empty() && !names.contains(options.plan_name) &&
      options.plan_name != kReferenceName)
    throw ArgumentError("no candidate is named '" + options.plan_name +
                        "', which the others are to be compared with");
}

/// Stands for everything that the scores depend on.
std::string inputs_key(const ModelReader& model, const std::vector<TextWindow>& windows,
                       const std::vector<Pass>& passes) {
  std::string text =
      "scores of kvplan 1\n" + model.path().string() + "\n" + model.spec().kv_weights_sha256 + "\n";
  for (const TextWindow& window : windows)
    text +=
        std::to_string(window.index) + " " + sha256(std::as_bytes(std::span(window.tokens))) + "\n";
  std::map<const Candidate*, std::string> plan_hashes;
  for (const Pass& pass : passes) {
    auto& hash = plan_hashes[pass.candidate];
    if (hash.empty()) hash = sha256(plan_json(*pass.candidate->bundle));
    text += pass.mode + " " + hash + "\n";
  }
  return sha256(text);
}

double mean_over(std::span<const double> values, std::span<const std::uint32_t> drawn) {
  double sum = 0;
  for (const std::uint32_t i : drawn) sum += values[i];
  return sum / static_cast<double>(drawn.size());
}

/// `plan`: scores that kl_minus_plan is paired with, or null.
CandidateResult summarise(const PassScores& scores, const TokenScores& reference_nll,
                          const PassScores* plan, const EvaluateOptions& options) {
  const auto interval = [&](const auto& statistic) {
    return bootstrap_interval(scores.kl.windows, options.bootstrap_samples, options.bootstrap_seed,
                              statistic);
  };
  std::vector<double> nll_rise = window_means(scores.nll), kl_gap = window_means(scores.kl);
  const std::vector<double> reference = window_means(reference_nll);
  for (std::size_t w = 0; w < nll_rise.size(); ++w) nll_rise[w] -= reference[w];

  CandidateResult result;
  result.perplexity = std::exp(mean(scores.nll.values));
  result.perplexity_rise = std::expm1(mean(nll_rise));
  result.perplexity_rise_interval = interval(
      [&](std::span<const std::uint32_t> drawn) { return std::expm1(mean_over(nll_rise, drawn)); });
  result.kl = kl_statistics(scores.kl);
  if (plan && plan != &scores) {
    const std::vector<double> of_plan = window_means(plan->kl);
    for (std::size_t w = 0; w < kl_gap.size(); ++w) kl_gap[w] -= of_plan[w];
    result.kl_minus_plan =
        interval([&](std::span<const std::uint32_t> drawn) { return mean_over(kl_gap, drawn); });
  }
  result.same_top1 = mean(scores.same_top1.values);
  result.kl_by_position = mean_by_position(scores.kl);
  return result;
}

/// The reference compared with itself.
PassScores reference_scores(const EvaluationState& state) {
  PassScores scores{state.reference_nll, state.reference_nll, state.reference_nll};
  std::fill(scores.kl.values.begin(), scores.kl.values.end(), 0.0);
  std::fill(scores.same_top1.values.begin(), scores.same_top1.values.end(), 1.0);
  return scores;
}

}  // namespace

Validation evaluate(const ModelReader& model, const std::vector<TextWindow>& windows,
                    const std::vector<Candidate>& candidates, const EvaluateOptions& options,
                    const RunControl& control) {
  check_arguments(windows, candidates, options);
  const at::NoGradGuard no_grad;
  if (options.threads > 0) at::set_num_threads(options.threads);
  const int threads = at::get_num_threads();

  std::map<const Candidate*, StoredCache> caches;
  std::vector<Pass> passes;
  for (const std::string& mode : options.modes)
    for (const Candidate& candidate : candidates) {
      if (!candidate.bundle) continue;
      const auto& cache =
          caches.try_emplace(&candidate, *candidate.bundle, model.config(), threads).first->second;
      passes.push_back({&candidate, mode, &cache});
    }

  const ScoredRange range = scored_range(options.window);
  EvaluationState state(passes.size(), range.count);
  const bool resumable = !options.partial_file.empty();
  const std::string key = resumable ? inputs_key(model, windows, passes) : "";
  if (resumable) resume_state(state, key, options.partial_file);

  const auto forwards = static_cast<std::int64_t>(passes.size()) + 1;
  const auto window_count = static_cast<std::int64_t>(windows.size());
  if (state.windows() < window_count) {
    const WindowScorer scorer(model, passes, options.window);
    std::int64_t done = state.windows() * forwards;
    int signal = 0;
    const auto go_on = [&] {
      control.report({"validate", ++done, window_count * forwards, "passes"});
      signal = control.stopping();
      return signal == 0;
    };
    while (state.windows() < window_count) {
      const TextWindow& window = windows[static_cast<std::size_t>(state.windows())];
      if (scorer.score(window, state, go_on)) {
        if (resumable) save_state(state, key, options.partial_file);
        go_on();
      }
      if (signal != 0 && state.windows() < window_count)
        throw InterruptedError(
            signal,
            "validation stopped after " + std::to_string(state.windows()) + " of " +
                std::to_string(window_count) + " windows" +
                (!resumable ? "" : "; the same command continues from there"));
    }
  }

  Validation validation;
  validation.window = options.window;
  validation.windows = static_cast<int>(window_count);
  validation.first_scored = static_cast<int>(range.first);
  validation.scored_tokens = window_count * range.count;
  const PassScores reference = reference_scores(state);
  for (const std::string& mode : options.modes) {
    const auto measured = [&](const Candidate& candidate) -> const PassScores& {
      const auto found = std::find_if(passes.begin(), passes.end(), [&](const Pass& p) {
        return p.candidate == &candidate && p.mode == mode;
      });
      return found == passes.end() ? reference
                                   : state.passes[static_cast<std::size_t>(found - passes.begin())];
    };
    const auto plan = std::find_if(candidates.begin(), candidates.end(),
                                   [&](const Candidate& c) { return c.name == options.plan_name; });
    const PassScores* plan_scores = plan != candidates.end()              ? &measured(*plan)
                                    : options.plan_name == kReferenceName ? &reference
                                                                          : nullptr;
    const auto add = [&](const std::string& name, const PassScores& scores,
                         const PlanBundle* bundle) {
      CandidateResult result = summarise(scores, state.reference_nll, plan_scores, options);
      result.name = name;
      result.mode = mode;
      result.effective_bits = bundle ? quant::measured_effective_bits(*bundle) : kFp16Bits;
      if (bundle && bundle->plan.predicted_kl > 0) result.predicted_kl = bundle->plan.predicted_kl;
      validation.candidates.push_back(std::move(result));
    };
    add(kReferenceName, reference, nullptr);
    for (const Candidate& candidate : candidates)
      if (candidate.name != kReferenceName)
        add(candidate.name, measured(candidate), candidate.bundle);
  }
  return validation;
}

}  // namespace kvplan::calib
