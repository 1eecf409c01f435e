#include "evaluation/text_results.h"

#include <cmath>

#include "evaluation/window_scorer.h"
#include "schemas/error.h"

namespace kvplan::evaluation {
namespace {

TokenScores only_windows(const TokenScores& scores, const std::vector<std::int64_t>& chosen) {
  TokenScores part{.windows = 0, .scored = scores.scored, .values = {}};
  for (const std::int64_t w : chosen) append_window(part, scores.window(w));
  return part;
}

}  // namespace

std::vector<TextResult> results_by_text(const EvaluationState& state,
                                        const std::vector<tokenizers::TextWindow>& windows,
                                        const std::vector<std::string>& text_names,
                                        const std::vector<Candidate>& candidates,
                                        const EvaluateOptions& options) {
  if (text_names.size() < 2) return {};
  if (static_cast<std::int64_t>(windows.size()) != state.windows())
    throw InternalError(std::to_string(state.windows()) + " windows were scored, results by text " +
                        "asked for " + std::to_string(windows.size()));
  std::vector<std::vector<std::int64_t>> windows_of(text_names.size());
  for (std::size_t w = 0; w < windows.size(); ++w)
    windows_of.at(static_cast<std::size_t>(windows[w].source))
        .push_back(static_cast<std::int64_t>(w));

  std::vector<TextResult> results;
  const auto add = [&](const std::string& name, const std::string& mode, const PassScores* scores) {
    for (std::size_t t = 0; t < text_names.size(); ++t) {
      if (windows_of[t].empty()) continue;
      const TokenScores reference = only_windows(state.reference_nll, windows_of[t]);
      TextResult result{.name = name,
                        .mode = mode,
                        .text = text_names[t],
                        .windows = static_cast<int>(windows_of[t].size()),
                        .perplexity = std::exp(mean(reference.values)),
                        .perplexity_rise = 0,
                        .kl = {}};
      if (scores) {
        const PassScores part{only_windows(scores->kl, windows_of[t]),
                              only_windows(scores->nll, windows_of[t]),
                              only_windows(scores->same_top1, windows_of[t])};
        const CandidateResult of_text = summarise(part, reference, nullptr, options);
        result.perplexity = of_text.perplexity;
        result.perplexity_rise = of_text.perplexity_rise;
        result.kl = {of_text.kl.mean, of_text.kl.standard_error};
      }
      results.push_back(std::move(result));
    }
  };
  const auto passes = evaluation_passes(candidates, options.modes);
  for (const std::string& mode : options.modes) {
    add(kReferenceName, mode, nullptr);
    const Candidate* added = nullptr;  // its runtimes follow each other; the first stands for all
    for (std::size_t i = 0; i < passes.size(); ++i) {
      if (passes[i].mode != mode || passes[i].candidate == added) continue;
      added = passes[i].candidate;
      add(added->name, mode, &state.passes[i]);
    }
  }
  return results;
}

}  // namespace kvplan::evaluation
