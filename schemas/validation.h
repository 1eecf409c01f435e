#pragma once
// Held-out measurements of one plan and its baselines (docs/formats/validation.md).

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "schemas/types.h"

namespace kvplan {

/// KL divergence in nats per token from the fp16 cache, over scored tokens; standard error by
/// windows (cluster of a window).
struct KlStatistics {
  double mean = 0, standard_error = 0;
  double p50 = 0, p95 = 0, p99 = 0, max = 0;
  double cvar95 = 0;  // mean of the worst 5 %
};

/// 95 % paired bootstrap interval over windows.
struct Interval {
  double low = 0, high = 0;
};

struct CandidateResult {
  std::string name;  // "fp16", "plan", "q4_0", "turboquant:3"
  std::string mode;  // "worst" or "decode"
  std::string runtime = "cpu";
  double effective_bits = 0;  // from the packed buffers
  double perplexity = 0;
  double perplexity_rise = 0;  // relative to fp16 on the same tokens
  Interval perplexity_rise_interval;
  KlStatistics kl;
  Interval
      kl_minus_plan;  // paired: this candidate's mean KL minus the plan's; 0 for the plan itself
  double same_top1 = 0;
  std::vector<double> kl_by_position;  // mean KL in 16 equal bins of the scored positions
  std::optional<double> predicted_kl;  // plans only
};

/// A mean over windows, trials or prompts; standard error 0 where there is one only.
struct MeanEstimate {
  double mean = 0, standard_error = 0;
};

/// One candidate on the windows of one text.
struct TextResult {
  std::string name, mode;  // as in CandidateResult
  std::string text;        // as in Validation::text_names
  int windows = 0;
  double perplexity = 0, perplexity_rise = 0;
  MeanEstimate kl;
};

/// Passkey retrieval: can the model repeat a key hidden at `depth` (0: begin, 1: end) of `context`
/// tokens?
struct PasskeyResult {
  std::string name, mode;
  int context = 0;
  double depth = 0;
  int trials = 0;
  MeanEstimate log_probability;         // of the whole key, nats
  MeanEstimate log_probability_change;  // minus fp16's in the same trial
  MeanEstimate exact_match;             // every token of the key is the most likely one
};

/// Fidelity to the greedy continuations of the fp16 cache.
struct PromptResult {
  std::string name, mode;
  std::string category;           // empty: all prompts
  int prompts = 0;                // the means and standard errors are over these
  std::int64_t tokens = 0;        // of all continuations
  MeanEstimate greedy_agreement;  // share of a continuation's tokens that are the most likely ones
  MeanEstimate first_divergence;  // tokens before the first that a free run changes; all, if none
  MeanEstimate identical;         // share of prompts whose free run changes no token
  MeanEstimate kl;                // over a continuation's tokens, nats per token
  int answers = 0;                // prompts with an answer
  std::optional<MeanEstimate> answer_log_probability, answer_log_probability_change;
};

/// Where `prompts` come from.
struct PromptSource {
  std::string name, sha256;
  int max_tokens = 0;  // of a continuation
  std::string stop;    // text of the token that ends a continuation; empty: none
};

struct GateResult {
  std::string expression;  // "kl<=.05"
  double measured = 0;
  bool passed = false;
};

struct Validation {
  std::string plan_sha256;
  std::string model_sha256;  // kv_weights_sha256
  std::vector<std::string> text_names, text_sha256;
  double part_begin = 0, part_end = 1;
  int window = 0, windows = 0, first_scored = 0;  // positions first_scored .. window-2 are scored
  std::int64_t scored_tokens = 0;
  bool bos = false;
  std::uint64_t seed = 0;
  std::string runtime = "cpu";
  std::string program;
  std::vector<CandidateResult> candidates;
  std::vector<GateResult> gates;
  std::vector<TextResult> by_text;  // empty for one text
  std::vector<PasskeyResult> passkey;
  std::optional<PromptSource> prompt_source;
  std::vector<PromptResult> prompts;
};

std::string validation_json(const Validation& validation);
void write_validation(const Validation& validation, const std::filesystem::path& file);
Validation read_validation(const std::filesystem::path& file);

}  // namespace kvplan
