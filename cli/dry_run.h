#pragma once
// What --dry-run prints of long work: what would be done, and what it would cost.

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "calib/work_estimate.h"
#include "cli/options.h"

namespace kvplan::cli {

/// "would profile 64 windows ...: about 2:05, 1,022 MB of memory", or with --json `facts` and
/// estimated_seconds, estimated_cpu_seconds, estimated_memory_bytes. What the command has spent
/// before it estimates (program, text, plans) is added: the real run spends it, too.
void print_dry_run(const std::string& what, nlohmann::json facts,
                   const std::function<calib::WorkEstimate()>& estimate,
                   const GlobalOptions& global);

}  // namespace kvplan::cli
