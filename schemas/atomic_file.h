#pragma once
// Whole-file writes that never leave half a file, and folder locks.

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace kvplan {

/// A file written piece by piece under a temporary name beside `path` and renamed by commit().
/// Without commit() the temporary file is removed and an old `path` is untouched. Every step throws
/// EnvironmentError saying what failed and why (disk full, no permission).
class AtomicFile {
 public:
  explicit AtomicFile(const std::filesystem::path& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  /// Flushes to disk and renames. The object must not be used afterwards.
  void commit();

 private:
  [[noreturn]] void fail(const char* step, int error) const;
  std::filesystem::path path_, temporary_;
  int fd_ = -1;
};

/// Writes to `path`.tmp-<pid>, flushes to disk, renames. On failure the temporary file is removed,
/// an old `path` is untouched, and EnvironmentError says which step failed and why (disk full, no
/// permission).
void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes);
void write_file_atomically(const std::filesystem::path& path, std::string_view text);

/// Makes a folder and its parents; nothing happens when it is there. EnvironmentError when it
/// cannot be made.
void make_folder(const std::filesystem::path& folder);

/// Exclusive advisory lock (flock) on folder/.lock; released on destruction or death of the
/// process.
class FolderLock {
 public:
  /// Makes the folder and removes the temporary files that killed runs left in it (not in folders
  /// inside). EnvironmentError when another process holds the lock or the folder cannot be
  /// made.
  explicit FolderLock(const std::filesystem::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_ = -1;
};

/// The whole file as text. InputError when missing or larger than max_bytes.
std::string read_text_file(const std::filesystem::path& path,
                           std::size_t max_bytes = std::size_t{1} << 30);

}  // namespace kvplan
