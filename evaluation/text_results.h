#pragma once
// The figures of an evaluation for each text by itself: one domain may suffer where another does
// not.

#include <string>
#include <vector>

#include "evaluation/evaluator.h"

namespace kvplan::evaluation {

/// By mode, candidate (fp16 first) and text. `state` comes from score_tokens with the same windows,
/// candidates and modes; texts without a window are left out. Empty for a single text.
std::vector<TextResult> results_by_text(const EvaluationState& state,
                                        const std::vector<tokenizers::TextWindow>& windows,
                                        const std::vector<std::string>& text_names,
                                        const std::vector<Candidate>& candidates,
                                        const EvaluateOptions& options);

}  // namespace kvplan::evaluation
