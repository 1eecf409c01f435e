#include "schemas/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/json_fields.h"
#include "schemas/sha256.h"
#include "schemas/spelling.h"

namespace kvplan {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is little endian");

constexpr std::size_t kLengthBytes = 8;  // u64, little endian
constexpr std::size_t kHeaderAlignment = 8;
constexpr std::size_t kMaxDimensions = 16;
constexpr int kMaxDepth = 3;  // {name: {shape: [..]}}

struct ElementType {
  std::string_view name;
  std::uint64_t bytes;
};
constexpr std::array kElementTypes = {
    ElementType{"F64", 8}, ElementType{"F32", 4}, ElementType{"F16", 2}, ElementType{"BF16", 2},
    ElementType{"I64", 8}, ElementType{"I32", 4}, ElementType{"I16", 2}, ElementType{"I8", 1},
    ElementType{"U8", 1},  ElementType{"BOOL", 1}};

template <class T>
constexpr const char* kDtype = nullptr;
template <>
constexpr const char* kDtype<double> = "F64";
template <>
constexpr const char* kDtype<float> = "F32";
template <>
constexpr const char* kDtype<std::int64_t> = "I64";
template <>
constexpr const char* kDtype<std::uint16_t> = "F16";

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) {
    if (text.size() > 1) text += ",";
    text += std::to_string(extent);
  }
  return text + "]";
}

/// Bytes of a tensor, or nothing when the product does not fit 64 bits. A zero extent makes any
/// product zero.
std::optional<std::uint64_t> tensor_bytes(std::span<const std::int64_t> shape,
                                          std::uint64_t element_bytes) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  std::uint64_t bytes = element_bytes;
  for (const std::int64_t extent : shape) {
    if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(extent), &bytes))
      return std::nullopt;
  }
  return bytes;
}

/// One entry of the header with its byte range inside the data section.
struct Range {
  std::string name;
  std::uint64_t begin = 0, end = 0;
};

/// Reads the JSON header. Every number that comes out has been checked against the file's size.
class HeaderReader {
 public:
  HeaderReader(std::string file, std::span<const std::byte> bytes)
      : file_(std::move(file)), bytes_(bytes) {}

