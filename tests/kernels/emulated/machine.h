#pragma once
// A block of CUDA threads as fibers of one CPU thread, scheduled round robin between barriers.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace kvplan::kernels::emulated {

inline constexpr std::size_t kSlotBytes = 64;
inline constexpr std::uint32_t kSharedBase =
    1024;  // where the shared window of sm_80 and later starts
inline constexpr std::size_t kMaxSharedBytes = 227 * 1024;

struct BlockShape {
  int x = 0, y = 0, z = 0;
  int blocks = 0, threads = 0;
};

int thread();
const BlockShape& block_shape();
std::byte* shared_memory();
/// Throws std::out_of_range outside the block's allocation, as compute-sanitizer would report.
std::byte* shared_at(std::uint32_t address, std::size_t bytes = 4);
/// Batches of copies to shared memory, awaited at a barrier of 8 bytes there (kernels/ptx.cuh).
/// Their bytes are poisoned until finish_copy(). std::logic_error for addresses or sizes that are
/// no multiples of 16, for a batch on a barrier before the one ahead was awaited or of other size
/// than its copies, and for a wait without end.
void init_barrier(std::uint32_t barrier);
void begin_copy(std::uint32_t to, const std::byte* from, std::uint32_t bytes,
                std::uint32_t barrier);
void end_batch(std::uint32_t barrier, std::uint32_t bytes);
void finish_copy(std::uint32_t barrier, std::uint32_t parity);
/// Exchange slot of a lane of the calling thread's warp.
std::byte* slot(int lane);
void sync_warp();
void sync_block();

/// Runs body() once per thread. Shared memory starts as NaN patterns. std::logic_error when threads
/// wait for each other for ever; exceptions of body() are passed on.
cudaError_t run_grid(int blocks, int blocks_y, int blocks_z, int threads, std::size_t shared_bytes,
                     const std::function<void()>& body);

}  // namespace kvplan::kernels::emulated
