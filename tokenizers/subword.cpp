#include "tokenizers/subword.h"

#include <cstdio>

namespace kvplan::tokenizers {

std::optional<std::array<std::int32_t, 256>> Fallback::find_byte_ids(const TokenMap& tokens) {
  std::array<std::int32_t, 256> ids;
  for (unsigned byte = 0; byte < ids.size(); ++byte) {
    std::array<char, 7> name;
    std::snprintf(name.data(), name.size(), "<0x%02X>", byte);
    const auto found = tokens.find(std::string_view(name.data()));
    if (found == tokens.end()) return std::nullopt;
    ids[byte] = found->second;
  }
  return ids;
}

bool words_are_independent(const TokenMap& tokens) {
  if (!tokens.contains(kSpaceMark)) return false;
  for (const auto& [text, id] : tokens) {
    if (cut_words(text).size() > 1) return false;
  }
  return true;
}

std::vector<std::string_view> cut_words(std::string_view text) {
  std::vector<std::string_view> words;
  std::size_t begin = 0;
  std::size_t mark = text.find(kSpaceMark);
  std::size_t after_mark = 0;  // end of the last mark seen
  while (mark != std::string_view::npos) {
    if (mark > after_mark) {
      words.push_back(text.substr(begin, mark - begin));
      begin = mark;
    }
    after_mark = mark + kSpaceMark.size();
    mark = text.find(kSpaceMark, after_mark);
  }
  if (begin < text.size()) words.push_back(text.substr(begin));
  return words;
}

}  // namespace kvplan::tokenizers
