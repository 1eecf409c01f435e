#pragma once
// Starts GPUs while the caller does something else: the first use of one takes seconds.

#include <thread>
#include <vector>

#include "forward/device.h"

namespace kvplan::forward {

/// Creates contexts and handles of `devices` on a thread of its own, joined at the end of its life.
/// A device that does not work is left to the first real use to report.
class GpuWarmUp {
 public:
  explicit GpuWarmUp(const std::vector<Device>& devices);

 private:
  std::jthread thread_;
};

}  // namespace kvplan::forward
