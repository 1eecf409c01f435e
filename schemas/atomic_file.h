#pragma once
// Whole-file writes that never leave half a file, and folder locks.

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace kvplan {

/// Writes to `path`.tmp-<pid>, flushes to disk, renames. On failure the temporary file is removed, an old `path` is untouched, and
/// EnvironmentError says which step failed and why (disk full, no permission).
void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes);
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

/// Exclusive advisory lock (flock) on folder/.lock; released on destruction or death of the process.
class FolderLock {
 public:
  /// Makes the folder. EnvironmentError when another process holds the lock or the folder cannot be made.
  explicit FolderLock(const std::filesystem::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_ = -1;
};

/// The whole file as text. InputError when missing or larger than max_bytes.
std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes = std::size_t{1} << 30);

}  // namespace kvplan
