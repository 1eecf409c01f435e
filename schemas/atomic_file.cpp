#include "schemas/atomic_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "schemas/error.h"
#include "schemas/mapped_file.h"

namespace kvplan {
namespace {

constexpr ::mode_t kFileMode = 0666;  // cut down by the umask

std::string reason(int error) { return std::generic_category().message(error); }

/// What a killed process left: NAME.tmp-PID.
void remove_temporaries(const std::filesystem::path& folder) {
  constexpr std::string_view kMark = ".tmp-";
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    const auto mark = name.rfind(kMark);
    if (mark == std::string::npos) continue;
    const std::string_view process = std::string_view(name).substr(mark + kMark.size());
    if (!process.empty() && process.find_first_not_of("0123456789") == std::string_view::npos)
      std::filesystem::remove(entry.path(), ignored);
  }
}

}  // namespace

AtomicFile::AtomicFile(const std::filesystem::path& path)
    : path_(path), temporary_(path.string() + ".tmp-" + std::to_string(::getpid())) {
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, kFileMode);
  if (fd_ < 0) fail("create a temporary file beside it", errno);
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* step, int error) const {
  throw EnvironmentError(path_.string(), std::string("cannot ") + step + ": " + reason(error) +
                                             "; nothing was written, an older file is unchanged");
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ::ssize_t written = ::write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("write", errno);
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail("flush to disk", errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename the temporary file", errno);
  ::close(std::exchange(fd_, -1));
  // Makes the new name itself survive a power cut. Some file systems refuse to flush folders; the
  // file is whole either way.
  const std::filesystem::path parent = path_.has_parent_path() ? path_.parent_path() : ".";
  const int folder = ::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return;
  ::fsync(folder);
  ::close(folder);
}

void write_file_atomically(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  write_file_atomically(path, std::as_bytes(std::span(text)));
}

void make_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw EnvironmentError(folder.string(), "cannot make the folder: " + error.message());
  if (!std::filesystem::is_directory(folder, error)) {
    throw EnvironmentError(folder.string(), "expected a folder, found a file");
  }
}

FolderLock::FolderLock(const std::filesystem::path& folder) {
  make_folder(folder);
  const std::filesystem::path path = folder / ".lock";
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, kFileMode);
  if (fd < 0) throw EnvironmentError(path.string(), "cannot open the lock file: " + reason(errno));
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    ::close(fd);
    if (error == EWOULDBLOCK) {
      throw EnvironmentError(
          folder.string(),
          "another run is working in this folder; wait for it or take another folder");
    }
    throw EnvironmentError(path.string(), "cannot lock: " + reason(error));
  }
  fd_ = fd;
  remove_temporaries(folder);
}

FolderLock::~FolderLock() { ::close(fd_); }

std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes) {
  const MappedFile file(path);
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.size() > max_bytes) {
    throw InputError(path.string(), "",
                     "expected at most " + std::to_string(max_bytes) + " bytes, found " +
                         std::to_string(bytes.size()));
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace kvplan
