#include "tokenizers/text.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/sha256.h"
#include "tokenizers/unicode.h"

namespace kvplan::tokenizers {
namespace {

/// The "text" of every line, a blank line between them.
std::string read_jsonl(const std::string& file, std::string_view content) {
  std::string text;
  for (std::size_t begin = 0, line_number = 1; begin < content.size(); ++line_number) {
    const std::size_t end = std::min(content.find('\n', begin), content.size());
    const std::string_view line = content.substr(begin, end - begin);
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto document = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!document.is_object() || !document.contains("text") || !document["text"].is_string()) {
      throw InputError(file, "line " + std::to_string(line_number),
                       "expected a JSON object with a string \"text\"; give one document per line");
    }
    if (!text.empty()) text += "\n\n";
    text += document["text"].get_ref<const std::string&>();
  }
  return text;
}

void require_text(const std::string& file, std::string_view text) {
  if (text.empty()) throw InputError(file, "", "expected text, found none");
  if (const auto nul = text.find('\0'); nul != std::string_view::npos) {
    throw InputError(file, "byte " + std::to_string(nul),
                     "expected text, found a NUL byte: the file is binary or UTF-16");
  }
  if (const auto offset = find_invalid_utf8(text)) {
    throw InputError(file, "byte " + std::to_string(*offset),
                     "expected UTF-8, found an invalid sequence; convert the file to UTF-8");
  }
}

}  // namespace

TokenSource load_text(const std::filesystem::path& file, const Tokenizer& tokenizer,
                      double part_begin, double part_end) {
  if (!(0 <= part_begin && part_begin < part_end && part_end <= 1)) {
    throw ArgumentError("expected a part A:B with 0 <= A < B <= 1, found " +
                        std::to_string(part_begin) + ":" + std::to_string(part_end));
  }
  std::string text = read_text_file(file);
  TokenSource source;
  source.info.name = file.filename().string();
  source.info.sha256 = sha256(text);
  require_text(file.string(), text);
  if (file.extension() == ".jsonl") {
    text = read_jsonl(file.string(), text);
    require_text(file.string(), text);
  }

  source.tokens = tokenizer.encode(text);
  const auto count = static_cast<double>(source.tokens.size());
  const auto begin = static_cast<std::ptrdiff_t>(std::floor(part_begin * count));
  const auto end = static_cast<std::ptrdiff_t>(std::floor(part_end * count));
  source.info.tokens = static_cast<std::int64_t>(source.tokens.size());
  source.info.part_begin = part_begin;
  source.info.part_end = part_end;
  source.first_token = begin;
  source.tokens.erase(source.tokens.begin() + end, source.tokens.end());
  source.tokens.erase(source.tokens.begin(), source.tokens.begin() + begin);
  return source;
}

std::vector<TextWindow> make_windows(const std::vector<TokenSource>& sources, int length,
                                     std::int64_t max_windows) {
  if (length <= 0 || max_windows < 0) {
    throw ArgumentError(
        "expected a positive window length and a window count of 0 or more, found " +
        std::to_string(length) + " and " + std::to_string(max_windows));
  }
  const auto size = static_cast<std::size_t>(length);
  std::size_t most_tokens = 0, total = 0;
  for (const TokenSource& source : sources) {
    most_tokens = std::max(most_tokens, source.tokens.size());
    total += source.tokens.size() / size;
  }
  if (total == 0) {
    throw InputError(sources.empty() ? "text" : sources.front().info.name, "",
                     "expected at least one window of " + std::to_string(length) +
                         " tokens, found a longest text of " + std::to_string(most_tokens) +
                         " tokens; give more text, a larger part or a shorter window");
  }
  if (max_windows > 0) total = std::min(total, static_cast<std::size_t>(max_windows));

  std::vector<TextWindow> windows;
  windows.reserve(total);
  for (std::size_t turn = 0; windows.size() < total; ++turn) {
    for (std::size_t s = 0; s < sources.size() && windows.size() < total; ++s) {
      const auto& tokens = sources[s].tokens;
      if (tokens.size() / size <= turn) continue;
      const auto begin = tokens.begin() + static_cast<std::ptrdiff_t>(turn * size);
      windows.push_back({static_cast<std::int64_t>(windows.size()),
                         static_cast<std::int64_t>(s),
                         {begin, begin + length}});
    }
  }
  return windows;
}

}  // namespace kvplan::tokenizers
