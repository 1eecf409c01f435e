#pragma once
// A compiled regular expression over UTF-8 with Unicode classes (PCRE2), bounded in time and
// memory.

#include <cstddef>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvplan::tokenizers {

/// The pattern does not compile, or a match ran past its limits; the owner adds file and field.
class RegexError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Regex {
 public:
  /// RegexError: over kMaxPatternBytes, or not a pattern of PCRE2 (with the offset).
  explicit Regex(std::string_view pattern);
  /// Matches the text itself.
  static Regex literal(std::string_view text);

  /// Calls found(begin, end) for each match in order, empty ones included. `text` is well-formed
  /// UTF-8.
  void for_each_match(std::string_view text,
                      const std::function<void(std::size_t begin, std::size_t end)>& found) const;

  static constexpr std::size_t kMaxPatternBytes = 1 << 16;

 private:
  struct Code;
  Regex(std::string_view pattern, unsigned options);
  std::shared_ptr<const Code> code_;
};

}  // namespace kvplan::tokenizers
