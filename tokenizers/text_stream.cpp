#include "tokenizers/text_stream.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

#include "tokenizers/unicode.h"

namespace kvplan::tokenizers {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

/// Whether one to three more bytes can make `bytes` a character.
bool may_begin_character(std::string_view bytes) {
  // Some of these completes every begin; which bytes may follow E0, ED, F0 and F4 differs.
  constexpr std::array<std::string_view, 5> kTails = {"\x80", "\x80\x80", "\xBF\x80",
                                                      "\x80\x80\x80", "\x90\x80\x80"};
  return std::any_of(kTails.begin(), kTails.end(), [&](std::string_view tail) {
    return !find_invalid_utf8(std::string(bytes).append(tail));
  });
}

}  // namespace

std::string TextStream::add(std::int32_t token) {
  const std::array<std::int32_t, 2> both = {previous_, token};
  const std::size_t begin = tokenizer_.decode({both.data(), 1}).size();
  pending_ += std::string_view(tokenizer_.decode(both)).substr(begin);
  previous_ = token;

  std::string text;
  std::string_view rest = pending_;
  while (const auto invalid = find_invalid_utf8(rest)) {
    text += rest.substr(0, *invalid);
    rest.remove_prefix(*invalid);
    if (may_begin_character(rest)) {
      pending_ = std::string(rest);
      return text;
    }
    text += kReplacement;
    rest.remove_prefix(1);
  }
  text += rest;
  pending_.clear();
  return text;
}

std::string TextStream::finish() {
  if (pending_.empty()) return "";
  pending_.clear();
  return std::string(kReplacement);
}

}  // namespace kvplan::tokenizers
