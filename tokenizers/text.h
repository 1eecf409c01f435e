#pragma once
// Calibration and evaluation text: files to token streams to fixed windows.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "schemas/profile.h"
#include "tokenizers/tokenizer.h"

namespace kvplan::tokenizers {

/// One text file tokenised once, cut to its part.
struct TokenSource {
  ProfileSource info;            // info.tokens counts the whole file
  std::int64_t first_token = 0;  // offset of tokens[0] in the whole file's tokens
  std::vector<std::int32_t> tokens;
};

/// Reads text (UTF-8) or .jsonl with a "text" field (documents joined by a blank line). part_begin,
/// part_end: fractions of the file's token count, floor(fraction * count). InputError: missing,
/// empty, binary (NUL byte) or invalid UTF-8 (offset), a JSONL line without text (line).
TokenSource load_text(const std::filesystem::path& file, const Tokenizer& tokenizer,
                      double part_begin, double part_end);

/// A window: `length` consecutive tokens of one source.
struct TextWindow {
  std::int64_t index = 0;  // global
  std::int64_t source = 0;
  std::vector<std::int32_t> tokens;
};

/// Consecutive windows without BOS; with several sources they take turns (round robin), so that any
/// prefix is mixed. At most max_windows (0: all). InputError if no source holds a full window (says
/// how many tokens there are).
std::vector<TextWindow> make_windows(const std::vector<TokenSource>& sources, int length,
                                     std::int64_t max_windows);

}  // namespace kvplan::tokenizers
