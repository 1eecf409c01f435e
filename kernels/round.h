#pragma once
// What a block of the decode kernel keeps in shared memory about its work. Private to kernels.

#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kMaxPieces = 8;        // of a round
inline constexpr int kProductColumns = 16;  // of a product with a matrix (transform.cuh)

/// Part slots of a block (AttentionView::part_state): of its piece that began in a block before, of
/// the one that goes on in the next, and of what a warp puts aside, by piece.
inline constexpr int kContinued = 0, kBegun = 1, kAside = 2;
static_assert(quant::kBlockParts == kAside + kMaxPieces);

/// What a block has of a segment. Units of a segment: first all of its fp16 tokens, if there are
/// any, then its packed pages.
struct Piece {
  std::int32_t sequence, head, column_block, segment;
  std::int32_t chunks;                // of fp16 tokens
  std::int32_t first_page, end_page;  // that the segment reads
  std::int32_t begin, end;            // units
  std::uint32_t start;                // of the segment on the line (round.cuh)
  constexpr int plain_units() const { return chunks > 0 ? 1 : 0; }
  constexpr int pages() const { return end_page - first_page; }
  constexpr int units() const { return plain_units() + pages(); }
  constexpr bool whole() const { return begin == 0 && end == units(); }
  /// Whether the segment's fp16 tokens are this block's.
  constexpr bool has_plain() const { return begin == 0 && chunks > 0; }
  /// Pages of the piece.
  constexpr int first_own_page() const {
    return first_page + (begin > plain_units() ? begin - plain_units() : 0);
  }
  constexpr int end_own_page() const { return first_page + end - plain_units(); }
};

/// Where the packed pages of a piece lie.
struct PageSource {
  const std::byte* pages;      // of the KV head, in block 0
  const std::int32_t* blocks;  // block numbers of the sequence's pages
  const float2* phases;        // LayerView::page_phase
  std::uint32_t block_bytes;
  std::uint32_t key_bytes, rest_bytes;  // tiles of keys; what follows
  std::uint32_t phase_bytes;            // of a page; 0: not centred
};

/// Equal stretches of a line.
struct Cut {
  std::uint32_t each, longer;  // length; how many are longer by one
  constexpr Cut(std::uint32_t length, std::uint32_t stretches)
      : each(length / stretches), longer(length % stretches) {}
  constexpr std::uint32_t begin(std::uint32_t stretch) const {
    return each * stretch + (stretch < longer ? stretch : longer);
  }
  /// Which stretch holds a position.
  constexpr std::uint32_t holder(std::uint32_t position) const {
    const std::uint32_t by_longer = (each + 1) * longer;
    return position < by_longer ? position / (each + 1) : longer + (position - by_longer) / each;
  }
};

/// A column of the products of a pass.
struct PassColumn {
  std::int32_t piece, column;  // piece -1: none
  std::int32_t row;            // of q and out, counted in heads; -1: none
};

/// The pieces that a block works on together.
struct Round {
  std::uint32_t line;          // length
  std::uint32_t begin, end;    // of the round on the line
  std::uint32_t block_end;     // of the block on the line
  std::int32_t chunks, pages;  // of one segment of every sequence
  std::int32_t count;
  std::int32_t all_whole;  // whether every piece is
  // The pages alone lie on a line that is cut for the warps.
  std::uint32_t page_line;
  std::uint32_t page_start[kMaxPieces];
  std::int32_t chunks_taken;  // of the pieces' fp16 tokens, by warps that have no pages left
  // Products of matrices serve a pass: pieces of one head whose columns fit. It has their columns
  // one after the other.
  std::int32_t pass_of[kMaxPieces];
  PassColumn columns[kMaxPieces][kProductColumns];
  std::int32_t groups;                       // of passes of one head
  std::int32_t group_begin[kMaxPieces + 1];  // passes
  std::int32_t group_head[kMaxPieces];
  std::int32_t aside[kMaxPieces];           // whether a warp has put a part of the piece aside
  std::int32_t finishes[kMaxPieces];        // whether the block finishes the segment
  std::int32_t rows[kMaxPieces][kColumns];  // of q and out, counted in heads; -1: none
  float most[kMaxPieces][kColumns];         // the largest |merged| of a column
  Piece pieces[kMaxPieces];
  PageSource sources[kMaxPieces];
};

/// Of a column of a piece.
struct ColumnTerms {
  float bias;  // added to scores of packed pages before the norm: sum over kBytes coordinates of
               // q' * step * byte_offset
  float unit;  // of the digits of q'
  float constant;  // q . mean over the channels without rotary embedding, log2 units (centred)
};

/// A warp's share of a round, and what it has found of its last piece, beside its outputs.
struct WarpState {
  float2 state[kColumns];
  std::int32_t piece;                               // -1: none
  std::int32_t begin[kMaxPieces], end[kMaxPieces];  // pages
};

/// Of a column while results are put together.
struct ResultColumn {
  float packed;   // factor of the merged packed output, which is relative to its own maximum
  float plain;    // the same of the fp16 tokens
  float mass;     // sum over the packed tokens of 2^(score - maximum of all)
  float inverse;  // 1 / sum over all tokens
};

/// Layout of the shared memory that results are put together in: from SharedMap::feeds on, once all
/// copies have come.
struct ResultMemory {
  int stride, columns;  // floats of a row; rows of a piece
  int merged;           // float [pieces][columns][stride]
  int plain;            // the same, of fp16 tokens
  int direct;           // the same, of channels outside the transform; only where there are such
  int states;           // float2 [pieces][8] of merged
  int terms;            // ResultColumn [pieces][8]
  int slots;            // uint16 [pieces][kMaxBlocks], part slots of a piece
  int counts;           // int32 [pieces] of them
  int bytes;

  constexpr ResultMemory(int head_dim, int columns_kept, int pieces, bool with_direct)
      : stride((head_dim + 15) / 16 * 16 + 8),
        columns(columns_kept),
        merged(0),
        plain(4 * pieces * columns * stride),
        direct(2 * plain),
        states((with_direct ? 3 : 2) * plain),
        terms(states + 8 * kColumns * pieces),
        slots(terms + 16 * kColumns * pieces),
        counts(slots + 2 * kMaxBlocks * pieces),
        bytes(counts + 4 * pieces) {}
};
static_assert(sizeof(ResultColumn) == 16);

}  // namespace kvplan::kernels
