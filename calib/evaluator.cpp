#include "calib/evaluator.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <list>
#include <map>
#include <set>
#include <span>

#include "calib/cache_attention.h"
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
/// Windows that pass through the pages of a runtime together.
constexpr std::size_t kPagedWindows = 8;

/// The fp16 cache is evaluated anyway; a candidate of that name only asks for it again.
bool is_reference(const Candidate& candidate) {
  return !candidate.bundle || candidate.name == kReferenceName;
}

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
    if (candidate.name == kReferenceName && candidate.bundle &&
        candidate.bundle->plan.codec != "fp16")
      throw ArgumentError("a plan of codec " + candidate.bundle->plan.codec +
                          " is named fp16, which is kept for the reference; name it otherwise");
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
                       const std::vector<Pass>& passes, const EvaluateOptions& options) {
  std::string text = "scores of kvplan 2\n" + model.path().string() + "\n" +
                     model.spec().kv_weights_sha256 + "\n" + weight_type_name(options.weights) +
                     (options.device == Device::kCuda ? " cuda\n" : " cpu\n");
  for (const TextWindow& window : windows)
    text +=
        std::to_string(window.index) + " " + sha256(std::as_bytes(std::span(window.tokens))) + "\n";
  std::map<const Candidate*, std::string> plan_hashes;
  for (const Pass& pass : passes) {
    auto& hash = plan_hashes[pass.what.candidate];
    if (hash.empty()) hash = sha256(plan_json(*pass.what.candidate->bundle));
    text += pass.what.mode + " " + pass.what.runtime->name + " " + hash + "\n";
  }
  return sha256(text);
}

double mean_over(std::span<const double> values, std::span<const std::uint32_t> drawn) {
  double sum = 0;
  for (const std::uint32_t i : drawn) sum += values[i];
  return sum / static_cast<double>(drawn.size());
}

/// The reference compared with itself.
PassScores reference_scores(const EvaluationState& state) {
  PassScores scores{state.reference_nll, state.reference_nll, state.reference_nll};
  std::fill(scores.kl.values.begin(), scores.kl.values.end(), 0.0);
  std::fill(scores.same_top1.values.begin(), scores.same_top1.values.end(), 1.0);
  return scores;
}

/// Every candidate's caches: one simulation whatever the modes, pages for each other runtime.
struct Caches {
  std::map<const Candidate*, StoredCache> simulated;
  std::list<CacheAttention> paged;
};

std::vector<Pass> make_passes(const ModelReader& model, const std::vector<TextWindow>& windows,
                              const std::vector<Candidate>& candidates,
                              const EvaluateOptions& options, Caches& caches) {
  std::vector<Pass> passes;
  for (const EvaluationPass& what : evaluation_passes(candidates, options.modes)) {
    const PlanBundle& bundle = *what.candidate->bundle;
    Pass& pass = passes.emplace_back(what);
    if (what.runtime->make_cache) {
      pass.paged = &caches.paged.emplace_back(
          *what.runtime, bundle, model.config(),
          static_cast<int>(std::min(kPagedWindows, windows.size())), options.window);
    } else {
      pass.simulated =
          &caches.simulated
               .try_emplace(what.candidate, bundle, model.config(), at::get_num_threads())
               .first->second;
    }
  }
  return passes;
}

/// Scores all windows, or the rest of them when options.partial_file holds a part.
EvaluationState score_windows(const ModelReader& model, const std::vector<TextWindow>& windows,
                              const std::vector<Pass>& passes, const EvaluateOptions& options,
                              const RunControl& control) {
  EvaluationState state(passes.size(), scored_range(options.window).count);
  const bool resumable = !options.partial_file.empty();
  const std::string key = resumable ? inputs_key(model, windows, passes, options) : "";
  if (resumable) resume_state(state, key, options.partial_file);
  const auto window_count = static_cast<std::int64_t>(windows.size());
  if (state.windows() == window_count) return state;

  const WindowScorer scorer(model, passes, options);
  const bool paged = std::any_of(passes.begin(), passes.end(),
                                 [](const Pass& pass) { return pass.paged != nullptr; });
  const auto passes_per_window = static_cast<std::int64_t>(passes.size()) + 1;  // and the reference
  std::int64_t done = state.windows() * passes_per_window;
  int signal = 0;
  const auto go_on = [&](std::int64_t more) {
    control.report({"validate", done += more, window_count * passes_per_window, "passes"});
    signal = control.stopping();
    return signal == 0;
  };
  while (state.windows() < window_count) {
    const auto left = std::span(windows).subspan(static_cast<std::size_t>(state.windows()));
    if (scorer.score(left.first(paged ? std::min(kPagedWindows, left.size()) : 1), state, go_on) &&
        resumable)
      save_state(state, key, options.partial_file);
    if (signal != 0 && state.windows() < window_count)
      throw InterruptedError(
          signal, "validation stopped after " + std::to_string(state.windows()) + " of " +
                      std::to_string(window_count) + " windows" +
                      (resumable ? "; the same command continues from there" : ""));
  }
  return state;
}

}  // namespace

