#pragma once
// Which block works on what. Every segment offers units of work: its chunks of fp16 tokens and its
// packed pages (round.h). All units are laid end to end, KV head after KV head, within a head
// segment after segment, each as long as the work on it takes, and the line is cut into equal
// stretches: a block owns the units that start in its stretch. It takes its stretch in rounds of at
// most kMaxPieces segments, within which the line is cut again for the warps. Private to the decode
// kernels.

#include <bit>

#include "kernels/ptx.cuh"
#include "kernels/round.h"
#include "kernels/transform.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

/// Length of a segment on the line. Its first unit is longer: a warp that comes to a segment has to
/// begin anew.
KVPLAN_DEVICE std::uint32_t segment_length(const WorkCosts& costs, const Piece& piece) {
  return costs.start + costs.chunk * static_cast<std::uint32_t>(piece.chunks) +
         costs.head[piece.head] * static_cast<std::uint32_t>(piece.page_units);
}

/// Units of a segment that start before a position of the line.
KVPLAN_DEVICE int units_before(const WorkCosts& costs, const Piece& piece, std::uint32_t position) {
  if (position <= piece.start || piece.units() == 0) return 0;
  std::uint32_t distance = position - piece.start;
  if (distance <= costs.start) return 1;
  distance -= costs.start;
  const std::uint32_t chunk = costs.chunk, page = costs.head[piece.head];
  const auto chunks = static_cast<std::uint32_t>(piece.chunks),
             pages = static_cast<std::uint32_t>(piece.page_units);
  const std::uint32_t in_chunks = chunk * chunks;
  const bool behind = distance > in_chunks;
  if (behind && distance - in_chunks >= page * pages) return static_cast<int>(chunks + pages);
  const std::uint32_t unit = behind ? page : chunk;
  const std::uint32_t units = ((behind ? distance - in_chunks : distance) + unit - 1) / unit;
  return static_cast<int>(behind ? chunks + units : units);
}

/// The piece of a sequence, without its place on the line.
template <int Pages>
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
  piece.page_units = (piece.end_page - piece.first_page + Pages - 1) / Pages;
  return piece;
}

/// Measures the line. By the first warp of a block.
template <int Pages>
KVPLAN_DEVICE void measure_line(const AttentionView& v, Round& round) {
  int chunks = 0, page_units = 0;
  for (int i = lane(); i < v.batch.sequences; i += quant::kWarpLanes) {
    const Piece piece = piece_of<Pages>(v, i);
    chunks += piece.chunks, page_units += piece.page_units;
  }
  for (int step = 1; step < quant::kWarpLanes; step *= 2) {
    chunks += shuffle_xor(chunks, step);
    page_units += shuffle_xor(page_units, step);
  }
  const WorkCosts& costs = v.layer.costs;
  const auto heads = static_cast<std::uint32_t>(v.layer.kv_heads),
             sequences = static_cast<std::uint32_t>(v.batch.sequences);
  const std::uint32_t of_head =
      costs.start * sequences + costs.chunk * static_cast<std::uint32_t>(chunks);
  const std::uint32_t line =
      (static_cast<std::uint32_t>(page_units) * costs.all + of_head * heads) *
      static_cast<std::uint32_t>(v.column_blocks);
  const Cut cut(line, static_cast<std::uint32_t>(v.decode_blocks));
  if (lane() == 0) {
    round.chunks = chunks, round.page_units = page_units;
    round.line = line;
    round.end = cut.begin(static_cast<std::uint32_t>(block()));  // of the round before
    round.block_end = cut.begin(static_cast<std::uint32_t>(block()) + 1);
  }
  sync_warp();
}

