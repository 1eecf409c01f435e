#pragma once
// The packed pages of a warp's piece on their way to it. Private to the decode kernels.

#include "kernels/ptx.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kLanes = quant::kWarpLanes;

// The pages of a piece that are a warp's, and what is copied of each. In shared memory: registers
// are scarce.
struct PageList {
  const std::byte* pages;      // of the KV head, in block 0
  const std::int32_t* blocks;  // their block numbers
  const float2* phases;        // LayerView::page_phase of the first page
  std::uint32_t block_bytes;
  std::int32_t count;
  std::uint32_t key_bytes, rest_bytes;  // tiles of keys; what follows
  std::uint32_t phase_bytes;            // of a page; 0: not centred
};

static_assert(sizeof(PageList) <= kPageListBytes);

// The blocks of a list's pages, 32 at a time: lane i holds that of page window + i.
class BlockWindow {
 public:
  KVPLAN_DEVICE void look_at(const PageList& list, int page) {
    window_ = page;
    const int mine = page + lane(), last = list.count - 1;
    block_ = list.blocks[mine < last ? mine : last];
  }
  /// Where page `index` lies. Pages must come in ascending order.
  KVPLAN_DEVICE const std::byte* page(const PageList& list, int index) {
    if (index >= window_ + kLanes) [[unlikely]]
      look_at(list, index);
    return list.pages +
           static_cast<std::uint64_t>(shuffle(block_, index - window_)) * list.block_bytes;
  }

 private:
  int window_ = 0, block_ = 0;
};

// Pages through two slots in shared memory, one for each half: the tiles of keys, and the tiles of
// values with all norms and scales; behind both the phases. A half is copied as soon as its slot is
// free. Lives as long as its warp: barriers count on.
class PageFeed {
 public:
  KVPLAN_DEVICE PageFeed(PageList* list, std::uint32_t barriers, std::uint32_t slots,
                         const SharedMap& map)
      : list_(list),
        barriers_(barriers),
        slots_(slots),
        slot_bytes_(static_cast<std::uint32_t>(map.slot_bytes)) {
    if (lane() == 0)
      for (int half = 0; half < 2; ++half) init_barrier(barriers + 8 * half);
    sync_warp();
  }
  /// Starts on another list; the one before is used up.
  KVPLAN_DEVICE void start(const PageList& list) {
    sync_warp();
    if (lane() == 0) *list_ = list;
    sync_warp();
    next_ = 0;
    window_.look_at(list, 0);
    fill_keys();
    fill_rest();
  }
  // Address of a half of the page, once it is there. When all lanes are done with it, its slot is
  // filled for the next page.
  KVPLAN_DEVICE std::uint32_t wait_keys() {
    wait_copy(barriers_, parity_);
    return slots_;
  }
  KVPLAN_DEVICE void done_keys() {
    sync_warp();
    fill_keys();
  }
  KVPLAN_DEVICE std::uint32_t wait_rest() {
    wait_copy(barriers_ + 8, parity_);
    return slots_ + slot_bytes_;
  }
  KVPLAN_DEVICE void done_rest() {
    parity_ ^= 1;
    sync_warp();
    fill_rest();
  }
  /// Of the page whose keys are there.
  KVPLAN_DEVICE std::uint32_t phases() const { return slots_ + 2 * slot_bytes_; }

 private:
  KVPLAN_DEVICE void fill_keys() {
    if (next_ >= list_->count) return;
    const std::uint32_t key_bytes = list_->key_bytes, phase_bytes = list_->phase_bytes;
    page_ = window_.page(*list_, next_);
    copy_async(slots_, page_, key_bytes, barriers_);
    if (phase_bytes > 0)
      copy_async(phases(),
                 reinterpret_cast<const std::byte*>(list_->phases) +
                     static_cast<std::uint64_t>(next_) * phase_bytes,
                 phase_bytes, barriers_);
    end_batch(barriers_, key_bytes + phase_bytes);
    ++next_;
    rest_ = true;
  }
  KVPLAN_DEVICE void fill_rest() {
    if (!rest_) return;
    const std::uint32_t key_bytes = list_->key_bytes, rest_bytes = list_->rest_bytes;
    copy_async(slots_ + slot_bytes_, page_ + key_bytes, rest_bytes, barriers_ + 8);
    end_batch(barriers_ + 8, rest_bytes);
    rest_ = false;
  }

