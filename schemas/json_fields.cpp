#include "schemas/json_fields.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/spelling.h"

namespace kvplan {
namespace {

using nlohmann::json;

constexpr std::size_t kShownCharacters = 60;  // of a refused value in a message
constexpr std::size_t kSha256Digits = 64;

std::string shown(const json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array of " + std::to_string(value.size());
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > kShownCharacters) text = text.substr(0, kShownCharacters) + "...";
  return text;
}

template <class T>
std::string range_text(T least, T most) {
  const std::string low = json(least).dump(), high = json(most).dump();
  if (least == std::numeric_limits<T>::lowest() && most == std::numeric_limits<T>::max()) return "";
  return most == std::numeric_limits<T>::max() ? " of at least " + low : " in " + low + ".." + high;
}

}  // namespace

json parse_json(std::string_view text, const std::string& file, int max_depth) {
  std::vector<std::set<std::string>> keys;  // of the open objects, by depth
  const auto check = [&](int depth, json::parse_event_t event, json& value) {
    // Checked while parsing: destroying a deep nest recurses as deep.
    if (depth > max_depth)
      throw InputError(file, "", "JSON nested deeper than " + std::to_string(max_depth));
    const auto level = static_cast<std::size_t>(depth);
    if (event == json::parse_event_t::object_start) {
      keys.resize(level + 1);
      keys[level].clear();
    } else if (event == json::parse_event_t::key) {
      const auto& key = value.get_ref<const std::string&>();
      if (!keys[level - 1].insert(key).second) throw InputError(file, key, "field given twice");
    }
    return true;
  };
  try {
    return json::parse(text, check);
  } catch (const json::exception& error) {
    throw InputError(file, "", std::string("not valid JSON: ") + error.what());
  }
}

json read_document(const std::string& file) {
  return parse_json(read_text_file(file, kMaxDocumentBytes), file, kMaxDocumentDepth);
}

std::string document_text(const json& document) {
  return document.dump(1, ' ', false, json::error_handler_t::replace) + "\n";
}

json text_or_null(const std::string& text) { return text.empty() ? json(nullptr) : json(text); }

JsonObject::JsonObject(const json& value, std::string file, std::string pointer)
    : value_(&value), file_(std::move(file)), pointer_(std::move(pointer)) {
  if (!value.is_object())
    throw InputError(file_, pointer_, "expected an object, found " + shown(value));
}

std::string JsonObject::pointer_to(const std::string& name) const {
  std::string escaped;  // RFC 6901, section 3
  for (const char c : name) escaped += c == '~' ? "~0" : c == '/' ? "~1" : std::string(1, c);
  return pointer_ + "/" + escaped;
}

void JsonObject::refuse(const std::string& name, const std::string& message) const {
  throw InputError(file_, pointer_to(name), message);
}

void JsonObject::refuse_type(const std::string& name, const std::string& expected,
                             const json& found) const {
  refuse(name, "expected " + expected + ", found " + shown(found));
}

const json& JsonObject::at(const std::string& name) {
  known_.insert(name);
  const auto found = value_->find(name);
  if (found != value_->end()) return *found;
  refuse(name, "field is missing" + spelling_suggestion(name, names()));
}

const json& JsonObject::array(const std::string& name) {
  const json& value = at(name);
  if (!value.is_array()) refuse_type(name, "an array", value);
  return value;
}

bool JsonObject::is_null(const std::string& name) { return at(name).is_null(); }

std::vector<std::string> JsonObject::names() const {
  std::vector<std::string> names;
  for (const auto& [name, value] : value_->items()) names.push_back(name);
  return names;
}

void JsonObject::finish() const {
  for (const auto& [name, value] : value_->items()) {
    if (!known_.contains(name)) refuse(name, "unknown field" + spelling_suggestion(name, known_));
  }
}

void JsonObject::require_format(std::string_view format, std::int64_t version) {
  if (text("format") != format)
    refuse_type("format", "\"" + std::string(format) + "\"", at("format"));
  const std::int64_t found = integer("version");
  if (found != version) {
    refuse("version", "expected " + std::to_string(version) + ", found " + std::to_string(found) +
                          (found > version ? "; the file comes from a newer kvplan" : ""));
  }
}

std::int64_t JsonObject::integer(const std::string& name, std::int64_t least, std::int64_t most) {
  const json& value = at(name);
  const bool fits =
      value.is_number_integer() &&
      (!value.is_number_unsigned() ||
       value.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()});
  if (!fits || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most) {
    refuse_type(name, "an integer" + range_text(least, most), value);
  }
  return value.get<std::int64_t>();
}

