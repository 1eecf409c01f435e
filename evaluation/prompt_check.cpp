#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <optional>
#include <span>
#include <string>

#include "evaluation/evaluation_statistics.h"
#include "evaluation/prompts.h"
#include "evaluation/task_model.h"
#include "generation/generator.h"

namespace kvplan::evaluation {
namespace {

/// What one prompt gave to one candidate.
struct PromptScores {
  double agreement = 0, first_divergence = 0, identical = 0, kl = 0;
  std::optional<double> answer, answer_change;
};

PromptScores score_continuation(std::span<const std::int32_t> continuation,
                                const at::Tensor& reference, const at::Tensor& log_q) {
  const auto equal = most_likely(continuation, log_q);
  const auto matches = std::count(equal.begin(), equal.end(), true);
  const auto miss = std::find(equal.begin(), equal.end(), false);
  const at::Tensor kl = (reference.exp() * (reference - log_q)).sum(-1);
  return {.agreement = static_cast<double>(matches) / static_cast<double>(equal.size()),
          .first_divergence = static_cast<double>(miss - equal.begin()),
          .identical = miss == equal.end() ? 1.0 : 0.0,
          .kl = kl.mean().item<double>(),
          .answer = std::nullopt,
          .answer_change = std::nullopt};
}

/// Forward passes of one prompt: the continuation, its tokens under each candidate, the answer.
std::int64_t passes_of(const Prompt& prompt, const TaskModel& runner) {
  return runner.forward_passes() * (prompt.with_answer.empty() ? 1 : 2);
}

/// Scores of one prompt by pass.
std::vector<PromptScores> score_prompt(const TaskModel& runner, const PromptSet& set,
                                       const Prompt& prompt, std::int64_t& continuation_tokens,
                                       TaskProgress& progress) {
  const auto after_pass = [&] { progress.advance(); };
  std::vector<std::int32_t> tokens = prompt.tokens;
  const std::size_t prompt_tokens = tokens.size();
  generation::Generator generator(runner.decoder(), nullptr,
                                  static_cast<std::int64_t>(prompt_tokens) + set.source.max_tokens);
  const auto continuation =
      generation::continue_greedily(generator, prompt.tokens, set.source.max_tokens,
                                    {&set.stop_token, 1}, {[&] { progress.check_stop(); }, {}});
  continuation_tokens = static_cast<std::int64_t>(continuation.size());
  tokens.insert(tokens.end(), continuation.begin(), continuation.end() - 1);
  const auto log_p = runner.log_probabilities(tokens, static_cast<std::int64_t>(prompt_tokens) - 1,
                                              "prompt of " + prompt.where, after_pass);
  std::vector<PromptScores> scores;
  for (const at::Tensor& own : log_p)
    scores.push_back(score_continuation(continuation, log_p.front(), own));
  if (prompt.with_answer.empty()) return scores;

  const std::span<const std::int32_t> whole = prompt.with_answer,
                                      answer = whole.subspan(prompt.answer_begin);
  const auto of_answer = runner.log_probabilities(
      whole.first(whole.size() - 1), static_cast<std::int64_t>(prompt.answer_begin) - 1,
      "answer of " + prompt.where, after_pass);
  const double reference = log_probability_of(answer, of_answer.front());
  for (std::size_t i = 0; i < scores.size(); ++i) {
    scores[i].answer = log_probability_of(answer, of_answer[i]);
    scores[i].answer_change = *scores[i].answer - reference;
  }
  return scores;
}

/// The categories of a set in the order of their first prompts; none when no prompt has one.
std::vector<std::string> categories_of(const PromptSet& set) {
  std::vector<std::string> categories;
  for (const Prompt& prompt : set.prompts)
    if (!prompt.category.empty() &&
        std::find(categories.begin(), categories.end(), prompt.category) == categories.end())
      categories.push_back(prompt.category);
  return categories;
}

/// All scores of one candidate, prompt by prompt.
class Summary {
 public:
  void add(const PromptScores& scores, std::int64_t tokens) {
    tokens_ += tokens;
    agreement_.push_back(scores.agreement);
    first_divergence_.push_back(scores.first_divergence);
    identical_.push_back(scores.identical);
    kl_.push_back(scores.kl);
    if (!scores.answer) return;
    answer_.push_back(*scores.answer);
    answer_change_.push_back(*scores.answer_change);
  }

  PromptResult result(const TaskPass& pass, const std::string& category) const {
    PromptResult result{.name = pass.name,
                        .mode = pass.mode,
                        .category = category,
                        .prompts = static_cast<int>(kl_.size()),
                        .tokens = tokens_,
                        .greedy_agreement = mean_estimate(agreement_),
                        .first_divergence = mean_estimate(first_divergence_),
                        .identical = mean_estimate(identical_),
                        .kl = mean_estimate(kl_),
                        .answers = static_cast<int>(answer_.size()),
                        .answer_log_probability = std::nullopt,
                        .answer_log_probability_change = std::nullopt};
    if (!answer_.empty()) {
      result.answer_log_probability = mean_estimate(answer_);
      result.answer_log_probability_change = mean_estimate(answer_change_);
    }
    return result;
  }

 private:
  std::int64_t tokens_ = 0;
  std::vector<double> agreement_, first_divergence_, identical_, kl_, answer_, answer_change_;
};

}  // namespace

std::vector<PromptResult> check_prompts(const models::ModelReader& model, const PromptSet& set,
                                        const std::vector<Candidate>& candidates,
                                        const EvaluateOptions& options, const RunControl& control) {
  const at::NoGradGuard no_grad;
  const TaskModel runner(model, candidates, options);
  std::int64_t total = 0;
  for (const Prompt& prompt : set.prompts) total += passes_of(prompt, runner);
  TaskProgress progress(control, "prompts", total);

  std::vector<std::vector<PromptScores>> scores;  // [prompt][pass]
  std::vector<std::int64_t> tokens;               // [prompt], of the continuation
  for (const Prompt& prompt : set.prompts)
    scores.push_back(score_prompt(runner, set, prompt, tokens.emplace_back(), progress));

  std::vector<std::string> groups = categories_of(set);
  groups.insert(groups.begin(), "");
  std::vector<PromptResult> results;
  for (std::size_t pass = 0; pass < runner.passes().size(); ++pass) {
    for (const std::string& category : groups) {
      Summary summary;
      for (std::size_t i = 0; i < scores.size(); ++i)
        if (category.empty() || set.prompts[i].category == category)
          summary.add(scores[i][pass], tokens[i]);
      results.push_back(summary.result(runner.passes()[pass], category));
    }
  }
  return results;
}

}  // namespace kvplan::evaluation
