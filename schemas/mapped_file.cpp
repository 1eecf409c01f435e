#include "schemas/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "schemas/error.h"

namespace kvplan {
namespace {

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& step, int error) {
  throw InputError(path.string(), "", step + ": " + std::generic_category().message(error));
}

/// Closes the descriptor once the mapping holds the file.
struct Descriptor {
  int fd;
  ~Descriptor() { ::close(fd); }
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  // Without O_NONBLOCK, opening a named pipe would wait for a writer before it can be refused.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) refuse(path, "cannot open", errno);
  const Descriptor descriptor{fd};
  struct stat status{};
  if (::fstat(fd, &status) != 0) refuse(path, "cannot read the file size", errno);
  if (!S_ISREG(status.st_mode)) throw InputError(path.string(), "", "expected a regular file");
  if (status.st_size == 0) return;
  const auto size = static_cast<std::size_t>(status.st_size);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) refuse(path, "cannot map into memory", errno);
  data_ = static_cast<const std::byte*>(data);
  size_ = size;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void MappedFile::drop_pages(std::span<const std::byte> range) const {
  if (range.empty()) return;
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto offset = static_cast<std::size_t>(range.data() - data_);
  // Whole pages inside the range only: its neighbours may still be in use.
  const std::size_t begin = (offset + page - 1) / page * page;
  const std::size_t end = (offset + range.size()) / page * page;
  if (begin >= end) return;
  // Advice only: a kernel that ignores it costs memory, not correctness.
  ::madvise(const_cast<std::byte*>(data_ + begin), end - begin, MADV_DONTNEED);
}

}  // namespace kvplan
