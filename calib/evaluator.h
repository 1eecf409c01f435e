#pragma once
// Held-out evaluation: perplexity and KL divergence of caches stored by plans against the fp16
// cache.

#include <string>
#include <vector>

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
  std::vector<std::string> modes = {
      "worst"};  // worst: every vector after the sinks is quantised as produced; decode: pages as
                 // the runtime fills them
  int threads = 0;
  std::uint64_t bootstrap_seed = 0;
  int bootstrap_samples = 2000;
  std::string plan_name;               // candidate that kl_minus_plan is paired with
  std::filesystem::path partial_file;  // state of finished windows, to resume from; empty: none
};

/// Positions window/4 .. window-2 of each window are scored (quantization.md section 4). Fills
/// candidates, scored_tokens, window, windows, first_scored of the result, "fp16" first.
Validation evaluate(const ModelReader& model, const std::vector<TextWindow>& windows,
                    const std::vector<Candidate>& candidates, const EvaluateOptions& options,
                    const RunControl& control);

}  // namespace kvplan::calib
