#pragma once
// The third step of a tokenizer: a piece of text to token ids.

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace kvplan::tokenizers {

inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, SentencePiece's space

/// Token ids by their text, looked up by views.
struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const {
    return std::hash<std::string_view>{}(text);
  }
};
using TokenMap = std::unordered_map<std::string, std::int32_t, TextHash, std::equal_to<>>;

class SubwordModel {
 public:
  virtual ~SubwordModel() = default;
  /// Appends the ids of `piece` (well-formed UTF-8, not empty). Depends on the piece alone.
  virtual void encode(std::string_view piece, std::vector<std::int32_t>& ids) const = 0;
};

/// What becomes of text that no token covers: its bytes as tokens <0x00> .. <0xFF>, else the
/// unknown token, else nothing.
struct Fallback {
  std::optional<std::array<std::int32_t, 256>> byte_ids;
  std::optional<std::int32_t> unknown_id;
  bool fuse_unknown = true;  // neighbouring unknown characters give one token

  /// byte_ids when `tokens` has all 256 of them.
  static std::optional<std::array<std::int32_t, 256>> find_byte_ids(const TokenMap& tokens);
};

/// True when U+2581 is a token and follows no other character within any token: cutting a text
/// before each U+2581 that follows another character (cut_words) then changes no id.
bool words_are_independent(const TokenMap& tokens);
std::vector<std::string_view> cut_words(std::string_view text);

}  // namespace kvplan::tokenizers
