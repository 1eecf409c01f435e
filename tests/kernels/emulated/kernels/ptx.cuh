#pragma once
// kernels/ptx.cuh for the CPU: every thread of a block is a fiber, blocks run one after the other.
// Kernel sources compiled with this header in front on the include path run in plain tests.

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "quant/packing.h"
#include "tests/kernels/emulated/machine.h"

#undef __device__
#undef __global__
#undef __launch_bounds__
#undef __restrict__
#undef __constant__
#define __device__
#define __global__
#define __constant__
#define __launch_bounds__(...)
#define KVPLAN_DEVICE inline

namespace kvplan::kernels {

inline int thread() { return emulated::thread(); }
inline int threads() { return emulated::block_shape().threads; }
inline int lane() { return emulated::thread() & 31; }
inline int warp() { return emulated::thread() >> 5; }
inline int block() { return emulated::block_shape().x; }
inline int block_y() { return emulated::block_shape().y; }
inline int block_z() { return emulated::block_shape().z; }
inline int blocks() { return emulated::block_shape().blocks; }

inline void sync_block() { emulated::sync_block(); }
inline void sync_warp() { emulated::sync_warp(); }
/// Every lane gives one value and reads those of all lanes: read(value of lane i).
template <class T, class Read>
auto exchange(const T& mine, Read read) {
  static_assert(sizeof(T) <= emulated::kSlotBytes);
  std::memcpy(emulated::slot(lane()), &mine, sizeof(T));
  emulated::sync_warp();
  const auto result = read([](int from) {
    T value;
    std::memcpy(&value, emulated::slot(from), sizeof(T));
    return value;
  });
  emulated::sync_warp();
  return result;
}
inline std::uint32_t ballot(bool x) {
  return exchange(x, [](auto of) {
    std::uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) bits |= std::uint32_t{of(i)} << i;
    return bits;
  });
}
inline bool any(bool x) { return ballot(x) != 0; }
template <class T>
T shuffle(T x, int from_lane) {
  return exchange(x, [&](auto of) { return of(from_lane & 31); });
}
template <class T>
T shuffle_xor(T x, int mask) {
  return exchange(x, [&](auto of) { return of(lane() ^ mask); });
}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

inline void fence_device() {}
inline void fence_copies() {}
inline std::int32_t add_atomic(std::int32_t& x, std::int32_t y) {
  const std::int32_t before = x;
  x += y;
  return before;
}
inline void max_atomic(float& x, float y) { x = std::fmax(x, y); }

inline std::byte* shared_memory() { return emulated::shared_memory(); }
inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const std::byte*>(p) - emulated::shared_memory()) +
         emulated::kSharedBase;
}
inline std::uint32_t load_shared(std::uint32_t address) {
  std::uint32_t v;
  std::memcpy(&v, emulated::shared_at(address), sizeof v);
  return v;
}

template <class T>
T load_shared_as(std::uint32_t address) {
  T v;
  std::memcpy(&v, emulated::shared_at(address, sizeof v), sizeof v);
  return v;
}
inline uint4 load_shared4(std::uint32_t address) { return load_shared_as<uint4>(address); }
inline uint2 load_shared2(std::uint32_t address) { return load_shared_as<uint2>(address); }
inline std::uint32_t load_shared1(std::uint32_t address) { return load_shared(address); }
inline std::uint32_t load_shared_half(std::uint32_t address) {
  return load_shared_as<std::uint16_t>(address);
}
inline void prefetch(const void*) {}
inline void touch(const void*) {}
inline float2 load_written(const float2* p) { return *p; }
inline float4 load_written(const float4* p) { return *p; }
inline void init_barrier(std::uint32_t barrier) { emulated::init_barrier(barrier); }
// Copies take place when they are awaited; bytes that are not there yet are poisoned.
inline void copy_async(std::uint32_t to, const std::byte* from, std::uint32_t bytes,
                       std::uint32_t barrier) {
  emulated::sync_warp();
  if (lane() == 0) emulated::begin_copy(to, from, bytes, barrier);
  emulated::sync_warp();
}
inline void end_batch(std::uint32_t barrier, std::uint32_t bytes) {
  emulated::sync_warp();
  if (lane() == 0) emulated::end_batch(barrier, bytes);
  emulated::sync_warp();
}
inline void wait_copy(std::uint32_t barrier, std::uint32_t parity) {
  emulated::sync_warp();
  if (lane() == 0) emulated::finish_copy(barrier, parity);
  emulated::sync_warp();
}

inline void copy_16(void* to_shared, const void* from) { std::memcpy(to_shared, from, 16); }
inline void end_group() {}
template <int Pending>
void wait_groups() {}

inline std::uint16_t to_half(float x) { return quant::to_half(x); }
inline float from_half(std::uint16_t h) { return quant::from_half(h); }
inline std::uint32_t pack_halves(float low, float high) {
  return to_half(low) | static_cast<std::uint32_t>(to_half(high)) << 16;
}
inline float low_half(std::uint32_t x) { return from_half(static_cast<std::uint16_t>(x)); }
inline float high_half(std::uint32_t x) { return from_half(static_cast<std::uint16_t>(x >> 16)); }
inline std::uint32_t add_halves(std::uint32_t x, std::uint32_t y) {
  return pack_halves(low_half(x) + low_half(y), high_half(x) + high_half(y));
}

inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Fragments {
    std::uint32_t a[4], b[2];
  };
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  exchange(mine, [&](auto of) {
    const int g = lane() >> 2, t = lane() & 3;
    float row[2][16], column[2][16];
    for (int k = 0; k < 4; ++k) {
      const Fragments rows = of(4 * g + k);
      const std::uint32_t* r = rows.a;
      for (int half = 0; half < 2; ++half) {
        row[half][2 * k] = low_half(r[half]), row[half][2 * k + 1] = high_half(r[half]);
        row[half][2 * k + 8] = low_half(r[half + 2]), row[half][2 * k + 9] = high_half(r[half + 2]);
        const Fragments columns = of(4 * (2 * t + half) + k);
        column[half][2 * k] = low_half(columns.b[0]);
        column[half][2 * k + 1] = high_half(columns.b[0]);
        column[half][2 * k + 8] = low_half(columns.b[1]);
        column[half][2 * k + 9] = high_half(columns.b[1]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[i / 2][k] * column[i % 2][k];
      d[i] += sum;
    }
    return 0;
  });
}
// k = 16 words / 8 ..: bytes of row (or column) x of operand A (or B), word i of lane x * 4 + k.
template <int Words, class B>
void mma_of_bytes(int (&d)[4], const std::uint32_t (&a)[2 * Words], const std::uint32_t (&b)[Words],
                  B byte_of_b) {
  struct Fragments {
    std::uint32_t a[2 * Words], b[Words];
  };
  Fragments mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  exchange(mine, [&](auto of) {
    const int g = lane() >> 2, t = lane() & 3;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 4; ++k) {
        const Fragments rows = of(4 * g + k), columns = of(4 * (2 * t + i % 2) + k);
        for (int w = 0; w < Words; ++w)
          for (int shift = 0; shift < 32; shift += 8)
            d[i] += static_cast<std::int8_t>(rows.a[2 * w + i / 2] >> shift & 0xff) *
                    byte_of_b(columns.b[w] >> shift & 0xff);
      }
    return 0;
  });
}
inline void mma_bytes(int (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                      std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  mma_of_bytes<2>(d, {a0, a1, a2, a3}, {b0, b1},
                  [](std::uint32_t x) { return int{static_cast<std::int8_t>(x)}; });
}
inline void mma_bytes(int (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b) {
  mma_of_bytes<1>(d, {a0, a1}, {b},
                  [](std::uint32_t x) { return int{static_cast<std::int8_t>(x)}; });
}
inline void mma_unsigned(int (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                         std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  mma_of_bytes<2>(d, {a0, a1, a2, a3}, {b0, b1},
                  [](std::uint32_t x) { return static_cast<int>(x); });
}
inline void multiply_unsigned(int (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                              std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  for (int& x : d) x = 0;
  mma_unsigned(d, a0, a1, a2, a3, b0, b1);
}
inline std::uint32_t transpose8x8(std::uint32_t x) {
  return exchange(x, [](auto of) {
    const int g = lane() >> 2, t = lane() & 3;
    const auto element = [&](int row, int column) {
      return of(4 * row + column / 2) >> 16 * (column % 2) & 0xffff;
    };
    return element(2 * t, g) | element(2 * t + 1, g) << 16;
  });
}

template <std::uint32_t Mask>
std::uint32_t mask_or(std::uint32_t x, std::uint32_t y) {
  return (x & Mask) | y;
}
inline std::uint32_t funnel_right(std::uint32_t low, std::uint32_t high, int shift) {
  return static_cast<std::uint32_t>((std::uint64_t{high} << 32 | low) >> shift);
}
inline std::uint32_t permute(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  std::uint32_t v = 0;
  for (int i = 0; i < 4; ++i)
    v |= static_cast<std::uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return v;
}
inline std::uint32_t select_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
  std::uint32_t v = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t n = selector >> 4 * i & 15;
    auto byte = static_cast<std::uint32_t>(bytes >> 8 * (n & 7) & 0xff);
    if ((n & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    v |= byte << 8 * i;
  }
  return v;
}
inline int first_bit(std::uint32_t x) { return __builtin_ctz(x); }
inline std::uint32_t opaque(std::uint32_t x) { return x; }
template <class T>
T* opaque(T* p) {
  return p;
}

struct Place {
  int lane = kernels::lane(), warp = kernels::warp(), g = lane >> 2, t = lane & 3;
};

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float float_of_bits(std::uint32_t x) {
  float v;
  std::memcpy(&v, &x, sizeof v);
  return v;
}
inline std::uint32_t bits_of_float(float x) {
  std::uint32_t v;
  std::memcpy(&v, &x, sizeof v);
  return v;
}
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }
struct LaunchShape {
  int blocks = 1, blocks_y = 1, blocks_z = 1;
  int threads = 32;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool overlap = false;
};
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape,
                   const Parameters&... arguments) {
  return emulated::run_grid(shape.blocks, shape.blocks_y, shape.blocks_z, shape.threads,
                            shape.shared_bytes, [&] { kernel(arguments...); });
}
template <class... Parameters>
cudaError_t allow_shared(void (*)(Parameters...), std::size_t) {
  return cudaSuccess;
}

}  // namespace kvplan::kernels
