#pragma once
// Owners of CUDA resources. Private to kernels.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <utility>

#include "kernels/errors.h"
#include "quant/cache_size.h"

namespace kvplan::kernels {

/// Makes a device current until the end of the scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "choosing the device");
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// Memory of the current device; none for 0 bytes. MemoryError when the device has not enough.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    const cudaError_t error = cudaMalloc(&data_, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // or the next launch would report it
      std::size_t available = 0, total = 0;
      check(cudaMemGetInfo(&available, &total), "asking for the free memory");
      throw MemoryError(static_cast<std::int64_t>(bytes), static_cast<std::int64_t>(available),
                        "the device has " + std::to_string(available) + " of " +
                            std::to_string(total) + " bytes free, " + std::to_string(bytes) +
                            " are needed; use a smaller geometry or a plan of fewer bits");
    }
    check(error, "allocating device memory");
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Host memory that the device reads directly.
class PinnedMemory {
 public:
  explicit PinnedMemory(std::size_t bytes) {
    check(cudaMallocHost(&data_, bytes), "allocating pinned memory");
  }
  ~PinnedMemory() { cudaFreeHost(data_); }
  PinnedMemory(PinnedMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event"); }
  ~Event() {
    if (event_) cudaEventDestroy(event_);
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  /// After everything that `stream` has to do now. Waiting for an event never recorded returns at
  /// once.
  void record(cudaStream_t stream) const {
    check(cudaEventRecord(event_, stream), "recording an event");
  }
  void wait() const { check(cudaEventSynchronize(event_), "waiting for an earlier step"); }

 private:
  cudaEvent_t event_ = nullptr;
};

/// Hands out parts of a range of bytes one after the other, as quant::cache_size charges them.
class Parts {
 public:
  /// Offset of the next `bytes` bytes.
  std::size_t take(std::size_t bytes) {
    return std::exchange(end_, end_ + quant::buffer_bytes(bytes));
  }
  std::size_t end() const { return end_; }

 private:
  std::size_t end_ = 0;
};

}  // namespace kvplan::kernels
