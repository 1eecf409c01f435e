#pragma once
// Activations between layers, in memory up to a limit and in a file beyond it.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <limits>
#include <vector>

namespace kvplan::forward {

/// Not safe to use from several threads.
class ActivationStore {
 public:
  using Slot = std::size_t;
  static constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

  /// Keeps at most `memory_bytes` of tensors where they are; others go to a nameless file in
  /// `folder`, which vanishes with the store or the process.
  ActivationStore(std::int64_t memory_bytes, std::filesystem::path folder);
  ~ActivationStore();
  ActivationStore(const ActivationStore&) = delete;
  ActivationStore& operator=(const ActivationStore&) = delete;

  /// Takes a dense float32 tensor. EnvironmentError when the file cannot be written.
  Slot put(const at::Tensor& x);
  at::Tensor get(Slot slot) const;
  void drop(Slot slot);
  std::int64_t spilled_bytes() const { return file_end_; }

 private:
  struct Entry {
    at::Tensor tensor;  // undefined when in the file
    std::int64_t offset = 0;
    std::vector<std::int64_t> shape;
    at::TensorOptions options;
    std::int64_t bytes() const;
  };
  void open_file();

  std::int64_t memory_bytes_, held_bytes_ = 0;
  std::filesystem::path folder_;
  int file_ = -1;
  std::int64_t file_end_ = 0;
  std::size_t in_file_ = 0;
  std::vector<Entry> entries_;
  std::vector<Slot> free_;
};

}  // namespace kvplan::forward
