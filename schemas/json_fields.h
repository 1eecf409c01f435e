#pragma once
// Strict reading and deterministic writing of JSON documents. Private to schemas and exporters: no
// public header includes nlohmann_json.

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvplan {

/// Parses UTF-8 JSON. InputError: syntax (line and column), deeper than `max_depth`, a key twice in
/// one object.
nlohmann::json parse_json(std::string_view text, const std::string& file, int max_depth);

inline constexpr int kMaxDocumentDepth = 16;
inline constexpr std::size_t kMaxDocumentBytes = std::size_t{64} << 20;

/// Reads and parses a document of ours, at most kMaxDocumentBytes.
nlohmann::json read_document(const std::string& file);

/// Sorted keys, one space of indentation, shortest round-trip numbers, newline at the end.
std::string document_text(const nlohmann::json& document);

/// One JSON object being read field by field. Every getter refuses a missing field, a wrong type
/// and a value out of range with InputError{file, JSON pointer}; finish() refuses the fields that
/// nobody asked for. The JSON value must outlive it.
class JsonObject {
 public:
  JsonObject(const nlohmann::json& value, std::string file, std::string pointer = "");

  /// Checks the fields `format` and `version` that head each document.
  void require_format(std::string_view format, std::int64_t version);

  /// For fields that may be absent.
  bool has(const std::string& name) const { return value_->contains(name); }

  std::int64_t integer(const std::string& name, std::int64_t least = 0,
                       std::int64_t most = std::numeric_limits<std::int64_t>::max());
  int small_integer(const std::string& name, int least, int most = std::numeric_limits<int>::max());
  std::uint64_t unsigned_integer(const std::string& name);
  double number(const std::string& name, double least = std::numeric_limits<double>::lowest(),
                double most = std::numeric_limits<double>::max());
  std::optional<double> number_or_null(const std::string& name, double least);
  bool boolean(const std::string& name);
  std::string text(const std::string& name);
  std::string choice(const std::string& name, std::span<const std::string_view> allowed);
  /// 64 lower-case hex digits.
  std::string sha256(const std::string& name);
  /// Null reads as the empty string.
  std::string sha256_or_null(const std::string& name);
  std::string choice_or_null(const std::string& name, std::span<const std::string_view> allowed);

  JsonObject object(const std::string& name);
  std::optional<JsonObject> object_or_null(const std::string& name);
  std::vector<JsonObject> objects(const std::string& name);
  std::vector<int> integers(const std::string& name, int least, int most);
  std::vector<double> numbers(const std::string& name);
  /// [begin, end], ascending fractions in 0..1.
  std::pair<double, double> part(const std::string& name);
  /// The names in this object, ascending; for objects used as maps.
  std::vector<std::string> names() const;

  void finish() const;
  [[noreturn]] void refuse(const std::string& name, const std::string& message) const;

 private:
  const nlohmann::json& at(const std::string& name);
  const nlohmann::json& array(const std::string& name);
  bool is_null(const std::string& name);
  [[noreturn]] void refuse_type(const std::string& name, const std::string& expected,
                                const nlohmann::json& found) const;
  std::string pointer_to(const std::string& name) const;

  const nlohmann::json* value_;
  std::string file_, pointer_;
  std::set<std::string> known_;
};

/// Null for the empty string, which stands for "unknown" in the structs.
nlohmann::json text_or_null(const std::string& text);

}  // namespace kvplan
