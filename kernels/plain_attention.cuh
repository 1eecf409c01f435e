#pragma once
// Attention of one segment over its fp16 tokens: sinks and the open page. Private to the decode
// kernel.

#include "kernels/packed_attention.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

// Tiles of 16 channels whose rows are loaded together: these tokens are read cold and by one warp,
// so every round trip to memory counts.
inline constexpr int kLoadedTiles = 2;

// Rows of fp16 vectors, tokens of one KV head.
struct Rows {
  const std::uint16_t* k = nullptr;
  const std::uint16_t* v = nullptr;
  std::int64_t first = 0;  // position of row 0
  int count = 0;           // 1..64
};

KVPLAN_DEVICE std::uint32_t row_pair(const std::uint16_t* x, int row, int rows, int channel,
                                     int head_dim) {
  return row < rows && channel < head_dim
             ? *reinterpret_cast<const std::uint32_t*>(x + std::int64_t{row} * head_dim + channel)
             : 0;
}

template <int Blocks>
KVPLAN_DEVICE void attend_rows(const AttentionView& v, const Work<Blocks>& work, Running<Blocks>& r,
                               const Rows& rows) {
  const int g = lane() >> 2, t = lane() & 3, d = v.layer.head_dim;
  HalfSums<1> sums = {};
  const uint2* query = v.plain_query + std::int64_t{work.segment} * v.plain_tiles * kLanes + lane();
#pragma unroll 1
  for (int first = 0; first < v.plain_tiles; first += kLoadedTiles) {
    uint2 q[kLoadedTiles];
    std::uint32_t a[kLoadedTiles][kRows][4];
#pragma unroll
    for (int u = 0; u < kLoadedTiles; ++u) {
      const int j = first + u;
      q[u] = j < v.plain_tiles ? query[j * kLanes] : uint2{0, 0};
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          a[u][i][k] = row_pair(rows.k, 16 * i + g + 8 * (k & 1), rows.count,
                                16 * j + 2 * t + 8 * (k >> 1), d);
    }
#pragma unroll
    for (int u = 0; u < kLoadedTiles; ++u)
#pragma unroll
      for (int i = 0; i < kRows; ++i) mma(sums[0][i], a[u][i], q[u].x, q[u].y);
  }
  Scores<1, Blocks> s;
  for_scores<1, Blocks>([&](int n, int i, int h, int e) { s[n][i][h][e] = sums[n][i][2 * h + e]; });
  if (v.soft_cap > 0) cap<1, Blocks>(s, v.soft_cap);
  mask<1, Blocks>(s, v, work, static_cast<int>(rows.first), rows.count);
  follow_maximum<1, Blocks>(r, s, false, [&](const float(&factor)[Blocks]) {
    scale_output<Blocks>(work, v.plain_tiles, factor);
  });
  exponentiate<1, Blocks>(s, r);
  HalfWeights<1> p;
  make_half_weights<1, Blocks>(p, s);
#pragma unroll 1
  for (int first = 0; first < v.plain_tiles; first += kLoadedTiles) {
    std::uint32_t loaded[kLoadedTiles][kRows][4];  // tokens x channels
#pragma unroll
    for (int u = 0; u < kLoadedTiles; ++u)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          loaded[u][i][k] = row_pair(rows.v, 16 * i + g + 8 * (k >> 1), rows.count,
                                     16 * (first + u) + 2 * t + 8 * (k & 1), d);
#pragma unroll
    for (int u = 0; u < kLoadedTiles; ++u) {
      if (first + u >= v.plain_tiles) break;
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        std::uint32_t a[4];  // channels x tokens
#pragma unroll
        for (int k = 0; k < 4; ++k) a[k] = transpose8x8(loaded[u][i][k]);
        mma(sum, a, p[0][i][0], p[0][i][1]);
      }
      Output<Blocks>& o = work.output[(first + u) * kLanes + lane()];
#pragma unroll
      for (int k = 0; k < 2 * Blocks; ++k) o.x[k] += sum[2 * (k % 2) + k / 2];
    }
  }
}

// Sends for rows before they are waited for.
KVPLAN_DEVICE void prefetch_rows(const std::uint16_t* rows, int count, int head_dim) {
  constexpr int kLine = 64;  // numbers
  for (int i = lane() * kLine; i < count * head_dim; i += kLanes * kLine) prefetch(rows + i);
}

// The fp16 tokens of a segment: sinks and open page.
template <int Blocks>
KVPLAN_DEVICE void attend_plain(const AttentionView& v, const Work<Blocks>& work) {
  const LayerView& layer = v.layer;
  const int slot = v.batch.slot[work.sequence], length = v.batch.length[work.sequence];
  const int d = layer.head_dim;
  clear_output(work, v.plain_tiles);
  Running<Blocks> r;
  // Rows of (slot, side, head) in a buffer with `tokens` rows each.
  const auto rows_of = [&](const std::uint16_t* buffer, int side, int tokens) {
    return buffer + ((std::int64_t{slot} * 2 + side) * layer.kv_heads + work.head) *
                        (std::int64_t{tokens} * d);
  };
  const int sinks = length < layer.sink_tokens ? length : layer.sink_tokens;
  const int packed = full_pages(length, layer.sink_tokens) * quant::kPageTokens;
  const int open = length - layer.sink_tokens - packed;
  for (const int side : {0, 1}) {
    prefetch_rows(rows_of(layer.sinks, side, layer.sink_tokens), sinks, d);
    prefetch_rows(rows_of(layer.open, side, kOpenTokens), open, d);
  }
  for (int first = 0; first < sinks; first += kOpenTokens) {
    const int count = sinks - first < kOpenTokens ? sinks - first : kOpenTokens;
    const std::int64_t skipped = std::int64_t{first} * d;
    attend_rows<Blocks>(v, work, r,
                        {rows_of(layer.sinks, 0, layer.sink_tokens) + skipped,
                         rows_of(layer.sinks, 1, layer.sink_tokens) + skipped, first, count});
  }
  if (open > 0)
    attend_rows<Blocks>(v, work, r,
                        {rows_of(layer.open, 0, kOpenTokens), rows_of(layer.open, 1, kOpenTokens),
                         layer.sink_tokens + packed, open});
  reduce_masses(r);
  store_state(v.plain_state + std::int64_t{work.segment} * kColumns, r);
  float4* to = v.plain_output + std::int64_t{work.segment} * v.plain_tiles * kLanes + lane();
  for (int j = 0; j < v.plain_tiles; ++j) to[j * kLanes] = stored(work.output[j * kLanes + lane()]);
}

}  // namespace kvplan::kernels
