#pragma once
// Weights that stay in their file: a part is read when it is used and dropped when the next one is.

#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

namespace kvplan::forward {

/// The numbered parts of something larger than memory. Holds two of them at most: the one used
/// last, and the one that a thread is reading ahead. Safe to use from several threads, which then
/// should want the same part.
template <class Part>
class WeightStream {
 public:
  using Read = std::function<Part(int)>;
  explicit WeightStream(Read read) : read_(std::move(read)) {}

  /// Part `index`, which stays alive as long as the caller holds it. Fails as `read` does.
  std::shared_ptr<const Part> get(int index) {
    const std::lock_guard lock(mutex_);
    if (held_ && held_->first == index) return held_->second;
    held_.reset();
    if (ahead_ && ahead_->first == index) {
      auto coming = std::move(ahead_->second);
      ahead_.reset();
      held_.emplace(index, coming.get());
    } else {
      held_.emplace(index, load(index));
    }
    return held_->second;
  }

  /// Begins to read part `index` on another thread. What was read ahead before, which is to be used
  /// now, is held instead of the part used last. Fails as `read` of that part does.
  void prefetch(int index) {
    const std::lock_guard lock(mutex_);
    if ((held_ && held_->first == index) || (ahead_ && ahead_->first == index)) return;
    if (ahead_) {
      held_.reset();
      auto [now, coming] = std::move(*ahead_);
      ahead_.reset();
      held_.emplace(now, coming.get());
    }
    ahead_.emplace(index, std::async(std::launch::async, [this, index] { return load(index); }));
  }

  /// Gives up the part that was used last; one that is read ahead stays.
  void drop() {
    const std::lock_guard lock(mutex_);
    held_.reset();
  }

 private:
  using Shared = std::shared_ptr<const Part>;
  Shared load(int index) const { return std::make_shared<const Part>(read_(index)); }

  Read read_;
  std::mutex mutex_;
  std::optional<std::pair<int, Shared>> held_;
  std::optional<std::pair<int, std::future<Shared>>> ahead_;
};

}  // namespace kvplan::forward
