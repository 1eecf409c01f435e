#include "evaluation/evaluator.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <span>

#include "evaluation/evaluation_state.h"
#include "evaluation/evaluation_statistics.h"
#include "evaluation/window_scorer.h"
#include "forward/cache_attention.h"
#include "forward/device_threads.h"
#include "forward/memory_plan.h"
#include "forward/stored_cache.h"
#include "quant/codec.h"
#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan::evaluation {
namespace {

constexpr double kFp16Bits = 16;
/// Windows that pass through the pages of a runtime together.
constexpr std::size_t kPagedWindows = 8;

/// The fp16 cache is evaluated anyway; a candidate of that name only asks for it again.
bool is_reference(const Candidate& candidate) {
  return !candidate.bundle || candidate.name == kReferenceName;
}

void check_arguments(const std::vector<tokenizers::TextWindow>& windows,
                     const std::vector<Candidate>& candidates, const EvaluateOptions& options) {
  if (windows.empty())
    throw ArgumentError("no window of text to evaluate on; give a longer text or smaller windows");
  if (scored_range(options.window).count < kPositionBins)
    throw ArgumentError("windows of " + std::to_string(options.window) +
                        " tokens are too short to score; give at least 24");
  for (const tokenizers::TextWindow& window : windows)
    if (window.tokens.size() != static_cast<std::size_t>(options.window))
      throw ArgumentError("window " + std::to_string(window.index) + " holds " +
                          std::to_string(window.tokens.size()) + " tokens where " +
                          std::to_string(options.window) + " were declared");
  if (options.devices.empty()) throw ArgumentError("no device given to evaluate on");
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
std::string inputs_key(const models::ModelReader& model,
                       std::span<const tokenizers::TextWindow> windows,
                       const std::vector<Pass>& passes, const EvaluateOptions& options) {
  std::string text = "scores of kvplan 2\n" + model.path().string() + "\n" +
                     model.spec().kv_weights_sha256 + "\n" +
                     forward::weight_type_name(options.weights) +
                     (options.devices.front().is_cpu() ? " cpu\n" : " cuda\n");
  for (const tokenizers::TextWindow& window : windows)
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
  std::map<const Candidate*, forward::StoredCache> simulated;
  std::list<forward::CacheAttention> paged;
};

/// `sequences` go through the pages of a runtime together.
std::vector<Pass> make_passes(const models::ModelReader& model, std::size_t sequences,
                              const std::vector<Candidate>& candidates,
                              const EvaluateOptions& options, Caches& caches) {
  std::vector<Pass> passes;
  for (const EvaluationPass& what : evaluation_passes(candidates, options.modes)) {
    const PlanBundle& bundle = *what.candidate->bundle;
    Pass& pass = passes.emplace_back(what);
    if (what.runtime->make_cache) {
      pass.paged = &caches.paged.emplace_back(*what.runtime, bundle, model.config(),
                                              static_cast<int>(sequences), options.window);
    } else {
      pass.simulated =
          &caches.simulated
               .try_emplace(what.candidate, bundle, model.config(), at::get_num_threads())
               .first->second;
    }
  }
  return passes;
}

bool any_paged(const std::vector<Pass>& passes) {
  return std::any_of(passes.begin(), passes.end(),
                     [](const Pass& pass) { return pass.paged != nullptr; });
}

forward::Workload evaluation_workload(const models::ModelReader& model, std::size_t windows,
                                      std::size_t passes, const EvaluateOptions& options) {
  const models::ModelConfig& config = model.config();
  const std::int64_t activation =
      std::int64_t{options.window} * config.hidden_size * std::int64_t{sizeof(float)};
  const auto lanes = static_cast<std::int64_t>(passes) + 1;  // and the reference
  return {.units = static_cast<std::int64_t>(windows),
          .fixed_bytes = forward::kProcessBytes + logits_bytes() + lanes * activation +
                         forward::layer_bytes(config, options.window, /*gradients=*/false),
          .unit_bytes = activation,
          .boundary_bytes = lanes * activation};
}

/// All scorers of this process, with the caches that each of them fills.
struct Scorers {
  std::list<Caches> caches;
  std::list<std::vector<Pass>> passes;
  std::list<WindowScorer> scorers;
  std::size_t windows_at_once = 1;  // of each
};

/// Scores all of `windows`, or the rest of them when a partial file holds some.
EvaluationState score_part(const models::ModelReader& model,
                           std::span<const tokenizers::TextWindow> windows,
                           const std::vector<Candidate>& candidates, const EvaluateOptions& options,
                           const RunControl& control) {
  const std::filesystem::path partial_file = own_partial_file(options);
  Scorers all;
  const auto add_passes = [&]() -> std::vector<Pass>& {
    return all.passes.emplace_back(make_passes(model, std::min(kPagedWindows, windows.size()),
                                               candidates, options, all.caches.emplace_back()));
  };
  const std::vector<Pass>& passes = add_passes();
  EvaluationState state(passes.size(), scored_range(options.window).count);
  const bool resumable = !partial_file.empty();
  const std::string key = resumable ? inputs_key(model, windows, passes, options) : "";
  if (resumable) resume_state(state, key, partial_file);
  const auto window_count = static_cast<std::int64_t>(windows.size());
  if (state.windows() < window_count) {
    const forward::MemoryPlan plan =
        forward::plan_memory(options.memory_bytes, forward::weight_bytes(model, options.weights),
                             evaluation_workload(model, windows.size(), passes.size(), options));
    if (plan.stream && any_paged(passes))
      throw ArgumentError(
          "--memory is too little for all weights at once, which every runtime but cpu needs: it "
          "takes a few tokens at a time through all layers; give more memory or --runtime cpu");
    all.windows_at_once = any_paged(passes) ? kPagedWindows : static_cast<std::size_t>(plan.units);
    for (const forward::Device device : options.devices)
      all.scorers.emplace_back(model, all.scorers.empty() ? passes : add_passes(), options, device,
                               plan);
  }

  const auto passes_per_window = static_cast<std::int64_t>(passes.size()) + 1;  // and the reference
  std::int64_t done = state.windows() * passes_per_window;
  int signal = 0;
  std::mutex reporting;
  const auto go_on = [&](std::int64_t more) {
    const std::lock_guard lock(reporting);
    done += more;
    if (more > 0) control.report({"validate", done, window_count * passes_per_window, "passes"});
    if (signal == 0) signal = control.stopping();
    return signal == 0;
  };
  const auto next_windows = [&] {
    if (state.windows() == window_count) return false;
    std::vector<EvaluationState> found;
    std::vector<std::span<const tokenizers::TextWindow>> shares;
    for (auto left = windows.subspan(static_cast<std::size_t>(state.windows()));
         !left.empty() && shares.size() < all.scorers.size();
         left = left.subspan(shares.back().size())) {
      shares.push_back(left.first(std::min(all.windows_at_once, left.size())));
      found.emplace_back(passes.size(), state.reference_nll.scored);
    }
    std::vector<std::function<void()>> work;
    auto scorer = all.scorers.begin();
    for (std::size_t i = 0; i < shares.size(); ++i, ++scorer)
      work.emplace_back([&, i, scorer] {
        const at::NoGradGuard no_grad;
        scorer->score(shares[i], found[i], go_on);
      });
    forward::run_together(work);
    // Windows behind one that was stopped do not count.
    bool whole = true;
    for (std::size_t i = 0; i < shares.size() && whole; ++i) {
      whole = found[i].windows() == std::ssize(shares[i]);
      if (whole) append_state(state, found[i]);
    }
    if (resumable && state.windows() > 0) save_state(state, key, partial_file);
    if (signal != 0 && state.windows() < window_count)
      throw InterruptedError(
          signal, "validation stopped after " + std::to_string(state.windows()) + " of " +
                      std::to_string(window_count) + " windows" +
                      (resumable ? "; the same command continues from there" : ""));
    return state.windows() < window_count;
  };
  forward::in_lockstep(options.peers, next_windows);
  return state;
}

/// Scores all windows, each process its part.
EvaluationState score_windows(const models::ModelReader& model,
                              const std::vector<tokenizers::TextWindow>& windows,
                              const std::vector<Candidate>& candidates,
                              const EvaluateOptions& options, const RunControl& control) {
  forward::Peers* const peers = options.peers;
  if (!peers) return score_part(model, windows, candidates, options, control);
  const auto [begin, end] = forward::share_of(peers->rank(), peers->size(), windows.size(), 1);
  EvaluationState state = score_part(model, std::span(windows).subspan(begin, end - begin),
                                     candidates, options, control);
  forward::in_lockstep(peers, [&] {
    if (peers->rank() == 0) {
      for (int other = 1; other < peers->size(); ++other)
        unpack_state(peers->receive_from(other), state);
      peers->broadcast(pack_state(state));
    } else {
      peers->send_to_first(pack_state(state));
      const std::vector<std::byte> all = peers->broadcast({});
      state = EvaluationState(state.passes.size(), state.reference_nll.scored);
      unpack_state(all, state);
    }
    return false;
  });
  return state;
}

}  // namespace

std::filesystem::path own_partial_file(const EvaluateOptions& options) {
  std::filesystem::path file = options.partial_file;
  if (options.peers && !file.empty())
    file += "-rank-" + std::to_string(options.peers->rank()) + "-of-" +
            std::to_string(options.peers->size());
  return file;
}

std::vector<EvaluationPass> evaluation_passes(const std::vector<Candidate>& candidates,
                                              const std::vector<std::string>& modes) {
  static const forward::CacheRuntime kSimulated{kSimulation, nullptr};
  std::vector<EvaluationPass> passes;
  for (const std::string& mode : modes) {
    for (const Candidate& candidate : candidates) {
      if (is_reference(candidate)) continue;
      if (mode == "decode") {
        for (const forward::CacheRuntime& runtime : candidate.runtimes)
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

EvaluationState score_tokens(const models::ModelReader& model,
                             const std::vector<tokenizers::TextWindow>& windows,
                             const std::vector<Candidate>& candidates,
                             const EvaluateOptions& options, const RunControl& control) {
  check_arguments(windows, candidates, options);
  const at::NoGradGuard no_grad;
  if (options.threads > 0) at::set_num_threads(options.threads);
  return score_windows(model, windows, candidates, options, control);
}

Validation evaluate(const models::ModelReader& model,
                    const std::vector<tokenizers::TextWindow>& windows,
                    const std::vector<Candidate>& candidates, const EvaluateOptions& options,
                    const RunControl& control) {
  check_arguments(windows, candidates, options);
  const at::NoGradGuard no_grad;
  if (options.threads > 0) at::set_num_threads(options.threads);

  const EvaluationState state = score_windows(model, windows, candidates, options, control);
  const std::vector<EvaluationPass> passes = evaluation_passes(candidates, options.modes);
  const PassScores reference = reference_scores(state);

  Validation validation;
  const ScoredRange range = scored_range(options.window);
  validation.window = options.window;
  validation.windows = static_cast<int>(windows.size());
  validation.first_scored = static_cast<int>(range.first);
  validation.scored_tokens = state.windows() * range.count;
  for (const std::string& mode : options.modes) {
    const auto plan_pass =
        std::find_if(passes.begin(), passes.end(), [&](const EvaluationPass& pass) {
          return pass.mode == mode && pass.candidate->name == options.plan_name;
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
      const EvaluationPass& what = passes[i];
      if (what.mode == mode)
        add(what.candidate->name, what.runtime->name, state.passes[i], what.candidate->bundle);
    }
  }
  return validation;
}

}  // namespace kvplan::evaluation
