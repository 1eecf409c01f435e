#pragma once
// Tokens that stand in the text as they are, found before any other step.

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kvplan::tokenizers {

struct AddedToken {
  std::string text;
  std::int32_t id = 0;
  bool special = false;  // control token: plain text unless the caller asks for specials
  bool takes_left =
      false;  // swallows the white space before it, after it (lstrip, rstrip of tokenizer.json)
  bool takes_right = false;
};

class AddedTokens {
 public:
  AddedTokens() = default;
  explicit AddedTokens(std::vector<AddedToken> tokens);
  bool empty() const { return tokens_.empty(); }

  /// A stretch of text, or the token that was found there.
  struct Part {
    std::string_view text;
    const AddedToken* token = nullptr;
  };
  /// Leftmost, then longest matches; parts cover `text` in order, none empty.
  std::vector<Part> split(std::string_view text, bool parse_special) const;

 private:
  const AddedToken* longest_at(std::string_view text) const;
  std::vector<AddedToken> tokens_;        // by first byte, then longest first
  std::array<std::size_t, 257> first_{};  // tokens_[first_[b], first_[b + 1]) begin with byte b
};

}  // namespace kvplan::tokenizers
