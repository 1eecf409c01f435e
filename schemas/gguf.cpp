#include "schemas/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "schemas/error.h"

namespace kvplan {
namespace {

static_assert(std::endian::native == std::endian::little,
              "values are read as they lie in the file");

constexpr std::uint32_t kVersion = 3;
constexpr std::uint64_t kDefaultAlignment = 32;
constexpr std::uint64_t kMaxAlignment = 1 << 20;
constexpr std::uint32_t kMaxDimensions = 4;                      // GGML_MAX_DIMS
constexpr std::uint64_t kMaxKeyBytes = 65535;                    // the format's limit
constexpr std::uint64_t kMaxNameBytes = 256;                     // ggml itself stops at 64
constexpr std::uint64_t kMinTensorInfo = 8 + 1 + 4 + 8 + 4 + 8;  // name of one byte, one dimension
constexpr std::uint64_t kMinMetadata = 8 + 4 + 1;  // key length, type, the smallest value

/// Metadata value types by their number in the file.
enum class ValueType : std::uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

/// Walks the header; every read is checked against the bytes left.
class Cursor {
 public:
  explicit Cursor(const MappedFile& file) : file_(file), bytes_(file.bytes()) {}

  std::uint64_t position() const { return position_; }
  std::uint64_t left() const { return bytes_.size() - position_; }

  [[noreturn]] void fail(std::string_view field, const std::string& message) const {
    throw InputError(file_.path().string(), std::string(field),
                     message + " (at byte " + std::to_string(position_) + " of " +
                         std::to_string(bytes_.size()) + ")");
  }

  std::span<const std::byte> take(std::uint64_t count, std::string_view field) {
    if (count > left()) {
      fail(field, "the file ends early: expected " + std::to_string(count) + " more bytes, found " +
                      std::to_string(left()));
    }
    const auto part = bytes_.subspan(position_, count);
    position_ += count;
    return part;
  }

  template <class T>
  T read(std::string_view field) {
    T value;
    std::memcpy(&value, take(sizeof(T), field).data(), sizeof(T));
    return value;
  }

  /// A number of things of at least `min_bytes` each, all of which must still fit into the file.
  std::uint64_t count(std::uint64_t min_bytes, std::string_view field) {
    const auto n = read<std::uint64_t>(field);
    if (n > left() / min_bytes) {
      fail(field, "a count of " + std::to_string(n) + " cannot fit into the " +
                      std::to_string(left()) + " bytes left");
    }
    return n;
  }

  std::string string(std::string_view field) {
    const auto text = take(read<std::uint64_t>(field), field);
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }

  /// A key or tensor name: not empty, bounded, printable (it will appear in messages).
  std::string name(std::uint64_t max_bytes, std::string_view field) {
    const auto length = read<std::uint64_t>(field);
    if (length == 0 || length > max_bytes) {
      fail(field, "expected a name of 1 to " + std::to_string(max_bytes) + " bytes, found " +
                      std::to_string(length));
    }
    const auto text = take(length, field);
    std::string result(reinterpret_cast<const char*>(text.data()), text.size());
    if (std::ranges::any_of(result, [](unsigned char c) { return c < 0x20 || c == 0x7f; })) {
      fail(field, "a name holds control characters");
    }
    return result;
  }

