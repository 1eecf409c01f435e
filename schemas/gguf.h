#pragma once
// The GGUF v3 container (little-endian):
//   1. "GGUF", version u32, tensor count u64, metadata count u64
//   2. metadata: key string, type u32, value (strings: length u64 + bytes; arrays: type u32, count
//   u64, values)
//   3. tensor infos: name, dimension count u32, dimensions u64 (fastest first), type u32, offset
//   u64
//   4. padding to general.alignment, then the data
// Counts are bounded by the bytes left, so a small file cannot ask for much memory.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "schemas/mapped_file.h"

namespace kvplan {

/// The ggml tensor types that kvplan reads, by their number in the file.
enum class GgmlType : std::uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kBF16 = 30,
};

/// Elements and bytes per block; nullopt for types that kvplan does not read.
struct GgmlBlock {
  const char* name;
  std::int64_t elements;
  std::int64_t bytes;
};
std::optional<GgmlBlock> ggml_block(std::uint32_t type);

struct GgufTensor {
  std::uint32_t type = 0;
  std::vector<std::int64_t> shape;  // row-major: slowest first (reversed from the file)
  std::span<const std::byte> data;  // empty for a type that ggml_block does not know
};

/// Integers of every width are int64 (uint64 only above its range), floats double; a boolean array
/// holds 0 and 1.
using GgufValue =
    std::variant<std::int64_t, std::uint64_t, double, bool, std::string, std::vector<std::int64_t>,
                 std::vector<double>, std::vector<std::string>>;

class GgufFile {
 public:
  /// InputError{file, field}: not GGUF, other version, truncated, overflow, nested arrays,
  /// misaligned or overlapping data, duplicate names.
  explicit GgufFile(const std::filesystem::path& path);
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const std::map<std::string, GgufTensor, std::less<>>& tensors() const { return tensors_; }
  bool has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }
  /// Typed look-ups; InputError names the key, expected and found type. `*_or` return the default
  /// when the key is absent.
  std::string string(std::string_view key) const;
  std::int64_t integer(std::string_view key) const;
  double number(std::string_view key) const;  // an integer will do
  std::int64_t integer_or(std::string_view key, std::int64_t otherwise) const;
  double number_or(std::string_view key, double otherwise) const;
  std::string string_or(std::string_view key, std::string otherwise) const;
  bool boolean_or(std::string_view key, bool otherwise) const;
  const std::vector<std::string>& strings(std::string_view key) const;
  const std::vector<std::int64_t>& integers(std::string_view key) const;
  const std::vector<double>& numbers(std::string_view key) const;
  const MappedFile& file() const { return file_; }

 private:
  const GgufValue& value(std::string_view key, const char* expected) const;
  template <class T>
  const T& get(std::string_view key, const char* expected) const;

  MappedFile file_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::map<std::string, GgufTensor, std::less<>> tensors_;
};

}  // namespace kvplan
