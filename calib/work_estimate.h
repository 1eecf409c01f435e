#pragma once
// What a profile will cost before it is made: for --dry-run.

#include <cstdint>

#include "calib/profiler.h"
#include "models/model.h"

namespace kvplan::calib {

struct WorkEstimate {
  double seconds = 0;
  std::int64_t memory_bytes = 0;  // most that the process holds at once
};

/// Time and memory of a profile of `windows` windows on the CPU. The time is the count of floating
/// point operations over a rate that is measured here, for a third of a second, on products of the
/// model's own size; loading the weights is in it. `options`: window, batch, coherent_windows,
/// weights, threads.
WorkEstimate estimate_profile(const models::ModelReader& model, std::int64_t windows,
                              const ProfileOptions& options);

}  // namespace kvplan::calib
