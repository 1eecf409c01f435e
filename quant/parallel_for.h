#pragma once
// Independent work items on several threads.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace kvplan::quant {

/// Calls body(i) for i in [0, count) on up to `threads` threads (0: all cores), the caller's among
/// them. Rethrows the exception of the lowest i, so that errors do not depend on the number of
/// threads either.
template <class Body>
void parallel_for(std::size_t count, int threads, const Body& body) {
  const std::size_t wanted = threads > 0 ? static_cast<std::size_t>(threads)
                                         : std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::exception_ptr> errors(count);
  std::atomic<std::size_t> next = 0;
  const auto work = [&] {
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        body(i);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    }
  };
  std::vector<std::jthread> helpers;
  for (std::size_t t = 1; t < std::min(wanted, count); ++t) helpers.emplace_back(work);
  work();
  helpers.clear();  // joins
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace kvplan::quant