/// The next round of the block, without pieces behind the last. By the first warp of a block.
template <int Pages>
KVPLAN_DEVICE void next_round(const AttentionView& v, Round& round) {
  const std::uint32_t begin = round.end, block_end = round.block_end;
  const int most = v.layer.shared.most_pieces;
  const int segments = v.batch.sequences * v.column_blocks;  // of a head
  const WorkCosts& costs = v.layer.costs;
  std::uint32_t end = block_end, head_start = 0;
  int count = 0;
  sync_warp();
#pragma unroll 1
  for (int head = 0; head < v.layer.kv_heads && end == block_end && head_start < end; ++head) {
    std::uint32_t start = head_start;
    head_start += (costs.head[head] * static_cast<std::uint32_t>(round.page_units) +
                   costs.chunk * static_cast<std::uint32_t>(round.chunks) +
                   costs.start * static_cast<std::uint32_t>(v.batch.sequences)) *
                  static_cast<std::uint32_t>(v.column_blocks);
    if (head_start <= begin) continue;
#pragma unroll 1
    for (int first = 0; first < segments && end == block_end && start < end;
         first += quant::kWarpLanes) {
      // A lane looks at a segment.
      const int s = first + lane();
      const int sequence = v.column_blocks == 1 ? s : s / v.column_blocks;
      Piece piece{};
      if (s < segments) piece = piece_of<Pages>(v, sequence);
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
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        const int units = units_before(costs, piece, i == 0 ? begin : block_end);
        (i == 0 ? piece.begin : piece.end) = units;
      }
      const bool mine = piece.begin < piece.end;
      const std::uint32_t found = ballot(mine);
      const int index = count + std::popcount(found & ((1u << lane()) - 1));
      if (mine && index < most) round.pieces[index] = piece;
      count += std::popcount(found);
      if (count > most) {
        end = shuffle(piece.start, first_bit(ballot(mine && index == most)));
        count = most;
      }
      start += shuffle(until, quant::kWarpLanes - 1);
    }
  }
  sync_warp();
  for (int i = lane(); i < count * kColumns; i += quant::kWarpLanes) {
    const Piece& piece = round.pieces[i / kColumns];
    const int c = piece.column_block * kColumns + i % kColumns;
    const int token = c / v.queries_per_kv, sequence = piece.sequence;
    const bool there = i % kColumns < columns_in_use(v) &&
                       token < v.batch.length[sequence] - v.batch.length_before[sequence];
    round.rows[i / kColumns][i % kColumns] =
        there ? (v.batch.first_row[sequence] + token) * v.layer.kv_heads * v.queries_per_kv +
                    piece.head * v.queries_per_kv + c - token * v.queries_per_kv
              : -1;
  }
  if (lane() == 0) {
    round.begin = begin, round.end = end;
    round.count = count;
    const int fit = kProductColumns / columns_in_use(v);
    int passes = 0, first = 0;
    for (int p = 0; p < count; ++p) {
      round.aside[p] = 0;
      if (p == 0 || p - first == fit || round.pieces[p].head != round.pieces[first].head)
        round.pass_begin[passes++] = first = p;
    }
    round.pass_begin[passes] = count;
    round.passes = passes;
  }
}

/// Column c of the products of a pass, which has those of its pieces one after the other.
struct PassColumn {
  int piece, column;  // piece -1: none
  std::int32_t row;   // of q and out; -1: none
  KVPLAN_DEVICE PassColumn(const AttentionView& v, const Round& round, int pass, int c) {
    const int columns = columns_in_use(v), index = c / columns;
    piece = round.pass_begin[pass] + index, column = c - index * columns;
    if (piece >= round.pass_begin[pass + 1]) piece = -1;
    row = piece < 0 ? -1 : round.rows[piece][column];
  }
};

/// Calls visit(pass, tile) for the tiles of 16 rows of all passes that are this warp's to do.
template <class Visit>
KVPLAN_DEVICE void for_pass_tiles(const Round& round, int tiles, int warps, Visit visit) {
  int tile = warp();
#pragma unroll 1
  for (int pass = 0; pass < round.passes; ++pass) {
#pragma unroll 1
    for (; tile < tiles; tile += warps) visit(pass, tile);
    tile -= tiles;
  }
}

}  // namespace kvplan::kernels
