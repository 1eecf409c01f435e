#include "evaluation/passkey.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "evaluation/evaluation_statistics.h"
#include "evaluation/task_model.h"
#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::evaluation {
namespace {

constexpr std::uint32_t kFirstKey = 10000, kKeys = 90000;  // five digits

std::string needle_text(const std::string& key) {
  return "\n\nA note for later: the secret passkey is " + key +
         ". Whoever reads on will be asked for " + key + ".\n\n";
}

constexpr const char* kQuestion =
    "\n\nQuestion: Which secret passkey does the note above give?\nAnswer: The secret passkey is";

using Tokens = std::vector<std::int32_t>;

/// Everything but the haystack.
struct PasskeyParts {
  Tokens needle, question_and_key;
  std::size_t key_tokens = 0;

  PasskeyParts(const tokenizers::Tokenizer& tokenizer, const std::string& key)
      : needle(tokenizer.encode(needle_text(key))),
        question_and_key(tokenizer.encode(kQuestion + (" " + key))) {
    const Tokens question = tokenizer.encode(kQuestion);
    const auto shared = std::mismatch(question.begin(), question.end(), question_and_key.begin(),
                                      question_and_key.end());
    key_tokens = static_cast<std::size_t>(question_and_key.end() - shared.second);
  }
  std::size_t tokens() const { return needle.size() + question_and_key.size(); }
};

PasskeyTask make_task(const PasskeyParts& parts, std::span<const std::int32_t> haystack,
                      double depth) {
  const auto cut =
      static_cast<std::size_t>(std::floor(depth * static_cast<double>(haystack.size())));
  PasskeyTask task;
  task.depth = depth;
  const auto append = [&](std::span<const std::int32_t> part) {
    task.tokens.insert(task.tokens.end(), part.begin(), part.end());
  };
  append(haystack.first(cut));
  append(parts.needle);
  append(haystack.subspan(cut));
  append(parts.question_and_key);
  task.context = static_cast<int>(task.tokens.size());
  task.key_begin = task.tokens.size() - parts.key_tokens;
  return task;
}

void check_grid(const models::ModelConfig& model, const std::vector<int>& contexts,
                const PasskeyOptions& options) {
  if (contexts.empty() || options.depths.empty() || options.trials < 1)
    throw ArgumentError("a passkey check needs at least one context, depth and trial");
  for (const int context : contexts)
    if (model.max_context > 0 && context > model.max_context)
      throw ArgumentError("a passkey context of " + std::to_string(context) +
                          " tokens is beyond the " + std::to_string(model.max_context) +
                          " that the model was trained for; give a shorter one");
  for (const double depth : options.depths)
    if (!(depth >= 0 && depth <= 1))
      throw ArgumentError("a passkey depth is " + std::to_string(depth) +
                          "; expected a fraction of the context from 0 to 1");
}

/// The sources that hold `length` tokens.
std::vector<const tokenizers::TokenSource*> haystacks(
    const std::vector<tokenizers::TokenSource>& sources, int length) {
  std::vector<const tokenizers::TokenSource*> long_enough;
  std::size_t most = 0;
  for (const tokenizers::TokenSource& source : sources) {
    most = std::max(most, source.tokens.size());
    if (source.tokens.size() >= static_cast<std::size_t>(length)) long_enough.push_back(&source);
  }
  if (long_enough.empty())
    throw InputError(sources.empty() ? "text" : sources.front().info.name, "",
                     "expected " + std::to_string(length) +
                         " tokens to hide a passkey in, found a longest text of " +
                         std::to_string(most) +
                         "; give more text, a larger part or shorter --passkey-contexts");
  return long_enough;
}

/// What the trials of one cell gave to one candidate.
struct CellScores {
  std::vector<double> log_probability, change, exact_match;
};

}  // namespace

std::vector<int> default_contexts(const models::ModelConfig& model) {
  std::vector<int> contexts;
  for (const std::int64_t context : {512, 1024, 2048}) {
    const auto bounded =
        static_cast<int>(model.max_context > 0 ? std::min(context, model.max_context) : context);
    if (contexts.empty() || contexts.back() != bounded) contexts.push_back(bounded);
  }
  return contexts;
}

