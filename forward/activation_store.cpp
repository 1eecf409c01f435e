#include "forward/activation_store.h"

#include <ATen/ops/empty.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "schemas/atomic_file.h"
#include "schemas/error.h"

namespace kvplan::forward {
namespace {

/// Calls io(data, bytes, offset), which is pread or pwrite, until everything has moved.
template <class Byte, class Io>
void move_all(const std::filesystem::path& folder, const char* what, Byte* data, std::int64_t bytes,
              std::int64_t offset, const Io& io) {
  while (bytes > 0) {
    const ssize_t moved = io(data, static_cast<std::size_t>(bytes), offset);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0)
      throw EnvironmentError(folder.string(), std::string("cannot ") + what +
                                                  " the file of activations: " +
                                                  std::strerror(moved < 0 ? errno : EIO));
    data += moved;
    offset += moved;
    bytes -= moved;
  }
}

}  // namespace

std::int64_t ActivationStore::Entry::bytes() const {
  std::int64_t count = sizeof(float);
  for (const std::int64_t n : shape) count *= n;
  return count;
}

ActivationStore::ActivationStore(std::int64_t memory_bytes, std::filesystem::path folder)
    : memory_bytes_(memory_bytes), folder_(std::move(folder)) {}

ActivationStore::~ActivationStore() {
  if (file_ >= 0) ::close(file_);
}

void ActivationStore::open_file() {
  if (file_ >= 0) return;
  make_folder(folder_);
  std::string name = (folder_ / ".activations-XXXXXX").string();
  file_ = ::mkostemp(name.data(), O_CLOEXEC);
  if (file_ < 0)
    throw EnvironmentError(folder_.string(), std::string("cannot make a file of activations: ") +
                                                 std::strerror(errno));
  ::unlink(name.c_str());
}

ActivationStore::Slot ActivationStore::put(const at::Tensor& x) {
  Entry entry;
  entry.shape = x.sizes().vec();
  entry.options = x.options();
  if (held_bytes_ + entry.bytes() <= memory_bytes_) {
    held_bytes_ += entry.bytes();
    entry.tensor = x;
  } else {
    open_file();
    const at::Tensor host = x.to(at::kCPU).contiguous();
    entry.offset = file_end_;
    move_all(folder_, "write", static_cast<const char*>(host.const_data_ptr()), entry.bytes(),
             entry.offset, [this](const char* data, std::size_t bytes, std::int64_t offset) {
               return ::pwrite(file_, data, bytes, offset);
             });
    file_end_ += entry.bytes();
    ++in_file_;
  }
  if (free_.empty()) {
    entries_.push_back(std::move(entry));
    return entries_.size() - 1;
  }
  const Slot slot = free_.back();
  free_.pop_back();
  entries_[slot] = std::move(entry);
  return slot;
}

at::Tensor ActivationStore::get(Slot slot) const {
  const Entry& entry = entries_.at(slot);
  if (entry.tensor.defined()) return entry.tensor;
  at::Tensor host = at::empty(entry.shape, at::kFloat);
  move_all(folder_, "read", static_cast<char*>(host.mutable_data_ptr()), entry.bytes(),
           entry.offset, [this](char* data, std::size_t bytes, std::int64_t offset) {
             return ::pread(file_, data, bytes, offset);
           });
  return host.to(entry.options.device());
}

void ActivationStore::drop(Slot slot) {
  Entry& entry = entries_.at(slot);
  if (entry.tensor.defined()) {
    held_bytes_ -= entry.bytes();
  } else if (--in_file_ == 0) {
    file_end_ = 0;
  }
  entry = {};
  free_.push_back(slot);
}

}  // namespace kvplan::forward
