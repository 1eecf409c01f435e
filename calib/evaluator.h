#pragma once
// Held-out evaluation: perplexity and KL divergence of caches stored by plans against the fp16
// cache.

#include <string>
#include <vector>

#include "calib/evaluation_state.h"
#include "calib/model.h"
#include "calib/text.h"
#include "schemas/plan.h"
#include "schemas/run_control.h"
#include "schemas/validation.h"

namespace kvplan::calib {

struct Candidate {
  std::string name;
  const PlanBundle* bundle = nullptr;  // null: fp16 (always evaluated as the reference anyway)
};

struct EvaluateOptions {
  int window = 1024;
  // worst: every vector after the sinks is quantised as produced; decode: pages as the runtime
  // fills them.
  std::vector<std::string> modes = {"worst"};
  int threads = 0;
  WeightType weights = WeightType::kFloat32;
  std::uint64_t bootstrap_seed = 0;
  int bootstrap_samples = 2000;
  std::string plan_name;  // candidate that kl_minus_plan is paired with
  // Scores of finished windows, to resume from; empty: none. Not removed at the end.
  std::filesystem::path partial_file;
};

/// Per-token scores without the summary: state.passes in the order of the candidates that have a
/// bundle of another codec than fp16, mode by mode. Errors, progress and resumption as in evaluate.
EvaluationState score_tokens(const ModelReader& model, const std::vector<TextWindow>& windows,
                             const std::vector<Candidate>& candidates,
                             const EvaluateOptions& options, const RunControl& control);

/// The figures of one candidate from its scores; `plan`: scores that kl_minus_plan is paired with,
/// or null. Name, mode, bits and prediction stay empty.
CandidateResult summarise(const PassScores& scores, const TokenScores& reference_nll,
                          const PassScores* plan, const EvaluateOptions& options);

/// Positions window/4 .. window-2 of each window are scored (quantization.md section 4). Fills
/// candidates (by mode, "fp16" first in each), scored_tokens, window, windows, first_scored of the
/// result. A partial file of other inputs is overwritten. Progress counts forward passes.
/// InterruptedError when control.stopping(), finished windows saved; InputError: NaN or Inf in a
/// forward pass (window, candidate), damaged partial file; ArgumentError: a plan for another
/// geometry, windows of other lengths, ids outside the vocabulary.
Validation evaluate(const ModelReader& model, const std::vector<TextWindow>& windows,
                    const std::vector<Candidate>& candidates, const EvaluateOptions& options,
                    const RunControl& control);

}  // namespace kvplan::calib
