#pragma once
// Prompts whose greedy continuations under the fp16 cache the other caches are measured against.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "evaluation/evaluator.h"
#include "models/model.h"
#include "tokenizers/tokenizer.h"

namespace kvplan::evaluation {

struct PromptOptions {
  int max_tokens = 64;  // of a continuation
  std::string stop;     // a single token's text, such as "<|im_end|>", that ends one; empty: none
};

struct Prompt {
  std::string where;     // "line 3"
  std::string category;  // empty: none
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> with_answer;  // the prompt, then the answer; empty: none
  std::size_t answer_begin = 0;           // the answer is with_answer[answer_begin ..]
};

struct PromptSet {
  PromptSource source;
  std::vector<Prompt> prompts;
  std::int32_t stop_token = -1;  // negative: none
};

/// Reads .jsonl ({"prompt": text, "answer": text, "category": text}, the last two optional, other
/// fields ignored; the answer follows the prompt as it stands) or plain text (prompts apart by
/// blank lines). Special tokens in the text are recognised, none is added. InputError{file, line}:
/// missing, empty or binary file, a line without a prompt, a prompt whose continuation or answer
/// does not fit the model's context. ArgumentError: max_tokens below 1, a stop text of other than
/// one token.
PromptSet load_prompts(const std::filesystem::path& file, const tokenizers::Tokenizer& tokenizer,
                       const models::ModelConfig& model, const PromptOptions& options);

/// By mode and candidate (fp16 first): all prompts, then each category in the order of the file.
/// Candidates are fed the fp16 continuation; up to its first miss that equals a free run. Of
/// `options` modes, threads and weights count. Progress counts forward passes. InterruptedError
/// when control.stopping(); InputError: NaN or Inf in a forward pass.
std::vector<PromptResult> check_prompts(const models::ModelReader& model, const PromptSet& set,
                                        const std::vector<Candidate>& candidates,
                                        const EvaluateOptions& options, const RunControl& control);

}  // namespace kvplan::evaluation
