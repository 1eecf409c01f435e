#pragma once
// Text of tokens that come one at a time, in whole characters.

#include <cstdint>
#include <string>

#include "tokenizers/tokenizer.h"

namespace kvplan::tokenizers {

class TextStream {
 public:
  /// `previous`: the token before the first, which decides about spaces. Borrows `tokenizer`.
  TextStream(const Tokenizer& tokenizer, std::int32_t previous)
      : tokenizer_(tokenizer), previous_(previous) {}

  /// The characters that `token` completes, perhaps none; what is no UTF-8 becomes U+FFFD.
  std::string add(std::int32_t token);
  /// What is left of an incomplete character, as U+FFFD.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  std::int32_t previous_;
  std::string pending_;  // the begin of a character
};

}  // namespace kvplan::tokenizers
