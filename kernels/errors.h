#pragma once
// Errors of the CUDA runtime beyond those of schemas/error.h, and the check of every CUDA call.
// Private to kernels.

#include <cuda_runtime_api.h>

#include <source_location>
#include <string>

#include "kernels/runtime.h"
#include "schemas/error.h"

namespace kvplan::kernels {

/// A sequence would outgrow max_tokens.
class TooLongError : public ArgumentError {
 public:
  using ArgumentError::ArgumentError;
};

/// The pool has not enough blocks left.
class OutOfBlocksError : public MemoryError {
 public:
  using MemoryError::MemoryError;
};

/// The GPU or its driver is missing, too old, or refused.
class DeviceError : public EnvironmentError {
 public:
  DeviceError(kvplan_status status, const std::string& message)
      : EnvironmentError("CUDA", message), status_(status) {}
  kvplan_status status() const { return status_; }

 private:
  kvplan_status status_;
};

/// DeviceError naming the error, `what` was at work and where, unless `error` is cudaSuccess.
void check(cudaError_t error, const char* what,
           std::source_location where = std::source_location::current());

/// Device `index`. DeviceError or ArgumentError when it cannot be used.
kvplan_device_info query_device(int index);

}  // namespace kvplan::kernels
