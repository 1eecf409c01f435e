#pragma once
// Runs one window of text through a model with every candidate cache and scores the predictions.
// Internal to calib.

#include <ATen/core/Tensor.h>

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "calib/cache_attention.h"
#include "calib/decoder.h"
#include "calib/evaluation_state.h"
#include "calib/evaluator.h"
#include "calib/stored_cache.h"

namespace kvplan::calib {

inline constexpr const char* kReferenceName = "fp16";

/// What is evaluated with one of two caches, borrowed.
struct Pass {
  EvaluationPass what;
  const StoredCache* simulated = nullptr;
  CacheAttention* paged = nullptr;  // takes several windows at once
};

/// Positions first .. first + count - 1 of a window are scored; each predicts the token after it.
struct ScoredRange {
  std::int64_t first = 0, count = 0;
};
ScoredRange scored_range(int window);

class WindowScorer {
 public:
  /// `passes` are borrowed and must outlive the scorer.
  WindowScorer(const ModelReader& model, const std::vector<Pass>& passes,
               const EvaluateOptions& options);

  /// Adds the windows' scores to `state`, as many as the paged caches have sequences at most.
  /// `go_on(n)` is told of n forward passes of one window done; when it says no before the last,
  /// `state` stays as it was and the answer is false. InputError when a forward pass gives NaN or
  /// Inf (file, window, candidate).
  bool score(std::span<const TextWindow> windows, EvaluationState& state,
             const std::function<bool(std::int64_t)>& go_on) const;

 private:
  at::Tensor scored_rows(const at::Tensor& hidden, std::int64_t sequence) const;
  void require_finite(const at::Tensor& x, const TextWindow& window,
                      const std::string& candidate) const;
  void compare(const at::Tensor& reference, const std::vector<at::Tensor>& hidden,
               const at::Tensor& labels, const TextWindow& window, EvaluationState& state) const;

  std::string path_;
  Decoder decoder_;
  const std::vector<Pass>& passes_;
  ScoredRange range_;
  std::int64_t chunk_rows_;
};

}  // namespace kvplan::calib
