#pragma once
// Attention of a piece over its fp16 tokens, the sinks and the open page, 16 tokens at a time, by
// whichever warp has no pages left.
// These tokens are read cold, so what counts is the number of round trips to memory: the reads of a
// chunk's keys and values are on the way together. Private to the decode kernels.

#include "kernels/ptx.cuh"
#include "kernels/round.cuh"
#include "kernels/scores.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kChunk = quant::kPlainChunk;
inline constexpr int kLoadedSpans = 4;  // on the way together

/// Channels 8 t .. 8 t + 7 of a span of a row; zeros where there are none.
KVPLAN_DEVICE uint4 row_part(const std::uint16_t* row, int span, int head_dim, const Place& me) {
  const int channel = kSpan * span + 8 * me.t;
  return row != nullptr && channel < head_dim ? *reinterpret_cast<const uint4*>(row + channel)
                                              : uint4{0, 0, 0, 0};
}
/// Pairs 2 u and 2 u + 1 of a part.
KVPLAN_DEVICE uint2 pairs(const uint4& x, int u) {
  return u == 0 ? uint2{x.x, x.y} : uint2{x.z, x.w};
}

/// The fp16 tokens of a piece, and its queries in place.
template <int Blocks>
struct PlainTokens {
  const std::uint16_t *sinks[2], *open[2];  // keys, values of the KV head
  int sink_tokens, tokens;                  // sinks that there are; all
  int first_open;                           // position of the open page's first row
  const std::uint16_t* query;               // of matrix column g; null: not used
  int last[Blocks];                         // position of the query of column t + 4e

  KVPLAN_DEVICE PlainTokens(const AttentionView& v, const Round& round, int p, const Place& me) {
    const Piece& piece = round.pieces[p];
    const LayerView& layer = v.layer;
    const int slot = v.batch.slot[piece.sequence], length = v.batch.length[piece.sequence];
    const int d = layer.head_dim, packed = piece.end_page * quant::kPageTokens;
    tokens = length - packed;
    sink_tokens = tokens < layer.sink_tokens ? tokens : layer.sink_tokens;
    first_open = layer.sink_tokens + packed;
    for (int side = 0; side < 2; ++side) {
      const std::int64_t row = (std::int64_t{slot} * 2 + side) * layer.kv_heads + piece.head;
      sinks[side] = layer.sinks + row * layer.sink_tokens * d;
      open[side] = layer.open + row * kOpenTokens * d;
    }
    const int query_row = round.rows[p][me.lane / 8 + 4 * (me.g % 2)];
    query = query_row >= 0 ? v.q + std::int64_t{query_row} * d : nullptr;
    for (int e = 0; e < Blocks; ++e)
      last[e] = v.batch.length_before[piece.sequence] +
                (piece.column_block * kColumns + me.t + 4 * e) / v.queries_per_kv;
  }
  KVPLAN_DEVICE const std::uint16_t* row(int side, int token, int head_dim) const {
    if (token >= tokens) return nullptr;
    return token < sink_tokens ? sinks[side] + token * head_dim
                               : open[side] + (token - sink_tokens) * head_dim;
  }
  KVPLAN_DEVICE int position(int token) const {
    return token < sink_tokens ? token : first_open + token - sink_tokens;
  }
};

/// Brings the fp16 rows of the pieces closer, long before they are read.
KVPLAN_DEVICE void prefetch_plain(const AttentionView& v, const Round& round) {
  constexpr int kLine = 128;
  const int row_bytes = 2 * v.layer.head_dim;
#pragma unroll 1
  for (int p = 0; p < round.count; ++p) {
    const Piece& piece = round.pieces[p];
    if (!piece.has_plain()) continue;
    const int slot = v.batch.slot[piece.sequence];
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const std::int64_t row = (std::int64_t{slot} * 2 + side) * v.layer.kv_heads + piece.head;
      const auto* const open =
          reinterpret_cast<const std::byte*>(v.layer.open) + row * (kOpenTokens * row_bytes);
      const auto* const sinks = reinterpret_cast<const std::byte*>(v.layer.sinks) +
                                row * (v.layer.sink_tokens * row_bytes);
      const int sink_bytes = v.layer.sink_tokens * row_bytes;
      const int some = kChunk * piece.chunks * row_bytes,
                all = sink_bytes + kOpenTokens * row_bytes;
      const int bytes = some < all ? some : all;
      for (int at = kLine * thread(); at < bytes; at += kLine * threads())
        prefetch(at < sink_bytes ? sinks + at : open + (at - sink_bytes));
    }
  }
}

