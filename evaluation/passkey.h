#pragma once
// Passkey retrieval: a key is hidden in a long text, and the model asked for it at the end. In the
// spirit of Mohtashami & Jaggi, "Landmark Attention" (NeurIPS 2023), with the text under validation
// as the haystack.

#include <cstdint>
#include <vector>

#include "evaluation/evaluator.h"
#include "models/model.h"
#include "tokenizers/text.h"
#include "tokenizers/tokenizer.h"

namespace kvplan::evaluation {

struct PasskeyOptions {
  std::vector<int> contexts;  // tokens, question and key included; empty: default_contexts
  std::vector<double> depths = {0, 0.25, 0.5, 0.75, 1};  // of the key; 0: at the begin
  int trials = 4;                                        // keys and haystacks of each cell
  std::uint64_t seed = 0;
};

/// 512, 1024 and 2048, each at most the model's context.
std::vector<int> default_contexts(const models::ModelConfig& model);

/// One text that ends with the key.
struct PasskeyTask {
  int context = 0;
  double depth = 0;
  std::vector<std::int32_t> tokens;  // `context` of them
  std::size_t key_begin = 0;         // the key is tokens[key_begin ..]
};

/// contexts x depths x trials, in that order. Trial i of a context has the same key and haystack at
/// every depth. ArgumentError: a context beyond the model's or too short for the key and the
/// question, a depth outside 0..1. InputError: no source as long as the longest context.
std::vector<PasskeyTask> make_passkey_tasks(const models::ModelConfig& model,
                                            const tokenizers::Tokenizer& tokenizer,
                                            const std::vector<tokenizers::TokenSource>& sources,
                                            const PasskeyOptions& options);

/// By mode, candidate (fp16 first), context and depth. Of `options` modes, threads and weights
/// count. Progress counts forward passes. InterruptedError when control.stopping(); InputError: NaN
/// or Inf in a forward pass.
std::vector<PasskeyResult> check_passkey(const models::ModelReader& model,
                                         const std::vector<PasskeyTask>& tasks,
                                         const std::vector<Candidate>& candidates,
                                         const EvaluateOptions& options, const RunControl& control);

}  // namespace kvplan::evaluation
