#pragma once
// The packed pages of a stretch of a sequence on their way to a warp. Private to the decode kernel.

#include "kernels/ptx.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kLanes = quant::kWarpLanes;

// Where the pages of a stretch of a sequence are; one lane holds one block number.
struct PageList {
  const std::byte* pages = nullptr;      // of the KV head, in block 0
  const std::int32_t* blocks = nullptr;  // block numbers of the stretch
  std::uint32_t block_bytes = 0;
  int count = 0;
  int window = 0;  // lane i: blocks of the pages window + i and window + 32 + i
  int block = 0, later = 0;

  KVPLAN_DEVICE int block_of(int page) const { return blocks[page < count ? page : count - 1]; }
  KVPLAN_DEVICE void start() {
    block = block_of(lane());
    later = block_of(quant::kWarpLanes + lane());
  }
  // `page`, the same in all lanes, is used next: none before it will be.
  KVPLAN_DEVICE void go_to(int page) {
    if (page < window + quant::kWarpLanes) return;
    window += quant::kWarpLanes;
    block = later;
    later = block_of(window + quant::kWarpLanes + lane());
  }
  KVPLAN_DEVICE const std::byte* page(int index) const {
    const int from = index - window;
    const int number = shuffle(from < quant::kWarpLanes ? block : later, from % quant::kWarpLanes);
    return pages + static_cast<std::uint64_t>(number) * block_bytes;
  }
};

// The tiles of a warp's pages on their way through its ring in shared memory: a stream of chunks of
// kChunk bytes per page that runs kDepth chunks ahead of use, across the border of keys and values
// and from group to group. Lanes 16 n .. 16 n + 15 copy page n.
template <int Pages>
struct Stream {
  static constexpr int kLanesPerPage = kChunk / 16;
  static_assert(Pages * kLanesPerPage <= kLanes);
  const std::byte* next = nullptr;    // the lane's part of its page of the next group; null: none
  const std::byte* source = nullptr;  // of the group that is being copied; null: nothing to copy
  std::uint32_t ring = 0, mask = 0;   // address; bytes of a page's ring - 1
  std::uint32_t end = 0;              // bytes of a page's tiles
  std::uint32_t turn = 0;     // stream bytes per page: `end` in whole chunks, at least kDepth
  std::uint32_t copied = 0;   // bytes of the page that are on their way or there
  std::uint32_t to = 0;       // stream position of the next chunk
  std::uint32_t base = 0;     // stream position of the group in use
  std::uint32_t arrived = 0;  // bytes of its pages that are there

  KVPLAN_DEVICE void issue() {
    const auto mine = static_cast<std::uint32_t>(16 * (lane() % kLanesPerPage));
    if (source != nullptr && copied + mine < end)
      copy_async(ring + static_cast<std::uint32_t>(lane() / kLanesPerPage) * (mask + 1) +
                     (to & mask) + mine,
                 source + copied);
    commit_copies();
    to += kChunk;
    copied += kChunk;
    if (copied == turn) {
      copied = 0;
      source = next;
    }
  }
  // The first group; `next` is set.
  KVPLAN_DEVICE void start(const std::byte* first) {
    source = first;
    for (int i = 0; i < kDepth; ++i) issue();
  }
  // Lets the bytes up to `until` of the group's pages arrive.
  KVPLAN_DEVICE void advance(std::uint32_t until) {
    while (arrived < until) {
      wait_copies<kDepth - 1>();
      sync_warp();  // for the copies of all lanes; and all are done with what is written over now
      issue();
      arrived += kChunk;
    }
  }
  KVPLAN_DEVICE void finish_group() {
    base += arrived;
    arrived = 0;
  }
  KVPLAN_DEVICE RingTile tile(int page, std::uint32_t offset) const {
    return {ring + static_cast<std::uint32_t>(page) * (mask + 1), mask, base + offset};
  }
};

}  // namespace kvplan::kernels
