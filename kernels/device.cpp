#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "kernels/errors.h"

namespace kvplan::kernels {
namespace {

constexpr int kMinimumComputeCapability = 80;

/// "13.0" from 13000.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

void check(cudaError_t error, const char* what, std::source_location where) {
  if (error == cudaSuccess) return;
  const char* const file = std::strrchr(where.file_name(), '/');
  throw DeviceError(KVPLAN_CUDA_ERROR, std::string(what) + " failed: " + cudaGetErrorName(error) +
                                           ", " + cudaGetErrorString(error) + " (" +
                                           (file ? file + 1 : where.file_name()) + ":" +
                                           std::to_string(where.line()) + ")");
}

kvplan_device_info query_device(int index) {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "asking for the driver");
  check(cudaRuntimeGetVersion(&runtime), "asking for the runtime");
  int count = 0;  // left unwritten by a failing call
  const cudaError_t counted = cudaGetDeviceCount(&count);
  // Within a major version any driver serves.
  if (driver > 0 && (driver / 1000 < runtime / 1000 || counted == cudaErrorInsufficientDriver))
    throw DeviceError(KVPLAN_OLD_DEVICE, "the driver supports CUDA " + version_text(driver) +
                                             ", this library needs " + version_text(runtime) +
                                             "; update the NVIDIA driver");
  if (counted != cudaSuccess || count == 0) {
    const std::string reason = driver == 0              ? "no driver is installed"
                               : counted == cudaSuccess ? "none present"
                                                        : cudaGetErrorString(counted);
    throw DeviceError(
        KVPLAN_NO_DEVICE,
        "no usable device: " + reason + "; the CUDA runtime needs an NVIDIA GPU and its driver");
  }
  if (index < 0 || index >= count)
    throw ArgumentError("device " + std::to_string(index) + " does not exist; there are " +
                        std::to_string(count) + ", counted from 0");
  cudaDeviceProp prop;
  check(cudaGetDeviceProperties(&prop, index), "asking for the device's properties");
  const int capability = 10 * prop.major + prop.minor;
  if (capability < kMinimumComputeCapability)
    throw DeviceError(KVPLAN_OLD_DEVICE, std::string(prop.name) + " has compute capability " +
                                             std::to_string(prop.major) + "." +
                                             std::to_string(prop.minor) +
                                             "; 8.0 or later is needed");
  kvplan_device_info info{};
  std::snprintf(info.name, sizeof info.name, "%s", prop.name);
  info.compute_capability = capability;
  info.multiprocessors = prop.multiProcessorCount;
  info.memory_bytes = prop.totalGlobalMem;
  info.l2_bytes = static_cast<size_t>(prop.l2CacheSize);
  info.driver_version = driver;
  return info;
}

}  // namespace kvplan::kernels
