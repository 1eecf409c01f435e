// The part of the CUDA runtime's host side that kernels/ uses, on plain host memory: one device,
// streams and events that have always finished. Fresh memory holds NaN patterns, so that a read of
// what nobody wrote shows.

#include "tests/kernels/emulated/cuda_host.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>

namespace kvplan::kernels::emulated {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr int kDriverVersion = 13000;

Host host_state;
std::map<void*, std::size_t> allocations;

void* allocate(std::size_t bytes) {
  const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* const p = std::aligned_alloc(kAlignment, rounded);
  if (!p) throw std::bad_alloc();
  std::memset(p, 0xff, rounded);
  return p;
}

}  // namespace

Host& host() { return host_state; }

std::size_t device_bytes() {
  std::size_t total = 0;
  for (const auto& [p, bytes] : allocations) total += bytes;
  return total;
}

}  // namespace kvplan::kernels::emulated

using kvplan::kernels::emulated::host_state;

extern "C" {

cudaError_t cudaMalloc(void** p, size_t bytes) {
  using namespace kvplan::kernels::emulated;
  if (device_bytes() + bytes > host_state.memory_bytes) return cudaErrorMemoryAllocation;
  *p = allocate(bytes);
  allocations[*p] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  kvplan::kernels::emulated::allocations.erase(p);
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  *p = kvplan::kernels::emulated::allocate(bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = host_state.memory_bytes;
  *available = *total - kvplan::kernels::emulated::device_bytes();
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
  for (size_t row = 0; row < height; ++row)
    std::memcpy(static_cast<std::byte*>(to) + row * to_pitch,
                static_cast<const std::byte*>(from) + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = host_state.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
  if (host_state.driver_version == 0) return cudaErrorInsufficientDriver;
  *count = host_state.devices;
  return host_state.devices > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int) {
  *prop = {};
  std::snprintf(prop->name, sizeof prop->name, "emulated device");
  prop->major = host_state.compute_capability / 10;
  prop->minor = host_state.compute_capability % 10;
  prop->multiProcessorCount = host_state.multiprocessors;
  prop->totalGlobalMem = host_state.memory_bytes;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = host_state.driver_version;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kvplan::kernels::emulated::kDriverVersion;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated device"; }

}  // extern "C"