 private:
  const MappedFile& file_;
  std::span<const std::byte> bytes_;
  std::uint64_t position_ = 0;
};

bool read_bool(Cursor& in, std::string_view key) {
  const auto byte = in.read<std::uint8_t>(key);
  if (byte > 1) in.fail(key, "expected a boolean 0 or 1, found " + std::to_string(byte));
  return byte == 1;
}

template <class Out, class Stored>
std::vector<Out> read_array(Cursor& in, std::string_view key) {
  std::vector<Out> values(in.count(sizeof(Stored), key));
  for (auto& v : values) {
    const auto stored = in.read<Stored>(key);
    if constexpr (std::is_integral_v<Stored>) {
      if (!std::in_range<Out>(stored)) {
        in.fail(key, "the array value " + std::to_string(stored) + " is too large");
      }
    }
    v = static_cast<Out>(stored);
  }
  return values;
}

GgufValue read_array_value(Cursor& in, std::string_view key) {
  const auto type = in.read<std::uint32_t>(key);
  switch (static_cast<ValueType>(type)) {
    case ValueType::kU8:
      return read_array<std::int64_t, std::uint8_t>(in, key);
    case ValueType::kI8:
      return read_array<std::int64_t, std::int8_t>(in, key);
    case ValueType::kU16:
      return read_array<std::int64_t, std::uint16_t>(in, key);
    case ValueType::kI16:
      return read_array<std::int64_t, std::int16_t>(in, key);
    case ValueType::kU32:
      return read_array<std::int64_t, std::uint32_t>(in, key);
    case ValueType::kI32:
      return read_array<std::int64_t, std::int32_t>(in, key);
    case ValueType::kU64:
      return read_array<std::int64_t, std::uint64_t>(in, key);
    case ValueType::kI64:
      return read_array<std::int64_t, std::int64_t>(in, key);
    case ValueType::kF32:
      return read_array<double, float>(in, key);
    case ValueType::kF64:
      return read_array<double, double>(in, key);
    case ValueType::kBool: {
      std::vector<std::int64_t> values(in.count(1, key));
      for (auto& v : values) v = read_bool(in, key) ? 1 : 0;
      return values;
    }
    case ValueType::kString: {
      std::vector<std::string> values(in.count(sizeof(std::uint64_t), key));
      for (auto& v : values) v = in.string(key);
      return values;
    }
    case ValueType::kArray:
      in.fail(key, "arrays of arrays are not supported");
  }
  in.fail(key, "unknown array element type " + std::to_string(type));
}

GgufValue read_value(Cursor& in, std::string_view key) {
  const auto type = in.read<std::uint32_t>(key);
  switch (static_cast<ValueType>(type)) {
    case ValueType::kU8:
      return std::int64_t{in.read<std::uint8_t>(key)};
    case ValueType::kI8:
      return std::int64_t{in.read<std::int8_t>(key)};
    case ValueType::kU16:
      return std::int64_t{in.read<std::uint16_t>(key)};
    case ValueType::kI16:
      return std::int64_t{in.read<std::int16_t>(key)};
    case ValueType::kU32:
      return std::int64_t{in.read<std::uint32_t>(key)};
    case ValueType::kI32:
      return std::int64_t{in.read<std::int32_t>(key)};
    case ValueType::kI64:
      return in.read<std::int64_t>(key);
    case ValueType::kF32:
      return double{in.read<float>(key)};
    case ValueType::kF64:
      return in.read<double>(key);
    case ValueType::kBool:
      return read_bool(in, key);
    case ValueType::kString:
      return in.string(key);
    case ValueType::kArray:
      return read_array_value(in, key);
    case ValueType::kU64: {
      const auto value = in.read<std::uint64_t>(key);
      if (std::in_range<std::int64_t>(value)) return static_cast<std::int64_t>(value);
      return value;
    }
  }
  in.fail(key, "unknown value type " + std::to_string(type));
}

/// A tensor info whose data has not been placed yet.
struct TensorInfo {
  std::string name;
  GgufTensor tensor;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;  // 0: a type that kvplan does not read
};

/// The byte size of a tensor, or 0 for an unknown type.
std::uint64_t tensor_bytes(const Cursor& in, const std::string& name, const GgufTensor& tensor) {
  std::uint64_t elements = 1;
  for (const auto n : tensor.shape) {
    if (n <= 0 || __builtin_mul_overflow(elements, static_cast<std::uint64_t>(n), &elements)) {
      in.fail(name, "a dimension is zero, or their product overflows");
    }
  }
  const auto block = ggml_block(tensor.type);
  if (!block) return 0;
  if (tensor.shape.back() % block->elements != 0) {
    in.fail(name, "the row length " + std::to_string(tensor.shape.back()) +
                      " is no multiple of the " + block->name + " block of " +
                      std::to_string(block->elements));
  }
  std::uint64_t bytes = elements / static_cast<std::uint64_t>(block->elements);
  if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(block->bytes), &bytes)) {
    in.fail(name, "the tensor's size overflows");
  }
  return bytes;
}