  void read(std::map<std::string, SafetensorsEntry>& entries,
            std::map<std::string, std::string>& metadata) {
    const json header = parse_json(header_text(), file_, kMaxDepth);
    if (!header.is_object()) refuse("", "expected a JSON object as header");
    std::vector<Range> ranges;
    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") {
        metadata = read_metadata(value);
        continue;
      }
      Range range{name};
      entries.emplace(name, read_entry(value, range));
      ranges.push_back(std::move(range));
    }
    require_contiguous(std::move(ranges));
  }

 private:
  [[noreturn]] void refuse(const std::string& field, const std::string& message) const {
    throw InputError(file_, field, message);
  }

  std::string_view header_text() {
    if (bytes_.size() < kLengthBytes) {
      refuse("", "expected a safetensors file of at least 8 bytes, found " +
                     std::to_string(bytes_.size()));
    }
    std::uint64_t length = 0;
    std::memcpy(&length, bytes_.data(), sizeof length);
    const std::uint64_t available = bytes_.size() - kLengthBytes;
    if (length > available || length > kMaxSafetensorsHeader) {
      refuse("", "header length " + std::to_string(length) + " exceeds " +
                     (length > available
                          ? "the " + std::to_string(available) + " bytes left in the file"
                          : "the limit of " + std::to_string(kMaxSafetensorsHeader)) +
                     "; the file is truncated or not safetensors");
    }
    data_ = bytes_.subspan(kLengthBytes + length);
    return {reinterpret_cast<const char*>(bytes_.data()) + kLengthBytes, length};
  }

  std::map<std::string, std::string> read_metadata(const json& value) const {
    if (!value.is_object()) refuse("__metadata__", "expected an object of strings");
    std::map<std::string, std::string> metadata;
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) refuse("__metadata__", "expected a string for \"" + key + "\"");
      metadata.emplace(key, text.get<std::string>());
    }
    return metadata;
  }

  SafetensorsEntry read_entry(const json& value, Range& range) const {
    const std::string& name = range.name;
    if (!value.is_object() || value.size() != 3 || !value.contains("dtype") ||
        !value.contains("shape") || !value.contains("data_offsets")) {
      refuse(name, "expected an object of dtype, shape and data_offsets");
    }
    SafetensorsEntry entry;
    if (!value["dtype"].is_string()) refuse(name, "expected a string as dtype");
    entry.dtype = value["dtype"].get<std::string>();
    const auto type = std::find_if(kElementTypes.begin(), kElementTypes.end(),
                                   [&](const ElementType& t) { return t.name == entry.dtype; });
    if (type == kElementTypes.end()) {
      refuse(name, "unknown dtype \"" + entry.dtype +
                       "\", expected F64, F32, F16, BF16, I64, I32, I16, I8, U8 or BOOL");
    }
    for (const std::uint64_t extent : numbers(name, "shape", value["shape"], kMaxDimensions)) {
      entry.shape.push_back(static_cast<std::int64_t>(extent));
    }
    const std::vector<std::uint64_t> offsets =
        numbers(name, "data_offsets", value["data_offsets"], 2);
    if (offsets.size() != 2) refuse(name, "expected two data_offsets");
    range.begin = offsets[0];
    range.end = offsets[1];
    if (range.begin > range.end || range.end > data_.size()) {
      refuse(name, "data_offsets [" + std::to_string(range.begin) + "," +
                       std::to_string(range.end) + "] lie outside the " +
                       std::to_string(data_.size()) +
                       " bytes of data; the file is truncated or damaged");
    }
    const std::optional<std::uint64_t> bytes = tensor_bytes(entry.shape, type->bytes);
    if (bytes != range.end - range.begin) {
      refuse(name, "shape " + shape_text(entry.shape) + " of " + entry.dtype +
                       " does not match its range of " + std::to_string(range.end - range.begin) +
                       " bytes");
    }
    entry.data = data_.subspan(range.begin, range.end - range.begin);
    return entry;
  }

  std::vector<std::uint64_t> numbers(const std::string& name, const char* field, const json& value,
                                     std::size_t most) const {
    if (!value.is_array() || value.size() > most) {
      refuse(name, std::string("expected an array of at most ") + std::to_string(most) +
                       " numbers as " + field);
    }
    constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    std::vector<std::uint64_t> out;
    for (const json& number : value) {
      if (!number.is_number_unsigned() || number.get<std::uint64_t>() > kMost) {
        refuse(name, std::string("expected non-negative 64-bit integers in ") + field);
      }
      out.push_back(number.get<std::uint64_t>());
    }
    return out;
  }

  void require_contiguous(std::vector<Range> ranges) const {
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    std::uint64_t expected = 0;
    for (const Range& range : ranges) {
      if (range.begin != expected) {
        refuse(range.name, std::string(range.begin < expected ? "overlaps the tensor before it"
                                                              : "leaves a hole before it") +
                               ": expected to begin at byte " + std::to_string(expected) +
                               ", found " + std::to_string(range.begin));
      }
      expected = range.end;
    }
    if (expected != data_.size()) {
      refuse("", "expected " + std::to_string(expected) + " bytes of data, found " +
                     std::to_string(data_.size()));
    }
  }

  std::string file_;
  std::span<const std::byte> bytes_, data_;
};

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : file_(path) {
  HeaderReader(path.string(), file_.bytes()).read(entries_, metadata_);
}

const SafetensorsEntry& SafetensorsFile::at(const std::string& name) const {
  const auto entry = entries_.find(name);
  if (entry == entries_.end()) {
    std::vector<std::string_view> names;
    for (const auto& [known, tensor] : entries_) names.push_back(known);
    throw InputError(file_.path().string(), name,
                     "tensor is missing" + spelling_suggestion(name, names));
  }
  return entry->second;
}

template <class T>
Array<T> SafetensorsFile::copy(const std::string& name, std::span<const std::int64_t> shape) const {
  const SafetensorsEntry& entry = at(name);
  if (entry.dtype != kDtype<T>) {
    throw InputError(file_.path().string(), name,
                     std::string("expected dtype ") + kDtype<T> + ", found " + entry.dtype);
  }
  if (!shape.empty() &&
      !std::equal(shape.begin(), shape.end(), entry.shape.begin(), entry.shape.end())) {
    throw InputError(file_.path().string(), name,
                     "expected shape " + shape_text(shape) + ", found " + shape_text(entry.shape));
  }
  Array<T> array;
  array.shape = entry.shape;
  array.data.resize(entry.data.size() / sizeof(T));
  // Not a view: the range may be unaligned.
  if (!entry.data.empty()) std::memcpy(array.data.data(), entry.data.data(), entry.data.size());
  return array;
}

