#pragma once
// The second step of a tokenizer: normalised text to pieces that no token crosses.

#include <deque>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizers/normalizer.h"
#include "tokenizers/regex.h"

namespace kvplan::tokenizers {

/// What becomes of a match of Split: a piece of its own, dropped, or joined to a neighbour (names
/// of tokenizer.json).
enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct Split {
  Regex pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // the stretches between the matches are the matches
};

/// Spaces become `replacement` (U+2581), and a piece gets one in front unless it has it.
struct Metaspace {
  enum class Prepend {
    kNever,
    kFirst,
    kAlways
  };  // kFirst: only at the beginning of the whole text
  Regex space = Regex::literal(" ");
  std::string replacement;
  Prepend prepend;
};

/// A piece gets a space in front unless it begins with one.
struct PrefixSpace {};

using PreTokenizerStep = std::variant<Split, Metaspace, PrefixSpace>;

struct PreTokenizer {
  std::vector<PreTokenizerStep> steps;

  /// Pieces of `text`, none empty; they are views of it or of strings put into `arena`. `at_start`:
  /// the whole text begins with `text`. RegexError when a pattern gives up.
  std::vector<std::string_view> operator()(std::string_view text, bool at_start,
                                           std::deque<std::string>& arena) const;
};

/// GPT-2's words: contractions, letters, numbers and other signs, each with a space in front, and
/// runs of white space. Source: Radford et al., GPT-2 encoder.py.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

}  // namespace kvplan::tokenizers