/// Chunk `chunk` of piece p, to memory. A warp does it.
template <int Blocks>
KVPLAN_DEVICE void attend_chunk(const AttentionView& v, const Round& round, int p, int chunk) {
  const Place me;
  const PlainTokens<Blocks> plain(v, round, p, me);
  const int g = me.g, t = me.t;
  const int d = v.layer.head_dim, spans = (d + kSpan - 1) / kSpan;
  const int tokens[2] = {kChunk * chunk + g, kChunk * chunk + g + 8};
  const std::uint16_t* rows[2][2];  // [side][half of the chunk]
#pragma unroll
  for (int side = 0; side < 2; ++side)
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[side][h] = plain.row(side, tokens[h], d);
  float sums[4] = {};
  uint4 values[kLoadedSpans][2];
  const auto load_rows = [&](uint4(&to)[kLoadedSpans][2], int side, int span) {
#pragma unroll
    for (int c = 0; c < kLoadedSpans; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) to[c][h] = row_part(rows[side][h], span + c, d, me);
  };
  uint4 keys[kLoadedSpans][2], q[kLoadedSpans];
  const auto load_keys = [&](int span) {
    load_rows(keys, 0, span);
#pragma unroll
    for (int c = 0; c < kLoadedSpans; ++c) q[c] = row_part(plain.query, span + c, d, me);
  };
  load_keys(0);
  load_rows(values, 1, 0);
#pragma unroll 1
  for (int span = 0; span < spans; span += kLoadedSpans) {
    if (span > 0) load_keys(span);
#pragma unroll
    for (int c = 0; c < kLoadedSpans; ++c)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint2 low = pairs(keys[c][0], u), high = pairs(keys[c][1], u), b = pairs(q[c], u);
        const std::uint32_t a[4] = {low.x, high.x, low.y, high.y};
        mma(sums, a, b.x, b.y);
      }
  }
  // sums[2 h + e]: token g + 8 h, column t + 4 e.
  const float scale = v.scale * kLog2e;
  Running<Blocks> r;
#pragma unroll
  for (int e = 0; e < Blocks; ++e) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& s = sums[2 * h + e];
      s *= scale;
      if (v.soft_cap > 0) {
        const float cap = v.soft_cap * kLog2e, slope = 2 * kLog2e * reciprocal_fast(cap);
        s = cap - 2 * cap * reciprocal_fast(exp2_fast(s * slope) + 1);
      }
      const int position = plain.position(tokens[h]);
      if (tokens[h] >= plain.tokens || position > plain.last[e] ||
          (v.window > 0 && position <= plain.last[e] - v.window))
        s = -INFINITY;
      r.m[e] = fmaxf(r.m[e], s);
    }
#pragma unroll
    for (int step = 4; step < quant::kWarpLanes; step *= 2)
      r.m[e] = fmaxf(r.m[e], shuffle_xor(r.m[e], step));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sums[2 * h + e] = exp2_fast(sums[2 * h + e] - r.m[e]);
      r.l[e] += sums[2 * h + e];
    }
  }
  reduce_masses(r);
  const std::int64_t at = std::int64_t{round.pieces[p].segment} * v.plain_chunks + chunk;
  store_state(v.plain_state + at * kColumns, r);
  const std::uint32_t weights[2] = {
      transpose8x8(pack_halves(sums[0], Blocks == 2 ? sums[1] : 0.0f)),
      transpose8x8(pack_halves(sums[2], Blocks == 2 ? sums[3] : 0.0f))};
  float* const to = v.plain_output + at * (4 * Blocks) * d;
#pragma unroll 1
  for (int span = 0; span < spans; span += kLoadedSpans) {
    if (span > 0) load_rows(values, 1, span);
#pragma unroll
    for (int c = 0; c < kLoadedSpans; ++c) {
      if (span + c >= spans) break;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint2 low = pairs(values[c][0], u), high = pairs(values[c][1], u);
        // Channels x tokens: plain_channel.
        const std::uint32_t a[4] = {transpose8x8(low.x), transpose8x8(low.y), transpose8x8(high.x),
                                    transpose8x8(high.y)};
        float sum[4] = {};
        mma(sum, a, weights[0], weights[1]);
        const int tile = 2 * (span + c) + u;
#pragma unroll
        for (int e = 0; e < Blocks; ++e)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int channel = plain_channel(tile, g + 8 * h);
            if (channel < d) to[(t + 4 * e) * d + channel] = sum[2 * h + e];
          }
      }
    }
  }
}

/// Takes chunks of the round's fp16 tokens until there are none left. A warp at a time takes one;
/// which one makes no difference.
template <int Blocks>
KVPLAN_DEVICE void attend_plain(const AttentionView& v, Round& round) {
  while (true) {
    int chunk = 0;
    if (lane() == 0) chunk = add_atomic(round.chunks_taken, 1);
    chunk = shuffle(chunk, 0);
    int p = 0;
    for (; p < round.count; ++p) {
      const Piece& piece = round.pieces[p];
      const int chunks = piece.has_plain() ? piece.chunks : 0;
      if (chunk < chunks) break;
      chunk -= chunks;
    }
    if (p == round.count) return;
    attend_chunk<Blocks>(v, round, p, chunk);
  }
}

}  // namespace kvplan::kernels
