#pragma once
// The first step of a tokenizer: text to normalised text.

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizers/regex.h"
#include "tokenizers/unicode.h"

namespace kvplan::tokenizers {

struct ToNormalForm {
  NormalForm form;
};
struct ToLowerCase {};
struct WithoutMarks {};
/// Cuts white space off the ends.
struct Trim {
  bool left, right;
};
/// Put before a text that is not empty.
struct Prepend {
  std::string text;
};
struct Replace {
  Regex pattern;
  std::string with;
};
using NormalizerStep =
    std::variant<ToNormalForm, ToLowerCase, WithoutMarks, Trim, Prepend, Replace>;

struct Normalizer {
  std::vector<NormalizerStep> steps;
  /// `text` is well-formed UTF-8. RegexError when a pattern gives up.
  std::string operator()(std::string_view text) const;
};

}  // namespace kvplan::tokenizers