int JsonObject::small_integer(const std::string& name, int least, int most) {
  return static_cast<int>(integer(name, least, most));
}

std::uint64_t JsonObject::unsigned_integer(const std::string& name) {
  const json& value = at(name);
  // A document built in memory holds small values as signed integers.
  if (!value.is_number_unsigned() &&
      !(value.is_number_integer() && value.get<std::int64_t>() >= 0)) {
    refuse_type(name, "a non-negative integer", value);
  }
  return value.get<std::uint64_t>();
}

double JsonObject::number(const std::string& name, double least, double most) {
  const json& value = at(name);
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (!(number >= least && number <= most))
    refuse_type(name, "a number" + range_text(least, most), value);
  return number;
}

std::optional<double> JsonObject::number_or_null(const std::string& name, double least) {
  if (is_null(name)) return std::nullopt;
  return number(name, least);
}

bool JsonObject::boolean(const std::string& name) {
  const json& value = at(name);
  if (!value.is_boolean()) refuse_type(name, "true or false", value);
  return value.get<bool>();
}

std::string JsonObject::text(const std::string& name) {
  const json& value = at(name);
  if (!value.is_string()) refuse_type(name, "a string", value);
  return value.get<std::string>();
}

std::string JsonObject::choice(const std::string& name, std::span<const std::string_view> allowed) {
  const std::string found = text(name);
  if (std::find(allowed.begin(), allowed.end(), found) != allowed.end()) return found;
  std::string list;
  for (const std::string_view word : allowed) {
    list += (list.empty() ? "\"" : ", \"") + std::string(word) + "\"";
  }
  refuse(name, "expected one of " + list + ", found " + shown(at(name)) +
                   spelling_suggestion(found, allowed));
}

std::string JsonObject::choice_or_null(const std::string& name,
                                       std::span<const std::string_view> allowed) {
  return is_null(name) ? "" : choice(name, allowed);
}

std::string JsonObject::sha256(const std::string& name) {
  std::string digits = text(name);
  if (digits.size() != kSha256Digits ||
      digits.find_first_not_of("0123456789abcdef") != std::string::npos) {
    refuse_type(name, "a SHA-256 of 64 lower-case hex digits", at(name));
  }
  return digits;
}

std::string JsonObject::sha256_or_null(const std::string& name) {
  return is_null(name) ? "" : sha256(name);
}

JsonObject JsonObject::object(const std::string& name) {
  return {at(name), file_, pointer_to(name)};
}

std::optional<JsonObject> JsonObject::object_or_null(const std::string& name) {
  if (is_null(name)) return std::nullopt;
  return object(name);
}

std::vector<JsonObject> JsonObject::objects(const std::string& name) {
  std::vector<JsonObject> out;
  for (const json& element : array(name)) {
    out.emplace_back(element, file_, pointer_to(name) + "/" + std::to_string(out.size()));
  }
  return out;
}

std::vector<int> JsonObject::integers(const std::string& name, int least, int most) {
  std::vector<int> out;
  for (const json& element : array(name)) {
    const bool fits =
        element.is_number_integer() &&
        (!element.is_number_unsigned() || element.get<std::uint64_t>() <= std::uint64_t{1} << 32);
    if (!fits || element.get<std::int64_t>() < least || element.get<std::int64_t>() > most) {
      throw InputError(
          file_, pointer_to(name) + "/" + std::to_string(out.size()),
          "expected an integer" + range_text(least, most) + ", found " + shown(element));
    }
    out.push_back(element.get<int>());
  }
  return out;
}

std::vector<double> JsonObject::numbers(const std::string& name) {
  std::vector<double> out;
  for (const json& element : array(name)) {
    if (!element.is_number() || !std::isfinite(element.get<double>())) {
      throw InputError(file_, pointer_to(name) + "/" + std::to_string(out.size()),
                       "expected a number, found " + shown(element));
    }
    out.push_back(element.get<double>());
  }
  return out;
}

std::pair<double, double> JsonObject::part(const std::string& name) {
  const std::vector<double> ends = numbers(name);
  if (ends.size() != 2 || ends[0] < 0 || ends[0] > ends[1] || ends[1] > 1) {
    refuse(name, "expected two ascending fractions in 0..1");
  }
  return {ends[0], ends[1]};
}

}  // namespace kvplan
