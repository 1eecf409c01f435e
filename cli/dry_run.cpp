#include "cli/dry_run.h"

#include <chrono>
#include <ctime>
#include <iostream>
#include <nlohmann/json.hpp>

namespace kvplan::cli {

void print_dry_run(const std::string& what, nlohmann::json facts,
                   const std::function<estimates::WorkEstimate()>& estimate,
                   const GlobalOptions& global) {
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - global.begun;
  const double cpu_spent = static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  estimates::WorkEstimate work = estimate();
  work.seconds += spent.count();
  work.cpu_seconds += cpu_spent;
  if (global.json) {
    facts["estimated_seconds"] = work.seconds;
    facts["estimated_cpu_seconds"] = work.cpu_seconds;
    facts["estimated_memory_bytes"] = work.memory_bytes;
    std::cout << facts.dump(1) << '\n';
    return;
  }
  std::cout << what << ": about " << duration(work.seconds) << ", " << megabytes(work.memory_bytes)
            << " of memory\n";
}

}  // namespace kvplan::cli
