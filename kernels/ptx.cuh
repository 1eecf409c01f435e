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

// What other blocks see: writes before a fence are there when they see a write after it.
KVPLAN_DEVICE void fence_device() { __threadfence(); }
/// Adds and returns what was there before.
KVPLAN_DEVICE std::int32_t add_atomic(std::int32_t& x, std::int32_t y) { return atomicAdd(&x, y); }
/// x = max(x, y) for x, y >= 0, in shared memory.
KVPLAN_DEVICE void max_atomic(float& x, float y) {
  atomicMax(reinterpret_cast<int*>(&x), __float_as_int(y));
}
/// Between plain reads and writes of shared memory and copies to it (copy_async) that begin after a
/// barrier of the block.
KVPLAN_DEVICE void fence_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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

/// Brings the line of `p` closer.
KVPLAN_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/// Reads the line of `p` ahead, into the multiprocessor's own cache.
KVPLAN_DEVICE void touch(const void* p) {
  [[maybe_unused]] std::uint32_t x;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(p));
}
/// Past that cache: what other blocks have written in this kernel.
KVPLAN_DEVICE float2 load_written(const float2* p) { return __ldcg(p); }
KVPLAN_DEVICE float4 load_written(const float4* p) { return __ldcg(p); }

// Copies from global to shared memory that run by themselves, awaited at a barrier of 8 bytes in
// shared memory: by the copy engine, or where there is none (before sm_90) by the lanes of a warp.
// A barrier serves one batch of copies after the other; the k-th (k = 0, 1, ..) has parity k % 2.
KVPLAN_DEVICE void init_barrier(std::uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(barrier) : "memory");
#endif
}
/// One of a batch's copies; by a whole warp, all lanes with the same arguments. Addresses and
/// `bytes` are multiples of 16. What the warp read at `to` before must be behind a sync_warp().
KVPLAN_DEVICE void copy_async(std::uint32_t to, const std::byte* from, std::uint32_t bytes,
                              std::uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  if (lane() == 0 && bytes > 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
#else
  for (std::uint32_t i = 16 * static_cast<std::uint32_t>(lane()); i < bytes; i += 16 * 32)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to + i), "l"(from + i)
                 : "memory");
#endif
}
/// Behind the copies of a batch, of `bytes` together.
KVPLAN_DEVICE void end_batch(std::uint32_t barrier, std::uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (lane() == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}
KVPLAN_DEVICE void wait_copy(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
        "p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
  } while (done == 0);
}

// The same by single threads: 16 bytes each, in the order of their groups. What others copied is
// there behind their wait and a sync_block().
KVPLAN_DEVICE void copy_16(void* to_shared, const void* from) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to_shared)),
      "l"(from)
      : "memory");
}
KVPLAN_DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until at most `Pending` of the thread's groups are under way.
template <int Pending>
KVPLAN_DEVICE void wait_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
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
// d [16,8] += a b in signed bytes, a [16,32] or [16,16] (fragments as mma.m16n8k32 and m16n8k16 of
// the PTX ISA); mma_unsigned: b has unsigned bytes.
KVPLAN_DEVICE void mma_bytes(int (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                             std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
KVPLAN_DEVICE void mma_bytes(int (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}
/// The first product of a sum: d = a b.
KVPLAN_DEVICE void multiply_unsigned(int (&d)[4], std::uint32_t a0, std::uint32_t a1,
                                     std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                     std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0));
}
KVPLAN_DEVICE void mma_unsigned(int (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
/// Lane 4g+t gives elements (g, 2t), (g, 2t+1) of an 8 x 8 matrix of 16-bit numbers and gets (2t,
/// g), (2t+1, g).
KVPLAN_DEVICE std::uint32_t transpose8x8(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Bits. (x & Mask) | y is one instruction; the compiler makes two of it when both operands are
// constants.
template <std::uint32_t Mask>
KVPLAN_DEVICE std::uint32_t mask_or(std::uint32_t x, std::uint32_t y) {
  std::uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(v) : "r"(x), "n"(Mask), "r"(y));
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
/// Byte i of the result is byte n & 7 of (b:a), n = selector >> 4i & 15, or with n & 8 eight times
/// the sign bit of that byte.
KVPLAN_DEVICE std::uint32_t select_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  std::uint32_t v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selector));
  return v;
}
/// Index of the lowest set bit of x != 0.
KVPLAN_DEVICE int first_bit(std::uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
/// What the compiler does not see through.
template <class T>
KVPLAN_DEVICE T* opaque(T* p) {
  asm volatile("" : "+l"(p)::"memory");
  return p;
}
KVPLAN_DEVICE std::uint32_t opaque(std::uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

/// Where a lane is. What is derived from it stays within the scope of the object: otherwise the
/// compiler computes it once for the whole kernel and the registers of loops are spilled for it.
struct Place {
  int lane, warp, g, t;  // lane = 4 g + t
  KVPLAN_DEVICE Place()
      : lane(static_cast<int>(opaque(threadIdx.x & 31))),
        warp(static_cast<int>(opaque(threadIdx.x >> 5))),
        g(lane >> 2),
        t(lane & 3) {}
};

// Numbers. A pair of halves is 32 bits, the first in the low half.
KVPLAN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KVPLAN_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KVPLAN_DEVICE float float_of_bits(std::uint32_t x) { return __uint_as_float(x); }
KVPLAN_DEVICE std::uint32_t bits_of_float(float x) { return __float_as_uint(x); }
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
KVPLAN_DEVICE std::uint32_t add_halves(std::uint32_t x, std::uint32_t y) {
  const __half2 h =
      __hadd2(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&y));
  return *reinterpret_cast<const std::uint32_t*>(&h);
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