TensorInfo read_tensor_info(Cursor& in) {
  TensorInfo info;
  info.name = in.name(kMaxNameBytes, "tensor name");
  const auto dimensions = in.read<std::uint32_t>(info.name);
  if (dimensions == 0 || dimensions > kMaxDimensions) {
    in.fail(info.name, "expected 1 to " + std::to_string(kMaxDimensions) + " dimensions, found " +
                           std::to_string(dimensions));
  }
  info.tensor.shape.resize(dimensions);
  for (auto& n : info.tensor.shape) n = in.read<std::int64_t>(info.name);
  std::ranges::reverse(info.tensor.shape);
  info.tensor.type = in.read<std::uint32_t>(info.name);
  info.offset = in.read<std::uint64_t>(info.name);
  info.bytes = tensor_bytes(in, info.name, info.tensor);
  return info;
}

/// Gives every tensor its bytes: aligned, inside the data section, none shared by two tensors.
void place(const Cursor& in, std::span<const std::byte> data, std::uint64_t alignment,
           std::vector<TensorInfo>& infos) {
  for (auto& info : infos) {
    if (info.offset % alignment != 0) {
      in.fail(info.name, "the data offset " + std::to_string(info.offset) +
                             " is no multiple of the alignment " + std::to_string(alignment));
    }
    if (info.offset > data.size() || info.bytes > data.size() - info.offset) {
      in.fail(info.name, "the tensor's " + std::to_string(info.bytes) + " bytes at data offset " +
                             std::to_string(info.offset) + " do not lie inside the " +
                             std::to_string(data.size()) + " bytes of data; is the file complete?");
    }
    info.tensor.data = data.subspan(info.offset, info.bytes);
  }
  std::ranges::sort(infos, {}, &TensorInfo::offset);
  for (std::size_t i = 1; i < infos.size(); ++i) {
    if (infos[i - 1].offset + infos[i - 1].bytes > infos[i].offset) {
      in.fail(infos[i].name, "the tensor's data overlap those of " + infos[i - 1].name);
    }
  }
}

const char* type_name(const GgufValue& value) {
  static constexpr std::array kNames = {"an integer",
                                        "an integer above 2^63",
                                        "a number",
                                        "a boolean",
                                        "a string",
                                        "an array of integers",
                                        "an array of numbers",
                                        "an array of strings"};
  static_assert(kNames.size() == std::variant_size_v<GgufValue>);
  return kNames[value.index()];
}

}  // namespace

std::optional<GgmlBlock> ggml_block(std::uint32_t type) {
  switch (static_cast<GgmlType>(type)) {
    case GgmlType::kF32:
      return GgmlBlock{"F32", 1, 4};
    case GgmlType::kF16:
      return GgmlBlock{"F16", 1, 2};
    case GgmlType::kBF16:
      return GgmlBlock{"BF16", 1, 2};
    case GgmlType::kQ4_0:
      return GgmlBlock{"Q4_0", 32, 18};
    case GgmlType::kQ4_1:
      return GgmlBlock{"Q4_1", 32, 20};
    case GgmlType::kQ5_0:
      return GgmlBlock{"Q5_0", 32, 22};
    case GgmlType::kQ5_1:
      return GgmlBlock{"Q5_1", 32, 24};
    case GgmlType::kQ8_0:
      return GgmlBlock{"Q8_0", 32, 34};
    case GgmlType::kQ2_K:
      return GgmlBlock{"Q2_K", 256, 84};
    case GgmlType::kQ3_K:
      return GgmlBlock{"Q3_K", 256, 110};
    case GgmlType::kQ4_K:
      return GgmlBlock{"Q4_K", 256, 144};
    case GgmlType::kQ5_K:
      return GgmlBlock{"Q5_K", 256, 176};
    case GgmlType::kQ6_K:
      return GgmlBlock{"Q6_K", 256, 210};
    case GgmlType::kIQ4_NL:
      return GgmlBlock{"IQ4_NL", 32, 18};
  }
  return std::nullopt;
}

