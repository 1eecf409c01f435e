#pragma once
// What tests may choose about the emulated device.

#include <cstddef>

namespace kvplan::kernels::emulated {

struct Host {
  int devices = 1;
  int driver_version = 13000;  // 0: no driver
  int compute_capability = 90;
  int multiprocessors = 3;
  std::size_t memory_bytes = std::size_t{4} << 30;
  bool capturing = false;  // streams are captured in a graph
  bool last_block_first = false;
};
Host& host();

/// Bytes of device memory in use.
std::size_t device_bytes();

}  // namespace kvplan::kernels::emulated
