#pragma once
// The same work on several devices at once.

#include <exception>
#include <functional>
#include <span>
#include <thread>
#include <vector>

namespace kvplan::forward {

/// Calls every function, the first on this thread and each other one on its own. When some throw,
/// the error of the first of them is thrown once all have ended.
inline void run_together(std::span<const std::function<void()>> work) {
  std::vector<std::exception_ptr> failures(work.size());
  const auto run = [&](std::size_t i) {
    try {
      work[i]();
    } catch (...) {
      failures[i] = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 1; i < work.size(); ++i) threads.emplace_back(run, i);
    if (!work.empty()) run(0);
  }
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace kvplan::forward
