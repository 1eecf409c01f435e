#include "kernels/sequences.h"

#include <algorithm>
#include <limits>
#include <string>

#include "kernels/errors.h"

namespace kvplan::kernels {

Sequences::Sequences(const quant::CacheGeometry& geometry, int sink_tokens, std::size_t block_bytes)
    : max_tokens_(geometry.max_tokens),
      sink_tokens_(sink_tokens),
      block_bytes_(block_bytes),
      sequences_(static_cast<std::size_t>(geometry.max_sequences)),
      references_(static_cast<std::size_t>(geometry.blocks)) {
  // Room for the most pages of a sequence now, so that commit() cannot fail.
  for (Sequence& sequence : sequences_)
    sequence.blocks.reserve(
        static_cast<std::size_t>(std::min(full_pages(max_tokens_), geometry.blocks)));
  for (std::int64_t block = geometry.blocks; block-- > 0;)
    free_.push_back(static_cast<std::int32_t>(block));
}

std::int64_t Sequences::full_pages(std::int64_t length) const {
  return std::max<std::int64_t>(length - sink_tokens_, 0) / quant::kPageTokens;
}

void Sequences::require_slot(int slot) const {
  if (slot < 0 || static_cast<std::size_t>(slot) >= sequences_.size())
    throw ArgumentError("slot " + std::to_string(slot) + " was asked of a cache with slots 0.." +
                        std::to_string(sequences_.size() - 1));
}

const Sequences::Sequence& Sequences::at(int slot) const {
  require_slot(slot);
  return sequences_[static_cast<std::size_t>(slot)];
}

Sequences::Sequence& Sequences::at(int slot) {
  require_slot(slot);
  return sequences_[static_cast<std::size_t>(slot)];
}

StepChange Sequences::prepare(std::span<const quant::SequenceStep> step) const {
  if (step.empty()) throw ArgumentError("a step needs at least one sequence");
  StepChange change;
  change.entries.reserve(std::min(step.size(), sequences_.size()));
  std::vector<bool> named(sequences_.size());
  std::int64_t rows = 0, blocks = 0;
  for (const quant::SequenceStep& part : step) {
    const std::int64_t before = at(part.slot).length;
    if (named[static_cast<std::size_t>(part.slot)])
      throw ArgumentError("slot " + std::to_string(part.slot) + " is named twice in a step");
    named[static_cast<std::size_t>(part.slot)] = true;
    if (part.tokens < 1)
      throw ArgumentError("a sequence of a step brings at least 1 token; slot " +
                          std::to_string(part.slot) + " was given " + std::to_string(part.tokens));
    if (part.tokens > max_tokens_ - before)
      throw TooLongError("a sequence holds at most " + std::to_string(max_tokens_) +
                         " tokens; slot " + std::to_string(part.slot) + " holds " +
                         std::to_string(before) + " and was given " + std::to_string(part.tokens) +
                         " more");
    StepEntry& entry = change.entries.emplace_back();
    entry.slot = part.slot;
    entry.length_before = static_cast<std::int32_t>(before);
    entry.length = static_cast<std::int32_t>(before + part.tokens);
    entry.first_row = static_cast<std::int32_t>(rows);
    entry.first_page = static_cast<std::int32_t>(full_pages(before));
    entry.new_pages =
        static_cast<std::int32_t>(full_pages(before + part.tokens)) - entry.first_page;
    entry.first_block = static_cast<std::int32_t>(blocks);
    rows += part.tokens;
    blocks += entry.new_pages;
    change.max_tokens = std::max(change.max_tokens, part.tokens);
    if (rows > std::numeric_limits<std::int32_t>::max())
      throw ArgumentError("a step brings at most 2147483647 tokens; bring them in several");
  }
  change.rows = static_cast<int>(rows);
  if (blocks > free_blocks())
    throw OutOfBlocksError(blocks * static_cast<std::int64_t>(block_bytes_),
                           free_blocks() * static_cast<std::int64_t>(block_bytes_),
                           "the step fills " + std::to_string(blocks) + " pages and the pool has " +
                               std::to_string(free_blocks()) +
                               " blocks left; release a sequence and try again, or create the "
                               "cache with more blocks");
  change.blocks.assign(free_.rbegin(), free_.rbegin() + static_cast<std::ptrdiff_t>(blocks));
  return change;
}

void Sequences::commit(const StepChange& change) noexcept {
  for (const StepEntry& entry : change.entries) {
    Sequence& sequence = sequences_[static_cast<std::size_t>(entry.slot)];
    sequence.length = entry.length;
    const auto first = change.blocks.begin() + entry.first_block;
    sequence.blocks.insert(sequence.blocks.end(), first, first + entry.new_pages);
  }
  for (const std::int32_t block : change.blocks) references_[static_cast<std::size_t>(block)] = 1;
  free_.resize(free_.size() - change.blocks.size());
}

void Sequences::require_fork(int from, int to) const {
  if (at(from).length == 0)
    throw ArgumentError("slot " + std::to_string(from) + " is free; there is nothing to fork");
  if (at(to).length > 0)
    throw ArgumentError("slot " + std::to_string(to) + " holds " + std::to_string(at(to).length) +
                        " tokens; fork into a free slot or release it first");
}

void Sequences::fork(int from, int to) {
  require_fork(from, to);
  const Sequence& source = at(from);
  Sequence& target = at(to);
  target.blocks.assign(source.blocks.begin(), source.blocks.end());
  target.length = source.length;
  for (const std::int32_t block : target.blocks) ++references_[static_cast<std::size_t>(block)];
}

void Sequences::release(int slot) {
  Sequence& sequence = at(slot);
  for (const std::int32_t block : sequence.blocks)
    if (--references_[static_cast<std::size_t>(block)] == 0) free_.push_back(block);
  sequence.blocks.clear();
  sequence.length = 0;
}

}  // namespace kvplan::kernels
