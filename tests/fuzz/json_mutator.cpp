#include "tests/fuzz/json_mutator.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

// libFuzzer's own mutations of bytes.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace kvplan::fuzz {
namespace {

using nlohmann::json;
using Random = std::minstd_rand;

constexpr std::size_t kLengthBytes = 8;  // of a safetensors header

std::size_t below(Random& random, std::size_t n) { return random() % n; }

void collect(json& value, std::vector<json*>& all) {
  all.push_back(&value);
  if (!value.is_structured()) return;
  for (auto& inner : value) collect(inner, all);
}

json interesting_value(Random& random) {
  static const std::array<json, 20> kValues = {0,
                                               1,
                                               2,
                                               3,
                                               7,
                                               8,
                                               16,
                                               64,
                                               4096,
                                               -1,
                                               INT32_MAX,
                                               INT64_MAX,
                                               UINT64_MAX,
                                               1e-300,
                                               1e300,
                                               0.5,
                                               "",
                                               nullptr,
                                               json::array(),
                                               json::object()};
  return kValues[below(random, kValues.size())];
}

void change_number(json& number, Random& random) {
  // Far from the ends of 64 bits, which interesting_value() draws.
  const std::int64_t value =
      number.is_number_float()
          ? 0
          : std::clamp<std::int64_t>(number.get<std::int64_t>(), INT32_MIN, INT32_MAX);
  switch (below(random, 4)) {
    case 0:
      number = value / 2;
      break;
    case 1:
      number = 2 * value;
      break;
    case 2:
      number = value + 1;
      break;
    default:
      number = value - 1;
  }
}

/// Changes one value of the document.
void change(json& document, Random& random) {
  std::vector<json*> all;
  collect(document, all);
  json& value = *all[below(random, all.size())];
  const json& other = *all[below(random, all.size())];
  switch (below(random, 8)) {
    case 0:
      value = interesting_value(random);
      return;
    case 1:
      // Through a copy: `other` may lie inside `value`.
      value = json(other);
      return;
    case 2:
    case 3:
      if (value.is_array() && !value.empty()) {
        const std::size_t at = below(random, value.size());
        if (below(random, 2)) {
          value.erase(value.begin() + static_cast<std::ptrdiff_t>(at));
        } else {
          value.push_back(json(value[at]));
        }
      } else if (value.is_object() && !value.empty()) {
        value.erase(
            std::next(value.begin(), static_cast<std::ptrdiff_t>(below(random, value.size()))));
      }
      return;
    case 4:
      if (value.is_string()) {
        std::string text = value.get<std::string>();
        text.resize(text.size() + 16);
        text.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(text.data()), text.size() - 16,
                                     text.size()));
        value = text;
        return;
      }
      [[fallthrough]];
    default:
      if (value.is_number()) change_number(value, random);
      if (value.is_boolean()) value = !value.get<bool>();
  }
}

/// Where the JSON document lies in the input.
struct Document {
  std::size_t begin = 0, end = 0;
  bool after_length = false;
};

std::optional<Document> find_document(std::string_view input) {
  if (input.starts_with('{')) return Document{0, std::min(input.find('\0'), input.size()), false};
  if (input.size() < kLengthBytes + 2) return std::nullopt;
  std::uint64_t length = 0;
  std::memcpy(&length, input.data(), kLengthBytes);
  if (length > input.size() - kLengthBytes) return std::nullopt;
  return Document{kLengthBytes, kLengthBytes + length, true};
}

}  // namespace

std::size_t mutate(std::span<char> buffer, std::size_t size, unsigned seed) {
  auto* bytes = reinterpret_cast<std::uint8_t*>(buffer.data());
  Random random(seed + 1);
  const std::string input(buffer.data(), size);
  const auto document = find_document(input);
  if (!document || below(random, 8) == 0) return LLVMFuzzerMutate(bytes, size, buffer.size());

  const std::string_view text(input.data() + document->begin, document->end - document->begin);
  json value = json::parse(text, nullptr, false);
  if (value.is_discarded()) return LLVMFuzzerMutate(bytes, size, buffer.size());
  std::string rest = input.substr(document->end);
  if (!rest.empty() && below(random, 8) == 0) {
    // The first byte of a document's companion is the zero byte between them.
    const std::size_t kept = document->after_length ? 0 : 1;
    const std::size_t old = rest.size() - kept;
    rest.resize(rest.size() + 16);
    rest.resize(kept + LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(rest.data()) + kept, old,
                                        old + 16));
  } else {
    for (std::size_t i = 0; i <= below(random, 3); ++i) change(value, random);
  }
  std::string out = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (document->after_length) {
    const std::uint64_t length = out.size();
    out.insert(0, reinterpret_cast<const char*>(&length), kLengthBytes);
  }
  out += rest;
  if (out.size() > buffer.size()) return LLVMFuzzerMutate(bytes, size, buffer.size());
  std::copy(out.begin(), out.end(), buffer.begin());
  return out.size();
}

}  // namespace kvplan::fuzz
