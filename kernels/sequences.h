#pragma once
// Which blocks of the pool belong to which sequence: the host's bookkeeping of slots, page tables
// and reference counts. Knows nothing of the device. Private to kernels.

#include <cstdint>
#include <span>
#include <vector>

#include "quant/kv_cache.h"

namespace kvplan::kernels {

/// One sequence's part of a step.
struct StepEntry {
  std::int32_t slot = 0;
  std::int32_t length_before = 0, length = 0;
  std::int32_t first_row = 0;   // of its tokens in the step
  std::int32_t first_page = 0;  // pages that fill: first_page .. first_page + new_pages - 1
  std::int32_t new_pages = 0;
  std::int32_t first_block = 0;  // their blocks in StepChange::blocks
};

/// What a step changes, before it is carried out.
struct StepChange {
  std::vector<StepEntry> entries;
  std::vector<std::int32_t> blocks;  // of the pages that fill
  int rows = 0;                      // tokens of the step
  int max_tokens = 0;                // of one sequence in the step
};

class Sequences {
 public:
  /// `geometry.blocks` is the size of the pool. `block_bytes`: in all layers, for messages.
  Sequences(const quant::CacheGeometry& geometry, int sink_tokens, std::size_t block_bytes);

  /// Checks a step and chooses blocks; changes nothing. ArgumentError: nothing to do, a slot out of
  /// range or named twice, tokens < 1. TooLongError, OutOfBlocksError.
  StepChange prepare(std::span<const quant::SequenceStep> step) const;
  /// Carries out what prepare() returned last.
  void commit(const StepChange& change) noexcept;

  /// ArgumentError unless `from` holds tokens and `to` is free.
  void require_fork(int from, int to) const;
  /// `to` becomes a copy of `from` that shares its blocks.
  void fork(int from, int to);
  void release(int slot);

  std::int64_t length(int slot) const { return at(slot).length; }
  std::span<const std::int32_t> blocks(int slot) const { return at(slot).blocks; }
  std::int64_t free_blocks() const { return static_cast<std::int64_t>(free_.size()); }
  /// ArgumentError for a slot that does not exist.
  void require_slot(int slot) const;

 private:
  struct Sequence {
    std::int64_t length = 0;           // 0: free
    std::vector<std::int32_t> blocks;  // of its full pages
  };
  const Sequence& at(int slot) const;
  Sequence& at(int slot);
  std::int64_t full_pages(std::int64_t length) const;

  std::int64_t max_tokens_;
  std::int64_t sink_tokens_;
  std::size_t block_bytes_;
  std::vector<Sequence> sequences_;
  std::vector<std::int32_t> references_;  // by block
  std::vector<std::int32_t> free_;        // blocks, the next one last
};

}  // namespace kvplan::kernels