  PageList* list_;
  std::uint32_t barriers_, slots_, slot_bytes_;
  int next_ = 0;              // page whose keys are copied next
  bool rest_ = false;         // whether the rest of that ahead of it is still to be copied
  std::uint32_t parity_ = 0;  // of the page in use
  BlockWindow window_;
  const std::byte* page_ = nullptr;  // whose keys were copied last
};

// Halves of single pages through a ring of slots, in the order keys 0, keys 1, values 0, keys 2,
// values 1, .., values of the last page: the keys of a page come while the values of the page
// before are at work. Otherwise as PageFeed; not for centred keys.
class HalfFeed {
 public:
  KVPLAN_DEVICE HalfFeed(PageList* list, std::uint32_t barriers, std::uint32_t slots,
                         const SharedMap& map)
      : list_(static_cast<int>(reinterpret_cast<std::byte*>(list) - shared_memory())),
        barriers_(barriers),
        slots_(slots),
        slot_bytes_(static_cast<std::uint32_t>(map.slot_bytes)),
        slot_count_(map.feed_slots) {
    if (lane() == 0)
#pragma unroll 1
      for (int slot = 0; slot < slot_count_; ++slot) init_barrier(barriers + 8 * slot);
    sync_warp();
  }
  /// Starts on another list; the one before is used up.
  KVPLAN_DEVICE void start(const PageList& list) {
    sync_warp();
    if (lane() == 0) this->list() = list;
    sync_warp();
    issued_ = 0;
    window_.look_at(list, 0);
#pragma unroll 1
    for (int slot = 0; slot < slot_count_; ++slot) issue();
  }
  /// Address of the next half, once it is there.
  KVPLAN_DEVICE std::uint32_t wait() {
    const int slot = taken_;
    wait_copy(barriers_ + 8 * slot, parity_);
    taken_ = slot + 1 < slot_count_ ? slot + 1 : 0;
    if (taken_ == 0) parity_ ^= 1;
    return slots_ + static_cast<std::uint32_t>(slot) * slot_bytes_;
  }
  /// The oldest half still held is no longer needed.
  KVPLAN_DEVICE void done() {
    sync_warp();
    issue();
  }

 private:
  KVPLAN_DEVICE void issue() {
    const PageList& list = this->list();
    const int i = issued_, count = list.count;
    if (i >= 2 * count) return;
    const std::uint32_t key_bytes = list.key_bytes;
    const int keys_of = (i + 1) / 2;
    const bool keys = (i % 2 == 1 || i == 0) && keys_of < count;
    if (keys) {
      before_ = last_;
      last_ = window_.page(list, keys_of);
    }
    const std::uint32_t bytes = keys ? key_bytes : list.rest_bytes;
    const std::byte* from = keys ? last_ : (i % 2 == 0 ? before_ : last_) + key_bytes;
    const std::uint32_t barrier = barriers_ + 8 * free_;
    copy_async(slots_ + static_cast<std::uint32_t>(free_) * slot_bytes_, from, bytes, barrier);
    end_batch(barrier, bytes);
    free_ = free_ + 1 < slot_count_ ? free_ + 1 : 0;
    issued_ = i + 1;
  }

  // So that the compiler knows where it is.
  KVPLAN_DEVICE PageList& list() const {
    return *reinterpret_cast<PageList*>(shared_memory() + list_);
  }

  int list_;  // in shared memory
  std::uint32_t barriers_, slots_, slot_bytes_;
  int slot_count_;
  int free_ = 0, taken_ = 0;  // slot of the half that is copied, awaited next
  std::uint32_t parity_ = 0;  // of taken_
  int issued_ = 0;            // halves of the list
  BlockWindow window_;
  const std::byte* last_ = nullptr;    // the page whose keys were copied last
  const std::byte* before_ = nullptr;  // the one before
};

