#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "kernels/runtime.h"

namespace {

constexpr int kMinimumComputeCapability = 80;
thread_local std::string last_error;

kvplan_status fail(kvplan_status status, std::string message) {
  last_error = std::move(message);
  return status;
}

}  // namespace

extern "C" const char* kvplan_last_error(void) { return last_error.c_str(); }

extern "C" kvplan_status kvplan_query_device(int index, kvplan_device_info* info) {
  last_error.clear();
  if (!info) return fail(KVPLAN_BAD_ARGUMENT, "kvplan_query_device: info must not be null");
  int count = 0;  // left unwritten by a failing call
  if (const cudaError_t e = cudaGetDeviceCount(&count); e != cudaSuccess || count == 0) {
    return fail(KVPLAN_NO_DEVICE, std::string("no usable CUDA device: ") +
                                      (e == cudaSuccess ? "none present" : cudaGetErrorString(e)) +
                                      "; the CUDA runtime needs an NVIDIA GPU and its driver");
  }
  if (index < 0 || index >= count) {
    return fail(KVPLAN_BAD_ARGUMENT, "device " + std::to_string(index) +
                                         " does not exist; there are " + std::to_string(count) +
                                         ", counted from 0");
  }
  cudaDeviceProp prop;
  int driver = 0;
  cudaError_t e = cudaGetDeviceProperties(&prop, index);
  if (e == cudaSuccess) e = cudaDriverGetVersion(&driver);
  if (e != cudaSuccess)
    return fail(KVPLAN_CUDA_ERROR,
                std::string("cannot query the device: ") + cudaGetErrorString(e));
  const int capability = 10 * prop.major + prop.minor;
  if (capability < kMinimumComputeCapability) {
    return fail(KVPLAN_OLD_DEVICE, std::string(prop.name) + " has compute capability " +
                                       std::to_string(prop.major) + "." +
                                       std::to_string(prop.minor) + "; 8.0 or later is needed");
  }
  kvplan_device_info out{};
  std::snprintf(out.name, sizeof out.name, "%s", prop.name);
  out.compute_capability = capability;
  out.multiprocessors = prop.multiProcessorCount;
  out.memory_bytes = prop.totalGlobalMem;
  out.l2_bytes = static_cast<size_t>(prop.l2CacheSize);
  out.driver_version = driver;
  *info = out;
  return KVPLAN_OK;
}
