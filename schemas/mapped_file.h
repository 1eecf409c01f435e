#pragma once
// A read-only memory-mapped file.

#include <cstddef>
#include <filesystem>
#include <span>

namespace kvplan {

class MappedFile {
 public:
  /// InputError when the file is missing, unreadable or no regular file. An empty file gives an
  /// empty span.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&&) noexcept;
  MappedFile& operator=(MappedFile&&) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::filesystem::path& path() const { return path_; }
  /// Lets the kernel drop the pages of a range that has been read.
  void drop_pages(std::span<const std::byte> range) const;

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvplan
