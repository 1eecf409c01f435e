#pragma once
// Which block works on what. Every segment offers units of work: its fp16 tokens and its packed
// pages (round.h). All units are laid end to end, KV head after KV head, within a head segment
// after segment, each as long as the work on it takes, and the line is cut into equal stretches: a
// block owns the units that start in its stretch. It takes its stretch in rounds of at most
// kMaxPieces segments. The pages of a round are laid end to end again and cut for the warps; fp16
// tokens go to whichever warp has no pages left. Private to the decode kernels.

#include <bit>

#include "kernels/ptx.cuh"
#include "kernels/round.h"
#include "kernels/transform.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

/// How many units start before a distance > 0 from the start of the first, which is `first` long;
/// the others are `each` long.
KVPLAN_DEVICE int units_within(std::uint32_t distance, std::uint32_t first, std::uint32_t each,
                               int units) {
  if (units <= 1 || distance <= first) return units < 1 ? 0 : 1;
  const std::uint32_t more = (distance - first + each - 1) / each;
  const auto rest = static_cast<std::uint32_t>(units - 1);
  return 1 + static_cast<int>(more < rest ? more : rest);
}

/// Length of the first unit of a segment: a warp that comes to a segment has to begin anew.
KVPLAN_DEVICE std::uint32_t first_length(const WorkCosts& costs, const Piece& piece) {
  return costs.start + (piece.chunks > 0 ? costs.chunk * static_cast<std::uint32_t>(piece.chunks)
                                         : costs.head(piece.head));
}
/// Length of a segment on the line.
KVPLAN_DEVICE std::uint32_t segment_length(const WorkCosts& costs, const Piece& piece) {
  return costs.start + costs.chunk * static_cast<std::uint32_t>(piece.chunks) +
         costs.head(piece.head) * static_cast<std::uint32_t>(piece.pages());
}

/// Units of a segment that start before a position of the line.
KVPLAN_DEVICE int units_before(const WorkCosts& costs, const Piece& piece, std::uint32_t position) {
  if (position <= piece.start) return 0;
  return units_within(position - piece.start, first_length(costs, piece), costs.head(piece.head),
                      piece.units());
}

/// The piece of a sequence, without its head and its place on the line.
KVPLAN_DEVICE Piece piece_of(const AttentionView& v, int sequence) {
  Piece piece{};
  const int length = v.batch.length[sequence], sinks = v.layer.sink_tokens;
  piece.sequence = sequence;
  piece.end_page = full_pages(length, sinks);
  piece.chunks =
      (length - piece.end_page * quant::kPageTokens + quant::kPlainChunk - 1) / quant::kPlainChunk;
  if (v.window > 0) {
    const std::int64_t first = v.batch.length_before[sequence] + 1 - v.window - sinks;
    const std::int64_t page = first > 0 ? first / quant::kPageTokens : 0;
    piece.first_page = page < piece.end_page ? static_cast<int>(page) : piece.end_page;
  }
  return piece;
}

/// Length of the heads before `head` on the line.
KVPLAN_DEVICE std::uint32_t heads_length(const AttentionView& v, const Round& round, int head) {
  const WorkCosts& costs = v.layer.costs;
  const std::uint32_t of_head = costs.start * static_cast<std::uint32_t>(v.batch.sequences) +
                                costs.chunk * static_cast<std::uint32_t>(round.chunks);
  return (costs.before[head] * static_cast<std::uint32_t>(round.pages) +
          of_head * static_cast<std::uint32_t>(head)) *
         static_cast<std::uint32_t>(v.column_blocks);
}

/// Measures the line. By the first warp of a block.
KVPLAN_DEVICE void measure_line(const AttentionView& v, Round& round) {
  int chunks = 0, pages = 0;
  for (int i = lane(); i < v.batch.sequences; i += quant::kWarpLanes) {
    const Piece piece = piece_of(v, i);
    chunks += piece.chunks, pages += piece.pages();
  }
#pragma unroll
  for (int step = 1; step < quant::kWarpLanes; step *= 2) {
    chunks += shuffle_xor(chunks, step);
    pages += shuffle_xor(pages, step);
  }
  if (lane() == 0) {
    round.chunks = chunks, round.pages = pages;
    const std::uint32_t line = heads_length(v, round, v.layer.kv_heads);
    const Cut cut(line, static_cast<std::uint32_t>(v.decode_blocks));
    round.line = line;
    round.end = cut.begin(static_cast<std::uint32_t>(block()));  // of the round before
    round.block_end = cut.begin(static_cast<std::uint32_t>(block()) + 1);
  }
  sync_warp();
}

/// The head that holds a position of the line, or a later one when there is none such.
KVPLAN_DEVICE int head_at(const AttentionView& v, const Round& round, std::uint32_t position) {
  int head = 0;
#pragma unroll 1
  for (; head < v.layer.kv_heads; head += quant::kWarpLanes) {
    const int mine = head + lane() + 1;
    const std::uint32_t behind = ballot(
        heads_length(v, round, mine < v.layer.kv_heads ? mine : v.layer.kv_heads) > position);
    if (behind != 0) return head + first_bit(behind);
  }
  return head;
}

/// Finds the pieces of the next round, at most `most`, without what follows from their units; ->
/// how many. `end`: of the round.
KVPLAN_DEVICE int find_pieces(const AttentionView& v, Round& round, std::uint32_t begin,
                              std::uint32_t& end) {
  const std::uint32_t block_end = round.block_end;
  const int most = v.layer.shared.most_pieces;
  const int segments = v.batch.sequences * v.column_blocks;  // of a head
  const WorkCosts& costs = v.layer.costs;
  end = block_end;
  if (begin >= block_end) return 0;
  int count = 0, head = head_at(v, round, begin);
#pragma unroll 1
  for (; head < v.layer.kv_heads; ++head) {
    std::uint32_t start = heads_length(v, round, head);
    if (start >= block_end) break;
#pragma unroll 1
    for (int first = 0; first < segments && start < block_end; first += quant::kWarpLanes) {
      // A lane looks at a segment.
      const int s = first + lane();
      const int sequence = v.column_blocks == 1 ? s : s / v.column_blocks;
      Piece piece{};
      if (s < segments) piece = piece_of(v, sequence);
      piece.head = head;
      piece.column_block = s - sequence * v.column_blocks;
      piece.segment = (sequence * v.layer.kv_heads + head) * v.column_blocks + piece.column_block;
      const std::uint32_t length = s < segments ? segment_length(costs, piece) : 0;
      std::uint32_t until = length;
#pragma unroll
      for (int step = 1; step < quant::kWarpLanes; step *= 2) {
        const std::uint32_t before = shuffle(until, lane() - step);
        if (lane() >= step) until += before;
      }
      piece.start = start + until - length;
      bool mine = piece.start < block_end && piece.start + length > begin && piece.units() > 0;
      // Of a segment that began before, perhaps only the rest of its last unit.
      const bool goes_on = mine && piece.start < begin;
      if (any(goes_on))
        mine = mine && (!goes_on || units_before(costs, piece, begin) < piece.units());
      const std::uint32_t found = ballot(mine);
      const int index = count + std::popcount(found & ((1u << lane()) - 1));
      if (mine && index < most) round.pieces[index] = piece;
      count += std::popcount(found);
      if (count > most) {
        end = shuffle(piece.start, first_bit(ballot(mine && index == most)));
        return most;
      }
      start += shuffle(until, quant::kWarpLanes - 1);
    }
  }
  return count;
}

