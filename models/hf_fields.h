#pragma once
// Typed look-ups in a JSON object of a Hugging Face folder.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "schemas/error.h"
#include "schemas/mapped_file.h"

namespace kvplan::models {

inline constexpr std::size_t kShownCharacters = 80;  // of a refused value: its start says enough

/// InputError for what is no JSON or more than 64 MiB of it.
nlohmann::json parse_hf_json(const std::filesystem::path& path);

/// One object of config.json; null counts as absent, as it does in transformers. Whatever is looked
/// up is known; finish() refuses the rest.
class HfObject {
 public:
  HfObject(const nlohmann::json& object, std::string file, std::string pointer = "")
      : object_(object), file_(std::move(file)), pointer_(std::move(pointer)) {
    if (!object.is_object()) {
      throw InputError(file_, pointer_,
                       std::string("expected an object, found ") + object.type_name());
    }
  }

  const nlohmann::json* find(const char* name) const {
    known_.insert(name);
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  int size(const char* name, std::int64_t max) const {
    return checked_size(name, required(name), max);
  }
  int size_or(const char* name, int otherwise, std::int64_t max, std::int64_t least = 1) const {
    const auto* value = find(name);
    return value ? checked_size(name, *value, max, least) : otherwise;
  }
  double number(const char* name) const { return checked_number(name, required(name)); }
  double number_or(const char* name, double otherwise) const {
    const auto* value = find(name);
    return value ? checked_number(name, *value) : otherwise;
  }
  std::string text(const char* name) const {
    const auto& value = required(name);
    if (!value.is_string()) fail_type(name, "a string", value);
    return value.get<std::string>();
  }
  bool flag_or(const char* name, bool otherwise) const {
    const auto* value = find(name);
    if (value && !value->is_boolean()) fail_type(name, "true or false", *value);
    return value ? value->get<bool>() : otherwise;
  }
  HfObject object(const char* name) const { return {required(name), file_, pointer_ + "/" + name}; }

  /// Present, null included.
  bool contains(const char* name) const { return object_.contains(name); }
  std::vector<double> numbers(const char* name) const {
    const auto& value = required(name);
    if (!value.is_array()) fail_type(name, "a list of numbers", value);
    std::vector<double> out;
    for (const nlohmann::json& element : value) {
      if (!element.is_number()) fail_type(name, "a list of numbers", element);
      out.push_back(element.get<double>());
    }
    return out;
  }

  /// Refuses what nobody looked up: it may change the forward pass.
  template <class IsHarmless>
  void finish(const IsHarmless& is_harmless) const {
    for (const auto& [name, value] : object_.items()) {
      const bool unset = value.is_null() || value == false;
      if (unset || known_.contains(name) || is_harmless(name)) continue;
      fail(name.c_str(),
           "kvplan does not know this setting, which may change what the model "
           "computes; found " +
               value.dump().substr(0, kShownCharacters));
    }
  }

  [[noreturn]] void fail(const char* name, const std::string& message) const {
    throw InputError(file_, pointer_ + "/" + name, message);
  }

 private:
  const nlohmann::json& required(const char* name) const {
    const auto* value = find(name);
    if (!value) fail(name, "the field is missing");
    return *value;
  }
  [[noreturn]] void fail_type(const char* name, const char* expected,
                              const nlohmann::json& found) const {
    fail(name, std::string("expected ") + expected + ", found " + found.type_name());
  }
  int checked_size(const char* name, const nlohmann::json& value, std::int64_t max,
                   std::int64_t least = 1) const {
    if (!value.is_number_integer()) fail_type(name, "a whole number", value);
    // An unsigned value beyond int64 would wrap to a negative one, which is refused as well.
    const auto n = value.get<std::int64_t>();
    if (n < least || n > max) {
      fail(name, "expected " + std::to_string(least) + " to " + std::to_string(max) + ", found " +
                     value.dump());
    }
    return static_cast<int>(n);
  }
  double checked_number(const char* name, const nlohmann::json& value) const {
    if (!value.is_number()) fail_type(name, "a number", value);
    return value.get<double>();
  }

  const nlohmann::json& object_;
  std::string file_, pointer_;
  mutable std::set<std::string, std::less<>> known_;
};

}  // namespace kvplan::models
