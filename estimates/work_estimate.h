#pragma once
// What work on a model will cost before it is done: for --dry-run.

#include <cstdint>
#include <vector>

#include "calib/profiler.h"
#include "evaluation/evaluator.h"
#include "models/model.h"
#include "tokenizers/text.h"

namespace kvplan::estimates {

/// Of one process, from the first weight that is read on. CPU time is what the threads of the
/// process use together: other work on the machine stretches the seconds, not these.
struct WorkEstimate {
  double seconds = 0, cpu_seconds = 0;
  std::int64_t memory_bytes = 0;  // most that the process holds at once
};

/// The work itself is measured, on two windows and a few layers of this model, and stretched to all
/// of them: a part grows with the layers, another (embedding, head, files) does not. Windows are
/// cut where they would take too long, and stretched by counted operations. Memory is counted.
/// `options` as in calib::run_profile and evaluation::score_tokens, for one process (peers are not
/// counted).
WorkEstimate estimate_profile(const models::ModelReader& model,
                              const std::vector<tokenizers::TextWindow>& windows,
                              const std::vector<ProfileSource>& sources,
                              const calib::ProfileOptions& options);
WorkEstimate estimate_evaluation(const models::ModelReader& model,
                                 const std::vector<tokenizers::TextWindow>& windows,
                                 const std::vector<evaluation::Candidate>& candidates,
                                 const evaluation::EvaluateOptions& options);

}  // namespace kvplan::estimates
