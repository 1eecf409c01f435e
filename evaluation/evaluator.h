#pragma once
// Held-out evaluation: perplexity and KL divergence of caches stored by plans against the fp16
// cache.

#include <string>
#include <vector>

#include "evaluation/evaluation_state.h"
#include "forward/cache_runtime.h"
#include "forward/device.h"
#include "forward/peers.h"
#include "models/model.h"
#include "schemas/plan.h"
#include "schemas/run_control.h"
#include "schemas/validation.h"
#include "tokenizers/text.h"

namespace kvplan::evaluation {

/// Round trips through the codecs where the other runtimes keep packed pages.
inline constexpr const char* kSimulation = "cpu";

struct Candidate {
  std::string name;
  const PlanBundle* bundle = nullptr;  // null: fp16 (always evaluated as the reference anyway)
  // Mode decode runs through each; one without make_cache is the simulation, which mode worst takes
  // in any case.
  std::vector<forward::CacheRuntime> runtimes = {{kSimulation, nullptr}};
};

struct EvaluateOptions {
  int window = 1024;
  // worst: every vector after the sinks is quantised as produced; decode: pages as the runtime
  // fills them.
  std::vector<std::string> modes = {"worst"};
  int threads = 0;
  forward::WeightType weights = forward::WeightType::kFloat32;
  std::vector<forward::Device> devices = {forward::Device::kCpu};  // several share the windows
  // Of the process, or of each GPU; 0: no limit. Layers are then read when they are used if need
  // be; runtimes that keep pages need all weights.
  std::int64_t memory_bytes = 0;
  std::filesystem::path spill_folder = std::filesystem::temp_directory_path();  // of activations
  forward::Peers* peers = nullptr;  // the other processes of this run; null: none
  std::uint64_t bootstrap_seed = 0;
  int bootstrap_samples = 2000;
  std::string plan_name;  // candidate that kl_minus_plan is paired with
  // Scores of finished windows, to resume from; empty: none. own_partial_file is not removed at
  // the end.
  std::filesystem::path partial_file;
};

/// Where this process keeps its part of options.partial_file.
std::filesystem::path own_partial_file(const EvaluateOptions& options);

/// One candidate in one mode through one runtime.
struct EvaluationPass {
  const Candidate* candidate = nullptr;
  std::string mode;
  const forward::CacheRuntime* runtime = nullptr;
};

/// What is evaluated beside the reference: mode by mode, the candidates that have a bundle and
/// another name than fp16. The result borrows `candidates`.
std::vector<EvaluationPass> evaluation_passes(const std::vector<Candidate>& candidates,
                                              const std::vector<std::string>& modes);

/// Per-token scores without the summary: state.passes in the order of evaluation_passes. Errors,
/// progress and resumption as in evaluate.
EvaluationState score_tokens(const models::ModelReader& model,
                             const std::vector<tokenizers::TextWindow>& windows,
                             const std::vector<Candidate>& candidates,
                             const EvaluateOptions& options, const RunControl& control);

/// The figures of one candidate from its scores; `plan`: scores that kl_minus_plan is paired with,
/// or null. Name, mode, runtime, bits and prediction stay as they are.
CandidateResult summarise(const PassScores& scores, const TokenScores& reference_nll,
                          const PassScores* plan, const EvaluateOptions& options);

/// With peers each process scores part of the windows, and all return the scores of all, which are
/// those of one process with as many threads; likewise with several devices.
/// Positions window/4 .. window-2 of each window are scored (quantization.md section 4). Fills
/// candidates (by mode, "fp16" first in each, then evaluation_passes), scored_tokens, window,
/// windows, first_scored of the result. A partial file of other inputs is overwritten. Progress
/// counts forward passes. InterruptedError when control.stopping(), finished windows saved;
/// InputError: NaN or Inf in a forward pass (window, candidate), damaged partial file;
/// ArgumentError: a plan for another geometry, windows of other lengths, ids outside the
/// vocabulary.
Validation evaluate(const models::ModelReader& model,
                    const std::vector<tokenizers::TextWindow>& windows,
                    const std::vector<Candidate>& candidates, const EvaluateOptions& options,
                    const RunControl& control);

}  // namespace kvplan::evaluation
