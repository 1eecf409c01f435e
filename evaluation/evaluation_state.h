#pragma once
// What an evaluation has measured so far, in memory and in the file that an interrupted run
// continues from.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "evaluation/evaluation_statistics.h"

namespace kvplan::evaluation {

/// Scores of one candidate in one mode against the fp16 cache.
struct PassScores {
  TokenScores kl;         // nats
  TokenScores nll;        // of the token that follows, nats
  TokenScores same_top1;  // 1 or 0
};

/// Scores of the first windows() windows.
struct EvaluationState {
  TokenScores reference_nll;
  std::vector<PassScores> passes;

  EvaluationState(std::size_t pass_count, std::int64_t scored);
  std::int64_t windows() const { return reference_nll.windows; }
};

/// Adds the windows of `more`, which has the same passes, behind those of `state`.
void append_state(EvaluationState& state, const EvaluationState& more);

/// All scores, for another process with the same passes.
std::vector<std::byte> pack_state(const EvaluationState& state);
/// Adds pack_state's windows behind those of `state`. InternalError when the sizes do not agree.
void unpack_state(std::span<const std::byte> bytes, EvaluationState& state);

/// Adds one window's scores.
void append_window(TokenScores& scores, std::span<const double> window);

/// Replaces `file` atomically. `key`: 64 hex digits that stand for all inputs.
void save_state(const EvaluationState& state, const std::string& key,
                const std::filesystem::path& file);

/// Continues from `file` if it exists and was saved under the same key; else `state` stays as it
/// is. InputError for a damaged file.
void resume_state(EvaluationState& state, const std::string& key,
                  const std::filesystem::path& file);

}  // namespace kvplan::evaluation
