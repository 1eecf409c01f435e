#pragma once
// A model with every candidate cache, as the task checks use it.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "evaluation/evaluator.h"
#include "forward/decoder.h"
#include "forward/stored_cache.h"
#include "schemas/run_control.h"

namespace kvplan::evaluation {

/// One candidate in one mode; cache null: fp16.
struct TaskPass {
  std::string name, mode;
  const forward::StoredCache* cache = nullptr;
};

class TaskModel {
 public:
  /// Of `options` modes, threads and weights count. ArgumentError for an unknown mode or a plan of
  /// another geometry.
  TaskModel(const models::ModelReader& model, const std::vector<Candidate>& candidates,
            const EvaluateOptions& options);

  const forward::Decoder& decoder() const { return decoder_; }
  /// Mode by mode, fp16 first in each.
  const std::vector<TaskPass>& passes() const { return passes_; }

  /// Log-probabilities [tokens - first, vocab] in double of what follows the positions from `first`
  /// on, for each of passes(). `after_pass` is called after each forward pass (fp16 takes one for
  /// all modes) and may throw to end the work. InputError{model, where} on NaN or Inf.
  std::vector<at::Tensor> log_probabilities(std::span<const std::int32_t> tokens,
                                            std::int64_t first, const std::string& where,
                                            const std::function<void()>& after_pass) const;
  std::int64_t forward_passes() const;  // of one call of log_probabilities

 private:
  std::string path_;
  forward::Decoder decoder_;
  std::list<forward::StoredCache> caches_;  // borrowed by passes_
  std::vector<TaskPass> passes_;
};

/// Sum of the log-probabilities of tokens[i] in row i.
double log_probability_of(std::span<const std::int32_t> tokens, const at::Tensor& log_p);

/// Whether tokens[i] is the most likely token in row i.
std::vector<bool> most_likely(std::span<const std::int32_t> tokens, const at::Tensor& log_p);

/// Counts the forward passes of a task check.
class TaskProgress {
 public:
  TaskProgress(const RunControl& control, std::string_view stage, std::int64_t total)
      : control_(control), stage_(stage), total_(total) {}
  /// One pass is done. InterruptedError when the work is to stop.
  void advance();
  void check_stop() const;

 private:
  const RunControl& control_;
  std::string_view stage_;
  std::int64_t done_ = 0, total_;
};

}  // namespace kvplan::evaluation