std::vector<PasskeyTask> make_passkey_tasks(const models::ModelConfig& model,
                                            const tokenizers::Tokenizer& tokenizer,
                                            const std::vector<tokenizers::TokenSource>& sources,
                                            const PasskeyOptions& options) {
  const std::vector<int> contexts =
      options.contexts.empty() ? default_contexts(model) : options.contexts;
  check_grid(model, contexts, options);
  std::vector<PasskeyTask> tasks;
  for (const int context : contexts) {
    const auto texts = haystacks(sources, context);
    for (const double depth : options.depths) {
      for (int trial = 0; trial < options.trials; ++trial) {
        quant::RandomStream draws(options.seed, quant::StreamPurpose::kStudy,
                                  static_cast<std::uint32_t>(context),
                                  static_cast<std::uint32_t>(trial));
        const auto below = [&](std::size_t bound) {
          return draws.next_below(static_cast<std::uint32_t>(bound));
        };
        const PasskeyParts parts(tokenizer, std::to_string(kFirstKey + below(kKeys)));
        const auto length = static_cast<std::size_t>(context);
        if (parts.tokens() >= length)
          throw ArgumentError("a passkey context of " + std::to_string(context) +
                              " tokens has no room for a haystack; the key and the question take " +
                              std::to_string(parts.tokens()));
        const Tokens& text = texts[below(texts.size())]->tokens;
        const std::size_t begin = below(text.size() - length + 1);
        tasks.push_back(
            make_task(parts, std::span(text).subspan(begin, length - parts.tokens()), depth));
      }
    }
  }
  return tasks;
}

std::vector<PasskeyResult> check_passkey(const models::ModelReader& model,
                                         const std::vector<PasskeyTask>& tasks,
                                         const std::vector<Candidate>& candidates,
                                         const EvaluateOptions& options,
                                         const RunControl& control) {
  const at::NoGradGuard no_grad;
  const TaskModel runner(model, candidates, options);
  const auto& passes = runner.passes();
  TaskProgress progress(control, "passkey",
                        static_cast<std::int64_t>(tasks.size()) * runner.forward_passes());

  std::vector<std::vector<PasskeyResult>> found(passes.size());
  for (auto cell = tasks.begin(); cell != tasks.end();) {
    const auto cell_end = std::find_if(cell, tasks.end(), [&](const PasskeyTask& task) {
      return task.context != cell->context || task.depth != cell->depth;
    });
    std::vector<CellScores> scores(passes.size());
    for (auto task = cell; task != cell_end; ++task) {
      const std::span<const std::int32_t> tokens = task->tokens,
                                          key = tokens.subspan(task->key_begin);
      const auto log_p = runner.log_probabilities(
          tokens.first(tokens.size() - 1), static_cast<std::int64_t>(task->key_begin) - 1,
          "passkey at depth " + std::to_string(task->depth) + " of " +
              std::to_string(task->context) + " tokens",
          [&] { progress.advance(); });
      const double reference = log_probability_of(key, log_p.front());
      for (std::size_t i = 0; i < passes.size(); ++i) {
        const double own = log_probability_of(key, log_p[i]);
        const auto equal = most_likely(key, log_p[i]);
        scores[i].log_probability.push_back(own);
        scores[i].change.push_back(own - reference);
        scores[i].exact_match.push_back(std::find(equal.begin(), equal.end(), false) ==
                                        equal.end());
      }
    }
    for (std::size_t i = 0; i < passes.size(); ++i)
      found[i].push_back({.name = passes[i].name,
                          .mode = passes[i].mode,
                          .context = cell->context,
                          .depth = cell->depth,
                          .trials = static_cast<int>(cell_end - cell),
                          .log_probability = mean_estimate(scores[i].log_probability),
                          .log_probability_change = mean_estimate(scores[i].change),
                          .exact_match = mean_estimate(scores[i].exact_match)});
    cell = cell_end;
  }
  std::vector<PasskeyResult> results;
  for (const auto& of_pass : found) results.insert(results.end(), of_pass.begin(), of_pass.end());
  return results;
}

}  // namespace kvplan::evaluation