GgufFile::GgufFile(const std::filesystem::path& path) : file_(path) {
  Cursor in(file_);
  constexpr std::string_view kMagic = "GGUF";
  if (in.left() < kMagic.size() ||
      std::memcmp(in.take(kMagic.size(), "").data(), kMagic.data(), kMagic.size()) != 0) {
    in.fail("", "expected a GGUF file, which begins with the letters GGUF");
  }
  const auto version = in.read<std::uint32_t>("version");
  if (version != kVersion) {
    in.fail("version", "expected GGUF version " + std::to_string(kVersion) +
                           " (little-endian), found " + std::to_string(version) +
                           "; convert the file again with a current llama.cpp");
  }
  const auto tensor_count = in.count(kMinTensorInfo, "tensor count");
  const auto metadata_count = in.count(kMinMetadata, "metadata count");

  for (std::uint64_t i = 0; i < metadata_count; ++i) {
    auto key = in.name(kMaxKeyBytes, "metadata key");
    auto value = read_value(in, key);
    if (!metadata_.try_emplace(key, std::move(value)).second) {
      in.fail(key, "the metadata key appears twice");
    }
  }
  std::vector<TensorInfo> infos;
  for (std::uint64_t i = 0; i < tensor_count; ++i) infos.push_back(read_tensor_info(in));

  const auto alignment = static_cast<std::uint64_t>(
      integer_or("general.alignment", static_cast<std::int64_t>(kDefaultAlignment)));
  if (!std::has_single_bit(alignment) || alignment > kMaxAlignment) {
    in.fail("general.alignment", "expected a power of two up to " + std::to_string(kMaxAlignment) +
                                     ", found " + std::to_string(alignment));
  }
  const auto data_begin = (in.position() + alignment - 1) / alignment * alignment;
  const auto bytes = file_.bytes();
  place(in, data_begin < bytes.size() ? bytes.subspan(data_begin) : bytes.last(0), alignment,
        infos);
  for (auto& info : infos) {
    if (!tensors_.try_emplace(info.name, std::move(info.tensor)).second) {
      in.fail(info.name, "the tensor appears twice");
    }
  }
}

const GgufValue& GgufFile::value(std::string_view key, const char* expected) const {
  const auto found = metadata_.find(key);
  if (found == metadata_.end()) {
    throw InputError(file_.path().string(), std::string(key),
                     std::string("expected ") + expected + ", found no such metadata key");
  }
  return found->second;
}

template <class T>
const T& GgufFile::get(std::string_view key, const char* expected) const {
  const auto& v = value(key, expected);
  const auto* typed = std::get_if<T>(&v);
  if (!typed) {
    throw InputError(file_.path().string(), std::string(key),
                     std::string("expected ") + expected + ", found " + type_name(v));
  }
  return *typed;
}

std::string GgufFile::string(std::string_view key) const {
  return get<std::string>(key, "a string");
}

std::int64_t GgufFile::integer(std::string_view key) const {
  return get<std::int64_t>(key, "an integer");
}

double GgufFile::number(std::string_view key) const {
  const auto* whole = std::get_if<std::int64_t>(&value(key, "a number"));
  return whole ? static_cast<double>(*whole) : get<double>(key, "a number");
}

std::int64_t GgufFile::integer_or(std::string_view key, std::int64_t otherwise) const {
  return has(key) ? integer(key) : otherwise;
}

double GgufFile::number_or(std::string_view key, double otherwise) const {
  return has(key) ? number(key) : otherwise;
}

std::string GgufFile::string_or(std::string_view key, std::string otherwise) const {
  return has(key) ? string(key) : otherwise;
}

bool GgufFile::boolean_or(std::string_view key, bool otherwise) const {
  return has(key) ? get<bool>(key, "a boolean") : otherwise;
}

const std::vector<std::string>& GgufFile::strings(std::string_view key) const {
  return get<std::vector<std::string>>(key, "an array of strings");
}

const std::vector<std::int64_t>& GgufFile::integers(std::string_view key) const {
  return get<std::vector<std::int64_t>>(key, "an array of integers");
}

const std::vector<double>& GgufFile::numbers(std::string_view key) const {
  return get<std::vector<double>>(key, "an array of numbers");
}

}  // namespace kvplan
