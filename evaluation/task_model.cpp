#include "evaluation/task_model.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

#include "evaluation/window_scorer.h"
#include "schemas/error.h"

namespace kvplan::evaluation {

TaskModel::TaskModel(const models::ModelReader& model, const std::vector<Candidate>& candidates,
                     const EvaluateOptions& options)
    : path_(model.path().string()), decoder_(model, options.weights, options.devices.front()) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  std::vector<TaskPass> stored;
  for (const Candidate& candidate : candidates) {
    if (!candidate.bundle || candidate.name == kReferenceName) continue;
    caches_.emplace_back(*candidate.bundle, model.config(), at::get_num_threads());
    stored.push_back({candidate.name, "", &caches_.back()});
  }
  for (const std::string& mode : options.modes) {
    if (mode != "worst" && mode != "decode")
      throw ArgumentError("unknown evaluation mode '" + mode + "'; choose from worst, decode");
    passes_.push_back({kReferenceName, mode, nullptr});
    for (const TaskPass& pass : stored) passes_.push_back({pass.name, mode, pass.cache});
  }
}

std::vector<at::Tensor> TaskModel::log_probabilities(
    std::span<const std::int32_t> tokens, std::int64_t first, const std::string& where,
    const std::function<void()>& after_pass) const {
  const at::Tensor ids = forward::id_tensor(tokens);
  const auto score = [&](const TaskPass& pass) {
    const at::Tensor hidden = !pass.cache             ? decoder_.hidden(ids, forward::store_as_fp16)
                              : pass.mode == "decode" ? pass.cache->hidden_decode(decoder_, ids)
                                                      : pass.cache->hidden_worst(decoder_, ids);
    const at::Tensor log_p = decoder_.head(hidden[0].narrow(0, first, ids.size(1) - first))
                                 .to(at::kCPU, at::kDouble)
                                 .log_softmax(-1);
    if (!log_p.isfinite().all().item<bool>())
      throw InputError(path_, where,
                       "expected finite logits, found NaN or Inf in the forward pass of " +
                           pass.name + "; check the weights of the model");
    after_pass();
    return log_p;
  };
  std::vector<at::Tensor> found;
  for (const TaskPass& pass : passes_)
    found.push_back(pass.cache || found.empty() ? score(pass) : found.front());
  return found;
}

std::int64_t TaskModel::forward_passes() const {
  return 1 + std::count_if(passes_.begin(), passes_.end(),
                           [](const TaskPass& pass) { return pass.cache != nullptr; });
}

double log_probability_of(std::span<const std::int32_t> tokens, const at::Tensor& log_p) {
  return log_p.gather(1, forward::id_tensor(tokens).transpose(0, 1)).sum().item<double>();
}

std::vector<bool> most_likely(std::span<const std::int32_t> tokens, const at::Tensor& log_p) {
  const at::Tensor top = log_p.argmax(-1).contiguous();
  const std::span<const std::int64_t> ids(top.const_data_ptr<std::int64_t>(), tokens.size());
  std::vector<bool> equal;
  for (std::size_t i = 0; i < tokens.size(); ++i) equal.push_back(ids[i] == tokens[i]);
  return equal;
}

void TaskProgress::advance() {
  control_.report({stage_, ++done_, total_, "passes"});
  check_stop();
}

void TaskProgress::check_stop() const {
  if (const int signal = control_.stopping(); signal != 0)
    throw InterruptedError(signal, "the " + std::string(stage_) + " check stopped after " +
                                       std::to_string(done_) + " of " + std::to_string(total_) +
                                       " passes; the same command does this check again");
}

}  // namespace kvplan::evaluation
