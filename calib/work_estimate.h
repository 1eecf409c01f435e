#pragma once
// What work on a model will cost before it is done: for --dry-run.

#include <cstdint>
#include <vector>

#include "calib/evaluator.h"
#include "calib/model.h"
#include "calib/profiler.h"
#include "calib/text.h"

namespace kvplan::calib {

/// Of one process, from the first weight that is read on. CPU time is what the threads of the
/// process use together: other work on the machine stretches the seconds, not these.
struct WorkEstimate {
  double seconds = 0, cpu_seconds = 0;
  std::int64_t memory_bytes = 0;  // most that the process holds at once
};

/// The work itself is measured, on two windows and a few layers of this model, and stretched to all
/// of them: a part grows with the layers, another (embedding, head, files) does not. Windows are
/// cut where they would take too long, and stretched by counted operations. Memory is counted.
/// `options` as in run_profile and score_tokens, for one process (peers are not counted).
WorkEstimate estimate_profile(const ModelReader& model, const std::vector<TextWindow>& windows,
                              const std::vector<ProfileSource>& sources,
                              const ProfileOptions& options);
WorkEstimate estimate_evaluation(const ModelReader& model, const std::vector<TextWindow>& windows,
                                 const std::vector<Candidate>& candidates,
                                 const EvaluateOptions& options);

}  // namespace kvplan::calib