std::vector<EvaluationPass> evaluation_passes(const std::vector<Candidate>& candidates,
                                              const std::vector<std::string>& modes) {
  static const CacheRuntime kSimulated{kSimulation, nullptr};
  std::vector<EvaluationPass> passes;
  for (const std::string& mode : modes) {
    for (const Candidate& candidate : candidates) {
      if (is_reference(candidate)) continue;
      if (mode == "decode") {
        for (const CacheRuntime& runtime : candidate.runtimes)
          passes.push_back({&candidate, mode, &runtime});
      } else {
        passes.push_back({&candidate, mode, &kSimulated});
      }
    }
  }
  return passes;
}

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

EvaluationState score_tokens(const ModelReader& model, const std::vector<TextWindow>& windows,
                             const std::vector<Candidate>& candidates,
                             const EvaluateOptions& options, const RunControl& control) {
  check_arguments(windows, candidates, options);
  const at::NoGradGuard no_grad;
  if (options.threads > 0) at::set_num_threads(options.threads);
  Caches caches;
  return score_windows(model, windows, make_passes(model, windows, candidates, options, caches),
                       options, control);
}

Validation evaluate(const ModelReader& model, const std::vector<TextWindow>& windows,
                    const std::vector<Candidate>& candidates, const EvaluateOptions& options,
                    const RunControl& control) {
  check_arguments(windows, candidates, options);
  const at::NoGradGuard no_grad;
  if (options.threads > 0) at::set_num_threads(options.threads);

  Caches caches;
  const std::vector<Pass> passes = make_passes(model, windows, candidates, options, caches);
  const EvaluationState state = score_windows(model, windows, passes, options, control);
  const PassScores reference = reference_scores(state);

  Validation validation;
  const ScoredRange range = scored_range(options.window);
  validation.window = options.window;
  validation.windows = static_cast<int>(windows.size());
  validation.first_scored = static_cast<int>(range.first);
  validation.scored_tokens = state.windows() * range.count;
  for (const std::string& mode : options.modes) {
    const auto plan_pass = std::find_if(passes.begin(), passes.end(), [&](const Pass& pass) {
      return pass.what.mode == mode && pass.what.candidate->name == options.plan_name;
    });
    const PassScores* plan =
        plan_pass != passes.end()
            ? &state.passes[static_cast<std::size_t>(plan_pass - passes.begin())]
        : options.plan_name.empty() ? nullptr
                                    : &reference;
    const auto add = [&](const std::string& name, const std::string& runtime,
                         const PassScores& scores, const PlanBundle* bundle) {
      CandidateResult result = summarise(scores, state.reference_nll, plan, options);
      result.name = name;
      result.mode = mode;
      result.runtime = runtime;
      result.effective_bits = bundle ? quant::measured_effective_bits(*bundle) : kFp16Bits;
      if (bundle && bundle->plan.predicted_kl > 0) result.predicted_kl = bundle->plan.predicted_kl;
      validation.candidates.push_back(std::move(result));
    };
    add(kReferenceName, kSimulation, reference, nullptr);
    for (std::size_t i = 0; i < passes.size(); ++i) {
      const EvaluationPass& what = passes[i].what;
      if (what.mode == mode)
        add(what.candidate->name, what.runtime->name, state.passes[i], what.candidate->bundle);
    }
  }
  return validation;
}

}  // namespace kvplan::calib
