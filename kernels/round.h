#pragma once
// What a block of the decode kernel keeps in shared memory about its work. Private to kernels.

#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kMaxPieces = 8;  // of a round

/// Part slots of a block (AttentionView::part_state): of its piece that began in a block before, of
/// the one that goes on in the next, of whole segments, and of what a warp puts aside, the last two
/// by piece.
inline constexpr int kContinued = 0, kBegun = 1, kWhole = 2, kAside = kWhole + kMaxPieces;
static_assert(quant::kBlockParts == kAside + kMaxPieces);

/// What a block has of a segment. Units of a segment: first its chunks of fp16 tokens, then its
/// packed pages, one or two of them in a unit.
struct Piece {
  std::int32_t sequence, head, column_block, segment;
  std::int32_t chunks, page_units;
  std::int32_t first_page, end_page;  // that the segment reads
  std::int32_t begin, end;            // units
  std::uint32_t start;                // of the segment on the line (round.cuh)
  constexpr int units() const { return chunks + page_units; }
  constexpr bool whole() const { return begin == 0 && end == units(); }
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

/// The pieces that a block works on together.
struct Round {
  std::uint32_t line;               // length
  std::uint32_t begin, end;         // of the round on the line
  std::uint32_t block_end;          // of the block on the line
  std::int32_t chunks, page_units;  // of one segment of every sequence
  std::int32_t count;
  // Products of matrices serve a pass: pieces of one head whose columns fit.
  std::int32_t passes;
  std::int32_t pass_begin[kMaxPieces + 1];
  std::int32_t aside[kMaxPieces];           // whether a warp has put a part of the piece aside
  std::int32_t finishes[kMaxPieces];        // whether the block finishes the segment
  std::int32_t rows[kMaxPieces][kColumns];  // of q and out, counted in heads; -1: none
  Piece pieces[kMaxPieces];
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
  std::int32_t piece;  // -1: none
  std::int32_t sent;   // piece whose pages have been sent for; -1: none
  std::int32_t begin[kMaxPieces], end[kMaxPieces];  // units
};

/// Of a column while results are put together.
struct ResultColumn {
  float packed;   // factor of the merged packed output, which is relative to its own maximum
  float maximum;  // of all scores, log2 units
  float mass;     // sum over the packed tokens of 2^(score - maximum)
  float inverse;  // 1 / sum over all tokens
};

/// Layout of the shared memory that results are put together in: from SharedMap::feeds on, once all
/// copies have come.
struct ResultMemory {
  int stride, columns;  // floats of a row; rows of a piece
  int merged;           // float [pieces][columns][stride]
  int direct;           // the same, of channels outside the transform
  int most;             // float [pieces][8], largest |merged| of a row
  int terms;            // ResultColumn [pieces][8]
  int slots;            // uint16 [pieces][kMaxBlocks], part slots of a piece
  int counts;           // int32 [pieces] of them
  int bytes;

  constexpr ResultMemory(int head_dim, int columns_kept, int pieces)
      : stride((head_dim + 15) / 16 * 16 + 8),
        columns(columns_kept),
        merged(0),
        direct(4 * pieces * columns * stride),
        most(2 * direct),
        terms(most + 4 * kColumns * pieces),
        slots(terms + 16 * kColumns * pieces),
        counts(slots + 2 * kMaxBlocks * pieces),
        bytes(counts + 4 * pieces) {}
};
static_assert(sizeof(ResultColumn) == 16);

}  // namespace kvplan::kernels
