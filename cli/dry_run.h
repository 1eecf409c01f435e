#pragma once
// What --dry-run prints of long work: what would be done, and what it would cost.

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "cli/options.h"
#include "estimates/work_estimate.h"

namespace kvplan::cli {

/// "would profile 64 windows ...: about 2:05, 1,022 MB of memory", or with --json `facts` and
/// estimated_seconds, estimated_cpu_seconds, estimated_memory_bytes. What the command has spent
/// before it estimates (program, text, plans) is added: the real run spends it, too.
void print_dry_run(const std::string& what, nlohmann::json facts,
                   const std::function<estimates::WorkEstimate()>& estimate,
                   const GlobalOptions& global);

}  // namespace kvplan::cli
