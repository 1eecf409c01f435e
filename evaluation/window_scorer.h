#pragma once
// Runs one window of text through a model with every candidate cache and scores the predictions.

#include <ATen/core/Tensor.h>

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "evaluation/evaluation_state.h"
#include "evaluation/evaluator.h"
#include "forward/activation_store.h"
#include "forward/cache_attention.h"
#include "forward/decoder.h"
#include "forward/memory_plan.h"
#include "forward/stored_cache.h"

namespace kvplan::evaluation {

inline constexpr const char* kReferenceName = "fp16";

/// What is evaluated with one of two caches, borrowed.
struct Pass {
  EvaluationPass what;
  const forward::StoredCache* simulated = nullptr;
  forward::CacheAttention* paged = nullptr;  // takes several windows at once
};

/// Positions first .. first + count - 1 of a window are scored; each predicts the token after it.
struct ScoredRange {
  std::int64_t first = 0, count = 0;
};
ScoredRange scored_range(int window);

/// What comparing logits takes.
std::int64_t logits_bytes();

class WindowScorer {
 public:
  /// `passes` are borrowed and must outlive the scorer. A plan that streams has no paged ones.
  WindowScorer(const models::ModelReader& model, const std::vector<Pass>& passes,
               const EvaluateOptions& options, forward::Device device,
               const forward::MemoryPlan& plan);

  /// Adds the windows' scores to `state`, as many as the paged caches have sequences at most.
  /// `go_on(n)` is told of n forward passes of one window done; when it says no before the last,
  /// `state` stays as it was and the answer is false; n is 0 between layers. InputError when a
  /// forward pass gives NaN or Inf (file, window, candidate).
  bool score(std::span<const tokenizers::TextWindow> windows, EvaluationState& state,
             const std::function<bool(std::int64_t)>& go_on);

 private:
  using Slot = forward::ActivationStore::Slot;
  /// One window on its way through one pass; pass null: the reference.
  struct Lane {
    std::size_t window = 0;
    const Pass* pass = nullptr;
    forward::AttentionPath path;
    Slot slot = 0;  // of its activations, at last of its scored rows
  };
  std::vector<Lane> make_lanes(std::size_t windows) const;
  bool run_in_turn(std::span<const tokenizers::TextWindow> windows, const at::Tensor& ids,
                   std::span<Lane> lanes, const std::function<bool(std::int64_t)>& go_on);
  bool run_by_layer(std::span<const tokenizers::TextWindow> windows, const at::Tensor& ids,
                    std::span<Lane> lanes, const std::function<bool(std::int64_t)>& go_on);
  void keep_rows(Lane& lane, const at::Tensor& hidden, std::int64_t sequence,
                 const tokenizers::TextWindow& window);
  at::Tensor take(Slot slot);
  at::Tensor scored_rows(const at::Tensor& hidden, std::int64_t sequence) const;
  void require_finite(const at::Tensor& x, const tokenizers::TextWindow& window,
                      const std::string& candidate) const;
  void compare(const at::Tensor& reference, const std::vector<at::Tensor>& hidden,
               const at::Tensor& labels, const tokenizers::TextWindow& window,
               EvaluationState& state) const;

  std::string path_;
  forward::Decoder decoder_;
  const std::vector<Pass>& passes_;
  ScoredRange range_;
  std::int64_t chunk_rows_;
  bool stream_;
  forward::ActivationStore activations_;
};

}  // namespace kvplan::evaluation
