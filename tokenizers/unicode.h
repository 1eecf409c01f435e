#pragma once
// UTF-8, Unicode properties and normal forms, and the byte alphabet of byte-level BPE.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kvplan::tokenizers {

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

/// Offset of the first byte that is not well-formed UTF-8 (overlong, surrogate, above U+10FFFF or
/// cut short); nullopt if none.
std::optional<std::size_t> find_invalid_utf8(std::string_view text);

/// Bytes of the character that `lead` starts in well-formed text.
constexpr std::size_t utf8_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

/// The character at `offset` of well-formed text.
char32_t decode_utf8(std::string_view text, std::size_t offset);
void append_utf8(std::string& text, char32_t code_point);

/// Unicode White_Space.
bool is_space(char32_t code_point);

/// The functions below take well-formed UTF-8.
std::string normal_form(std::string_view text, NormalForm form);
/// Each character by itself (no final-sigma rule), as tokenizers do.
std::string lower_case(std::string_view text);
/// Without the characters of general category M.
std::string strip_marks(std::string_view text);

/// The bytes that `text` stands for in GPT-2's alphabet of 256 printable characters; nullopt if it
/// has any other character. Source: Radford et al., GPT-2 encoder.py, bytes_to_unicode.
std::optional<std::string> bytes_of_byte_alphabet(std::string_view text);

}  // namespace kvplan::tokenizers
