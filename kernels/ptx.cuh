#pragma once
// The device primitives that kernels are written with. tests/kernels/emulated has a twin of this
// header for the CPU, so that the same kernel sources run in tests on machines without a GPU.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define KVPLAN_DEVICE __device__ __forceinline__

namespace kvplan::kernels {

// Where a thread is.
KVPLAN_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
KVPLAN_DEVICE int threads() { return static_cast<int>(blockDim.x); }
KVPLAN_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31); }
KVPLAN_DEVICE int warp() { return static_cast<int>(threadIdx.x >> 5); }
KVPLAN_DEVICE int block() { return static_cast<int>(blockIdx.x); }
KVPLAN_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
KVPLAN_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
KVPLAN_DEVICE int blocks() { return static_cast<int>(gridDim.x); }

// Synchronisation and exchange; collectives want all lanes of a warp.
KVPLAN_DEVICE void sync_block() { __syncthreads(); }
KVPLAN_DEVICE void sync_warp() { __syncwarp(); }
KVPLAN_DEVICE bool any(bool x) { return __any_sync(~0u, x); }
KVPLAN_DEVICE std::uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }
template <class T>
KVPLAN_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}
template <class T>
KVPLAN_DEVICE T shuffle(T x, int from_lane) {
  return __shfl_sync(~0u, x, from_lane);
}
/// Waits until the kernel before has finished (launches with LaunchShape::overlap); then lets the
/// next one start its prologue.
KVPLAN_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
KVPLAN_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Dynamic shared memory, aligned to 1024 bytes.
KVPLAN_DEVICE std::byte* shared_memory() {
  extern __shared__ __align__(1024) std::byte bytes[];
  return bytes;
}
/// Address in the shared window; load_shared reads there.
KVPLAN_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
KVPLAN_DEVICE std::uint32_t load_shared(std::uint32_t address) {
  std::uint32_t v;
  asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

KVPLAN_DEVICE uint4 load_shared4(std::uint32_t address) {
  uint4 v;
  asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(address)
      : "memory");
  return v;
}
KVPLAN_DEVICE uint2 load_shared2(std::uint32_t address) {
  uint2 v;
  asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
KVPLAN_DEVICE std::uint32_t load_shared1(std::uint32_t address) {
  std::uint32_t v;
  asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
KVPLAN_DEVICE std::uint32_t load_shared_half(std::uint32_t address) {
  std::uint16_t v;
  asm("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

// Copies of 16 bytes from global to shared memory that run by themselves. commit_copies() closes
// the lane's current group of copies; wait_copies<N>() waits until at most N of its groups are on
// their way.
KVPLAN_DEVICE void copy_async(std::uint32_t to, const std::byte* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
KVPLAN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Groups>
KVPLAN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

/// d [16,8] += a [16,16] b [16,8], fp16 in, float out; fragments as mma.m16n8k16 of the PTX ISA.
KVPLAN_DEVICE void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                       std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// Lane 4g+t gives elements (g, 2t), (g, 2t+1) of an 8 x 8 matrix of 16-bit numbers and gets (2t,
/// g), (2t+1, g).
KVPLAN_DEVICE std::uint32_t transpose8x8(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Bits. (x & Mask) | y and (x & Mask) ^ y are one instruction each; the compiler makes two of them
// when both operands are constants.
template <std::uint32_t Mask>
KVPLAN_DEVICE std::uint32_t mask_or(std::uint32_t x, std::uint32_t y) {
  std::uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(x), "n"(Mask), "r"(y));
  return v;
}
template <std::uint32_t Mask>
KVPLAN_DEVICE std::uint32_t mask_xor(std::uint32_t x, std::uint32_t y) {
  std::uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(v) : "r"(x), "n"(Mask), "r"(y));
  return v;
}
/// Low 32 bits of (high:low) >> shift, shift 0..31.
KVPLAN_DEVICE std::uint32_t funnel_right(std::uint32_t low, std::uint32_t high, int shift) {
  return __funnelshift_r(low, high, static_cast<unsigned>(shift));
}
/// Byte i of the result is byte (selector >> 4i & 7) of (b:a).
KVPLAN_DEVICE std::uint32_t permute(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  return __byte_perm(a, b, selector);
}
/// Index of the lowest set bit of x != 0.
KVPLAN_DEVICE int first_bit(std::uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
/// A constant that the compiler does not see through.
KVPLAN_DEVICE std::uint32_t opaque(std::uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Numbers. A pair of halves is 32 bits, the first in the low half.
KVPLAN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KVPLAN_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
KVPLAN_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
KVPLAN_DEVICE std::uint16_t to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
KVPLAN_DEVICE float from_half(std::uint16_t h) { return __half2float(__ushort_as_half(h)); }
KVPLAN_DEVICE std::uint32_t pack_halves(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&h);
}
KVPLAN_DEVICE float low_half(std::uint32_t x) {
  return from_half(static_cast<std::uint16_t>(x & 0xffff));
}
KVPLAN_DEVICE float high_half(std::uint32_t x) {
  return from_half(static_cast<std::uint16_t>(x >> 16));
}
KVPLAN_DEVICE std::uint32_t multiply_halves(std::uint32_t x, std::uint32_t y) {
  const __half2 h =
      __hmul2(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&y));
  return *reinterpret_cast<const std::uint32_t*>(&h);
}
KVPLAN_DEVICE std::uint32_t add_halves(std::uint32_t x, std::uint32_t y) {
  const __half2 h =
      __hadd2(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&y));
  return *reinterpret_cast<const std::uint32_t*>(&h);
}

/// Global memory that is read once: evicted first. Stays where it is written between other volatile
/// instructions (mma): the compiler would sink a load that runs ahead down to its use.
KVPLAN_DEVICE uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
KVPLAN_DEVICE uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
struct LaunchShape {
  int blocks = 1, blocks_y = 1, blocks_z = 1;
  int threads = 32;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool overlap = false;  // may start before the kernel ahead has finished; then the kernel calls
                         // wait_for_previous_kernel() before it touches that one's results
};

/// Starts a kernel; more than 48 KB of shared memory want allow_shared() once before.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape,
                   const Parameters&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.blocks_y),
                        static_cast<unsigned>(shape.blocks_z));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.overlap ? 1 : 0;
  const cudaError_t e = cudaLaunchKernelEx(&config, kernel, arguments...);
  return e == cudaSuccess ? cudaGetLastError() : e;
}
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), std::size_t bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace kvplan::kernels
