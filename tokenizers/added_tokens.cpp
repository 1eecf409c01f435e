#include "tokenizers/added_tokens.h"

#include <algorithm>
#include <tuple>

#include "tokenizers/unicode.h"

namespace kvplan::tokenizers {
namespace {

std::size_t first_byte(const AddedToken& token) {
  return static_cast<unsigned char>(token.text[0]);
}

/// Where the white space at the end of `text` begins, and how long that at its beginning is.
std::size_t trailing_space(std::string_view text) {
  std::size_t begin = text.size();
  while (begin > 0) {
    std::size_t at = begin - 1;
    while ((static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
    if (!is_space(decode_utf8(text, at))) break;
    begin = at;
  }
  return begin;
}
std::size_t leading_space(std::string_view text) {
  std::size_t end = 0;
  while (end < text.size() && is_space(decode_utf8(text, end))) end += utf8_length(text[end]);
  return end;
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::erase_if(tokens_, [](const AddedToken& token) { return token.text.empty(); });
  std::stable_sort(tokens_.begin(), tokens_.end(), [](const AddedToken& a, const AddedToken& b) {
    return std::tuple(first_byte(a), b.text.size()) < std::tuple(first_byte(b), a.text.size());
  });
  for (const AddedToken& token : tokens_) ++first_[first_byte(token) + 1];
  for (std::size_t byte = 0; byte < 256; ++byte) first_[byte + 1] += first_[byte];
}

const AddedToken* AddedTokens::longest_at(std::string_view text) const {
  const auto byte = static_cast<unsigned char>(text[0]);
  for (std::size_t i = first_[byte]; i < first_[byte + 1u]; ++i) {
    if (text.starts_with(tokens_[i].text)) return &tokens_[i];
  }
  return nullptr;
}

std::vector<AddedTokens::Part> AddedTokens::split(std::string_view text, bool parse_special) const {
  std::vector<Part> parts;
  std::size_t done = 0;
  const auto add_text = [&](std::size_t end) {
    if (end > done) parts.push_back({text.substr(done, end - done)});
  };
  for (std::size_t at = 0; at < text.size() && !tokens_.empty();) {
    const AddedToken* token = longest_at(text.substr(at));
    if (token == nullptr) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + token->text.size();
    at = end;
    if (token->special && !parse_special) continue;
    if (token->takes_left) begin = std::max(done, trailing_space(text.substr(0, begin)));
    if (token->takes_right) end += leading_space(text.substr(end));
    add_text(begin);
    parts.push_back({text.substr(begin, end - begin), token});
    at = done = end;
  }
  add_text(text.size());
  return parts;
}

}  // namespace kvplan::tokenizers
