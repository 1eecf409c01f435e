#pragma once
// SentencePiece's two models over scored tokens: merging pairs by score, and the unigram language
// model. Source: Kudo and Richardson, "SentencePiece" (2018), arXiv:1808.06226; Kudo, "Subword
// Regularization" (2018), arXiv:1804.10959.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizers/subword.h"

namespace kvplan::tokenizers {

/// Two neighbours merge when their joined text is a token; the highest score goes first, then the
/// leftmost.
class ScoreBpe final : public SubwordModel {
 public:
  /// `tokens`: those that text may become; scores[id] for each of them.
  ScoreBpe(TokenMap tokens, std::vector<double> scores, Fallback fallback)
      : tokens_(std::move(tokens)), scores_(std::move(scores)), fallback_(std::move(fallback)) {}
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) const override;

 private:
  TokenMap tokens_;
  std::vector<double> scores_;
  Fallback fallback_;
};

/// The segmentation of greatest total score (log probability); a character that is no token costs
/// the lowest score less 10.
class Unigram final : public SubwordModel {
 public:
  struct Token {
    std::string text;
    double score;
    std::int32_t id;
  };
  explicit Unigram(std::vector<Token> tokens, Fallback fallback);
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) const override;

 private:
  std::vector<Token>
      tokens_;  // sorted by text, so that the tokens with a common prefix are neighbours
  double unknown_score_ = 0;
  Fallback fallback_;
};

}  // namespace kvplan::tokenizers