/// The next round of the block, without pieces behind the last. By the first warp of a block.
KVPLAN_DEVICE void next_round(const AttentionView& v, Round& round) {
  const std::uint32_t begin = round.end;
  std::uint32_t end;
  sync_warp();
  const int count = find_pieces(v, round, begin, end);
  sync_warp();
  // A lane completes a piece.
  std::uint32_t length = 0;
  if (lane() < count) {
    Piece& piece = round.pieces[lane()];
    const WorkCosts& costs = v.layer.costs;
    piece.begin = units_before(costs, piece, begin), piece.end = units_before(costs, piece, end);
    const int pages = piece.end_own_page() - piece.first_own_page();
    if (pages > 0)
      length = costs.start + costs.head(piece.head) * static_cast<std::uint32_t>(pages);
    const quant::HeadLayout& head = v.layer.heads[piece.head];
    const int phases = 16 * v.layer.phase_steps;  // of a page
    PageSource& source = round.sources[lane()];
    source.pages = v.layer.pool + head.block_offset;
    source.blocks =
        v.batch.page_table + std::int64_t{v.batch.slot[piece.sequence]} * v.batch.table_stride;
    source.phases = v.layer.page_phase;
    source.block_bytes = v.layer.block_bytes;
    source.key_bytes = key_tile_bytes(head);
    source.rest_bytes = head.page_bytes - source.key_bytes;
    source.phase_bytes = static_cast<std::uint32_t>(phases * static_cast<int>(sizeof(float2)));
  }
  std::uint32_t until = length;
#pragma unroll
  for (int step = 1; step < kMaxPieces; step *= 2) {
    const std::uint32_t before = shuffle(until, lane() - step);
    if (lane() >= step) until += before;
  }
  if (lane() < kMaxPieces) {
    round.page_start[lane()] = until - length;
    round.aside[lane()] = 0;
    round.finishes[lane()] = lane() < count && round.pieces[lane()].whole() ? 1 : 0;
    if (lane() == kMaxPieces - 1) round.page_line = until;
  }
  const bool shared = lane() < count && !round.pieces[lane()].whole();
  const bool all_whole = !any(shared);
  if (lane() == 0) {
    round.begin = begin, round.end = end;
    round.count = count;
    round.all_whole = all_whole ? 1 : 0;
    round.chunks_taken = 0;
    const int fit = kProductColumns / columns_in_use(v);
    int pass = -1, groups = 0, first = 0;
#pragma unroll 1
    for (int p = 0; p < count; ++p) {
      const int head = round.pieces[p].head;
      const bool other = p == 0 || head != round.pieces[first].head;
      if (other || p - first == fit) first = p, ++pass;
      if (other) round.group_begin[groups] = pass, round.group_head[groups++] = head;
      round.pass_of[p] = pass;
    }
    round.group_begin[groups] = pass + 1;
    round.groups = groups;
  }
#pragma unroll
  for (int i = 0; i < kMaxPieces * kProductColumns; i += quant::kWarpLanes)
    round.columns[0][i + lane()] = {-1, 0, -1};
  sync_warp();
  const int columns = columns_in_use(v);
#pragma unroll 1
  for (int i = lane(); i < count * kColumns; i += quant::kWarpLanes) {
    const int p = i / kColumns, column = i % kColumns, pass = round.pass_of[p];
    const Piece& piece = round.pieces[p];
    const int c = piece.column_block * kColumns + column, sequence = piece.sequence;
    const int token = c / v.queries_per_kv;
    const bool there =
        column < columns && token < v.batch.length[sequence] - v.batch.length_before[sequence];
    const int row = there
                        ? ((v.batch.first_row[sequence] + token) * v.layer.kv_heads + piece.head) *
                                  v.queries_per_kv +
                              c - token * v.queries_per_kv
                        : -1;
    round.rows[p][column] = row;
    round.most[p][column] = 0;
    int first = p;  // of the pass
    while (first > 0 && round.pass_of[first - 1] == pass) --first;
    if (column < columns) round.columns[pass][(p - first) * columns + column] = {p, column, row};
  }
}

/// What a warp does at a time of the products with the matrices: 16 rows of a head's matrix, with
/// the columns of all passes of the head.
struct MatrixTask {
  int first_pass, end_pass, tile, head;
  bool there;  // else the passes are none

  KVPLAN_DEVICE MatrixTask(const Round& round, int tiles, int index) {
    int group = 0;
#pragma unroll 1
    for (; index >= tiles && group < round.groups; ++group) index -= tiles;
    there = group < round.groups;
    if (!there) group = index = 0;
    tile = index;
    head = round.group_head[group];
    first_pass = round.group_begin[group];
    end_pass = there ? round.group_begin[group + 1] : first_pass;
  }
};

}  // namespace kvplan::kernels