Array<double> SafetensorsFile::f64(const std::string& name,
                                   std::span<const std::int64_t> shape) const {
  return copy<double>(name, shape);
}
Array<float> SafetensorsFile::f32(const std::string& name,
                                  std::span<const std::int64_t> shape) const {
  return copy<float>(name, shape);
}
Array<std::int64_t> SafetensorsFile::i64(const std::string& name,
                                         std::span<const std::int64_t> shape) const {
  return copy<std::int64_t>(name, shape);
}
Array<std::uint16_t> SafetensorsFile::f16(const std::string& name,
                                          std::span<const std::int64_t> shape) const {
  return copy<std::uint16_t>(name, shape);
}

template <class T>
void SafetensorsWriter::add_item(const std::string& name, const Array<T>& a,
                                 std::shared_ptr<const void> owner) {
  const std::span<const std::byte> data = std::as_bytes(std::span(a.data));
  if (tensor_bytes(a.shape, sizeof(T)) != data.size()) {
    throw ArgumentError("safetensors: tensor \"" + name + "\" of shape " + shape_text(a.shape) +
                        " has " + std::to_string(a.data.size()) + " elements");
  }
  if (!items_.emplace(name, Item{kDtype<T>, a.shape, data, std::move(owner)}).second) {
    throw ArgumentError("safetensors: tensor \"" + name + "\" added twice");
  }
}

template <class T>
void SafetensorsWriter::add_owned(const std::string& name, Array<T> a) {
  const auto owner = std::make_shared<const Array<T>>(std::move(a));
  add_item(name, *owner, owner);
}

void SafetensorsWriter::add(const std::string& name, Array<double> a) {
  add_owned(name, std::move(a));
}
void SafetensorsWriter::add(const std::string& name, Array<float> a) {
  add_owned(name, std::move(a));
}
void SafetensorsWriter::add(const std::string& name, Array<std::int64_t> a) {
  add_owned(name, std::move(a));
}
void SafetensorsWriter::add(const std::string& name, Array<std::uint16_t> a) {
  add_owned(name, std::move(a));
}
void SafetensorsWriter::add_view(const std::string& name, const Array<double>& a) {
  add_item(name, a, nullptr);
}
void SafetensorsWriter::add_view(const std::string& name, const Array<float>& a) {
  add_item(name, a, nullptr);
}

void SafetensorsWriter::stream(const std::function<void(std::span<const std::byte>)>& sink) const {
  json header = json::object();
  std::uint64_t offset = 0;
  for (const auto& [name, item] : items_) {
    header[name] = {{"dtype", item.dtype},
                    {"shape", item.shape},
                    {"data_offsets", {offset, offset + item.data.size()}}};
    offset += item.data.size();
  }
  std::string text = header.dump();
  text.resize((text.size() + kHeaderAlignment - 1) / kHeaderAlignment * kHeaderAlignment, ' ');
  const std::uint64_t length = text.size();
  sink(std::as_bytes(std::span(&length, 1)));
  sink(std::as_bytes(std::span(text)));
  for (const auto& [name, item] : items_) sink(item.data);
}

std::vector<std::byte> SafetensorsWriter::bytes() const {
  std::vector<std::byte> out;
  stream(
      [&](std::span<const std::byte> piece) { out.insert(out.end(), piece.begin(), piece.end()); });
  return out;
}

std::string SafetensorsWriter::sha256() const {
  Sha256 hash;
  stream([&](std::span<const std::byte> piece) { hash.update(piece); });
  return hash.finish();
}

std::string SafetensorsWriter::write(const std::filesystem::path& path) const {
  AtomicFile file(path);
  Sha256 hash;
  stream([&](std::span<const std::byte> piece) {
    file.write(piece);
    hash.update(piece);
  });
  file.commit();
  return hash.finish();
}

}  // namespace kvplan
