#pragma once
// The safetensors container: 8-byte header length, JSON header {name: {dtype, shape,
// data_offsets}}, data.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "schemas/mapped_file.h"
#include "schemas/types.h"

namespace kvplan {

/// Element types of safetensors: F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL; others are refused.
struct SafetensorsEntry {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

inline constexpr std::size_t kMaxSafetensorsHeader = std::size_t{100} << 20;

class SafetensorsFile {
 public:
  /// Checks everything: header length, JSON, dtype, shape x size = range, ranges inside the file,
  /// no overlap, no holes. InputError{file, tensor}.
  explicit SafetensorsFile(const std::filesystem::path& path);
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool has(const std::string& name) const { return entries_.contains(name); }
  /// InputError when absent.
  const SafetensorsEntry& at(const std::string& name) const;
  /// A copy of a tensor of dtype F64 / F32 / I64 / F16 (its bit patterns); InputError when the
  /// dtype, or the shape (if given), differs.
  Array<double> f64(const std::string& name, std::span<const std::int64_t> shape = {}) const;
  Array<float> f32(const std::string& name, std::span<const std::int64_t> shape = {}) const;
  Array<std::int64_t> i64(const std::string& name, std::span<const std::int64_t> shape = {}) const;
  Array<std::uint16_t> f16(const std::string& name, std::span<const std::int64_t> shape = {}) const;
  const MappedFile& file() const { return file_; }

 private:
  template <class T>
  Array<T> copy(const std::string& name, std::span<const std::int64_t> shape) const;

  MappedFile file_;
  std::map<std::string, SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// Collects tensors and writes them sorted by name, deterministic bytes. ArgumentError: a name
/// twice, or a shape that does not hold the data.
class SafetensorsWriter {
 public:
  /// Keeps the array.
  void add(const std::string& name, Array<double> a);
  void add(const std::string& name, Array<float> a);
  void add(const std::string& name, Array<std::int64_t> a);
  void add(const std::string& name, Array<std::uint16_t> a);  // F16, as bit patterns
  /// Borrows the data, which must outlive the writer: for tensors too large to copy.
  void add_view(const std::string& name, const Array<double>& a);
  void add_view(const std::string& name, const Array<float>& a);

  std::vector<std::byte> bytes() const;
  /// SHA-256 of bytes(), without making them.
  std::string sha256() const;
  /// Streams bytes() into `path` (write_file_atomically). EnvironmentError when it cannot write.
  /// Returns sha256().
  std::string write(const std::filesystem::path& path) const;

 private:
  struct Item {
    const char* dtype;
    std::vector<std::int64_t> shape;
    std::span<const std::byte> data;
    std::shared_ptr<const void> owner;  // null for borrowed data
  };
  template <class T>
  void add_item(const std::string& name, const Array<T>& a, std::shared_ptr<const void> owner);
  template <class T>
  void add_owned(const std::string& name, Array<T> a);
  void stream(const std::function<void(std::span<const std::byte>)>& sink) const;

  std::map<std::string, Item> items_;
};

}  // namespace kvplan