/// x, the same in all lanes, such that the compiler knows: then branches need no bookkeeping.
KVPLAN_DEVICE std::uint32_t uniform(std::uint32_t x) { return ballot((x >> lane() & 1) != 0); }

// Halves of single pages, keys and then values, through a ring of slots that are as large as the
// list's halves need, or through one slot where the ring does not hold a page. Behind the keys are
// the phases of the page. Otherwise as PageFeed.
class PageRing {
 public:
  KVPLAN_DEVICE PageRing(PageList* list, std::uint32_t barriers, std::uint32_t slots,
                         const SharedMap& map)
      : list_(static_cast<int>(reinterpret_cast<std::byte*>(list) - shared_memory())),
        barriers_(barriers),
        slots_(slots),
        ring_bytes_(static_cast<std::uint32_t>(map.ring_bytes)) {
    if (lane() == 0)
#pragma unroll 1
      for (int slot = 0; slot < kMostSlots; ++slot) init_barrier(barriers + 8 * slot);
    sync_warp();
  }
  /// Starts on another list; the one before is used up.
  KVPLAN_DEVICE void start(const PageList& list) {
    sync_warp();
    if (lane() == 0) this->list() = list;
    sync_warp();
    first_bytes_ = list.key_bytes + list.phase_bytes;
    page_bytes_ = first_bytes_ + list.rest_bytes;
    const int fit = 2 * static_cast<int>(ring_bytes_ / page_bytes_);
    slot_count_ = fit == 0 ? 1 : fit < kMostSlots ? fit : kMostSlots;
    taken_ = sent_ = 0;
    window_.look_at(list, 0);
#pragma unroll 1
    for (int slot = 0; slot < slot_count_; ++slot) issue(slot);
  }
  /// Address of the next half, once it is there.
  KVPLAN_DEVICE std::uint32_t wait() {
    wait_copy(barriers_ + 8 * taken_, parities_ >> taken_ & 1);
    return address(taken_);
  }
  /// It is no longer needed.
  KVPLAN_DEVICE void done() {
    sync_warp();
    parities_ ^= 1u << taken_;
    issue(taken_);
    taken_ = taken_ + 1 < slot_count_ ? taken_ + 1 : 0;
  }

 private:
  KVPLAN_DEVICE std::uint32_t address(int slot) const {
    return slots_ + static_cast<std::uint32_t>(slot / 2) * page_bytes_ +
           (slot % 2 == 0 ? 0 : first_bytes_);
  }
  KVPLAN_DEVICE void issue(int slot) {
    const PageList& list = this->list();
    if (sent_ >= 2 * list.count) return;
    const std::uint32_t to = address(slot), barrier = barriers_ + 8 * slot,
                        key_bytes = list.key_bytes;
    if (sent_ % 2 == 0) {
      const int page = sent_ / 2;
      const std::uint32_t phase_bytes = list.phase_bytes;
      from_ = window_.page(list, page);
      copy_async(to, from_, key_bytes, barrier);
      copy_async(to + key_bytes,
                 reinterpret_cast<const std::byte*>(list.phases) +
                     static_cast<std::uint64_t>(page) * phase_bytes,
                 phase_bytes, barrier);
      end_batch(barrier, key_bytes + phase_bytes);
    } else {
      copy_async(to, from_ + key_bytes, list.rest_bytes, barrier);
      end_batch(barrier, list.rest_bytes);
    }
    ++sent_;
  }

  // So that the compiler knows where it is.
  KVPLAN_DEVICE PageList& list() const {
    return *reinterpret_cast<PageList*>(shared_memory() + list_);
  }

  int list_;  // in shared memory
  std::uint32_t barriers_, slots_, ring_bytes_;
  std::uint32_t first_bytes_ = 0, page_bytes_ = 0;  // of keys and phases; of all
  int slot_count_ = 0;
  int taken_ = 0;               // slot of the half that is awaited next or at work
  std::uint32_t parities_ = 0;  // bit i: of the batch that slot i awaits next
  int sent_ = 0;                // halves of the list
  BlockWindow window_;
  const std::byte* from_ = nullptr;  // the page whose keys were copied last
};

}  // namespace kvplan::kernels
