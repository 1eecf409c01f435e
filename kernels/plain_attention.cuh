#pragma once
// Attention of a segment over its fp16 tokens, the sinks and the open page, by a block of
// `prepare`. These tokens are read cold, so what counts is the number of round trips to memory: a
// warp takes 16 tokens, with the reads of their keys and values on the way together.

#include "kernels/ptx.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kChunk = 16;       // tokens
inline constexpr int kLoadedSpans = 4;  // on the way together

/// Columns t, t + 4 of the segment (e = 0, 1) in a lane 4g+t; scores in units of log2.
struct PlainState {
  float m[2] = {kLowest, kLowest}, l[2] = {0, 0};
};

/// 16 tokens of one KV head.
struct PlainRows {
  const std::uint16_t *k, *v;
  int first;  // position of row 0
  int count;  // 1..16
};

/// A segment's queries, in place.
struct PlainQuery {
  const std::uint16_t* row;  // [head_dim] of column g / 2 + 4 (g % 2); null: not used
  int last[2];               // position of the query of columns t and t + 4
};

/// A block's shared memory: outputs [warps][plain_tiles][32] float4, states [warps][8] float2.
struct PlainWorkspace {
  float4* outputs;
  float2* states;
  KVPLAN_DEVICE PlainWorkspace(int warps, int tiles) {
    outputs = reinterpret_cast<float4*>(shared_memory());
    states = reinterpret_cast<float2*>(outputs + warps * tiles * quant::kWarpLanes);
  }
};
constexpr std::size_t plain_shared_bytes(int warps, int tiles) {
  return static_cast<std::size_t>(warps) *
         (static_cast<std::size_t>(tiles) * quant::kWarpLanes * sizeof(float4) +
          kColumns * sizeof(float2));
}

/// Channels 8 t .. 8 t + 7 of a span of a row; zeros where there are none.
KVPLAN_DEVICE uint4 row_part(const std::uint16_t* row, bool used, int span, int head_dim) {
  const int channel = kSpan * span + 8 * (lane() & 3);
  return used && channel < head_dim ? *reinterpret_cast<const uint4*>(row + channel)
                                    : uint4{0, 0, 0, 0};
}
/// Pairs 2 u and 2 u + 1 of a part.
KVPLAN_DEVICE uint2 pairs(const uint4& x, int u) {
  return u == 0 ? uint2{x.x, x.y} : uint2{x.z, x.w};
}

/// Adds 16 tokens to the warp's state and outputs.
KVPLAN_DEVICE void attend_chunk(const AttentionView& v, const PlainQuery& query,
                                const PlainRows& rows, PlainState& state, float4* output,
                                bool first) {
  const int g = lane() >> 2, d = v.layer.head_dim, spans = v.plain_tiles / 2;
  const bool used[2] = {g < rows.count, g + 8 < rows.count};
  float sums[4] = {};
  uint4 values[kLoadedSpans][2];
  const auto load_rows = [&](uint4(&to)[kLoadedSpans][2], const std::uint16_t* x, int span) {
#pragma unroll
    for (int c = 0; c < kLoadedSpans; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) to[c][h] = row_part(x + (g + 8 * h) * d, used[h], span + c, d);
  };
#pragma unroll 1
  for (int span = 0; span < spans; span += kLoadedSpans) {
    uint4 keys[kLoadedSpans][2], q[kLoadedSpans];
    load_rows(keys, rows.k, span);
#pragma unroll
    for (int c = 0; c < kLoadedSpans; ++c)
      q[c] = row_part(query.row, query.row != nullptr, span + c, d);
    if (span == 0) load_rows(values, rows.v, 0);
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
  float top[2], factor[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& s = sums[2 * h + e];
      s *= scale;
      const int position = rows.first + g + 8 * h;
      if (v.soft_cap > 0) {
        const float cap = v.soft_cap * kLog2e;
        s = cap - 2 * cap / (exp2_fast(s * (2 * kLog2e / cap)) + 1);
      }
      if (!used[h] || position > query.last[e] ||
          (v.window > 0 && position <= query.last[e] - v.window))
        s = -INFINITY;
    }
    top[e] = fmaxf(state.m[e], fmaxf(sums[e], sums[2 + e]));
#pragma unroll
    for (int step = 4; step < quant::kWarpLanes; step *= 2)
      top[e] = fmaxf(top[e], shuffle_xor(top[e], step));
    factor[e] = exp2_fast(state.m[e] - top[e]);
    state.m[e] = top[e];
    float mass = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sums[2 * h + e] = exp2_fast(sums[2 * h + e] - top[e]);
      mass += sums[2 * h + e];
    }
    state.l[e] = fused(state.l[e], factor[e], mass);
  }
  const std::uint32_t p[2] = {transpose8x8(pack_halves(sums[0], sums[1])),
                              transpose8x8(pack_halves(sums[2], sums[3]))};
#pragma unroll 1
  for (int span = 0; span < spans; span += kLoadedSpans) {
    if (span > 0) load_rows(values, rows.v, span);
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
        mma(sum, a, p[0], p[1]);
        float4& o = output[(2 * (span + c) + u) * quant::kWarpLanes + lane()];
        const float4 before = first ? float4{0, 0, 0, 0} : o;
        o = {fused(before.x, factor[0], sum[0]), fused(before.y, factor[0], sum[2]),
             fused(before.z, factor[1], sum[1]), fused(before.w, factor[1], sum[3])};
      }
    }
  }
}

/// plain_state and plain_output of a segment, by a block of `Warps` warps.
template <int Warps>
KVPLAN_DEVICE void attend_plain(const AttentionView& v, int sequence, int head, int column_block) {
  const LayerView& layer = v.layer;
  const PlainWorkspace w(Warps, v.plain_tiles);
  const int slot = v.batch.slot[sequence], length = v.batch.length[sequence],
            before = v.batch.length_before[sequence], d = layer.head_dim;
  const int sinks = length < layer.sink_tokens ? length : layer.sink_tokens;
  const int packed = full_pages(length, layer.sink_tokens) * quant::kPageTokens;
  const int open = length > layer.sink_tokens ? length - layer.sink_tokens - packed : 0;
  const int sink_chunks = (sinks + kChunk - 1) / kChunk,
            chunks = sink_chunks + (open + kChunk - 1) / kChunk;

  const auto column = [&](int c) { return column_block * kColumns + c; };
  PlainQuery query;
  for (int e = 0; e < 2; ++e)
    query.last[e] = before + column((lane() & 3) + 4 * e) / v.queries_per_kv;
  const int own = column(lane() / 8 + 4 * (lane() / 4 % 2)), token = own / v.queries_per_kv;
  const std::int64_t row =
      (std::int64_t{v.batch.first_row[sequence]} + token) * layer.kv_heads * v.queries_per_kv +
      head * v.queries_per_kv + own % v.queries_per_kv;
  query.row = token < length - before ? v.q + row * d : nullptr;

  const auto rows_of = [&](const std::uint16_t* buffer, int side, int tokens) {
    return buffer +
           ((std::int64_t{slot} * 2 + side) * layer.kv_heads + head) * (std::int64_t{tokens} * d);
  };
  PlainState state;
  float4* const output = w.outputs + warp() * v.plain_tiles * quant::kWarpLanes;
  for (int chunk = warp(); chunk < chunks; chunk += Warps) {
    const bool sink = chunk < sink_chunks;
    const int first = kChunk * (sink ? chunk : chunk - sink_chunks);
    const int left = (sink ? sinks : open) - first;
    const auto* const buffer = sink ? layer.sinks : layer.open;
    const int tokens = sink ? layer.sink_tokens : kOpenTokens;
    attend_chunk(v, query,
                 {rows_of(buffer, 0, tokens) + first * d, rows_of(buffer, 1, tokens) + first * d,
                  first + (sink ? 0 : layer.sink_tokens + packed), left < kChunk ? left : kChunk},
                 state, output, chunk == warp());
  }
#pragma unroll
  for (int e = 0; e < 2; ++e)
#pragma unroll
    for (int step = 4; step < quant::kWarpLanes; step *= 2)
      state.l[e] += shuffle_xor(state.l[e], step);
  if (lane() < 4)
    for (int e = 0; e < 2; ++e)
      w.states[warp() * kColumns + lane() + 4 * e] = {state.m[e], state.l[e]};
  sync_block();

  const int used = chunks < Warps ? chunks : Warps;
  const int segment = (sequence * layer.kv_heads + head) * v.column_blocks + column_block;
  const int t = thread() & 3;
  float most[2] = {kLowest, kLowest};
  for (int i = 0; i < used; ++i)
    for (int e = 0; e < 2; ++e) most[e] = fmaxf(most[e], w.states[i * kColumns + t + 4 * e].x);
  const auto weight = [&](int i, int e) {
    return exp2_fast(w.states[i * kColumns + t + 4 * e].x - most[e]);
  };
  const int elements = v.plain_tiles * quant::kWarpLanes;
  float4* const to = v.plain_output + std::int64_t{segment} * elements;
  for (int k = thread(); k < elements; k += Warps * quant::kWarpLanes) {
    float4 sum = {0, 0, 0, 0};
    for (int i = 0; i < used; ++i) {
      const float a = weight(i, 0), b = weight(i, 1);
      const float4 o = w.outputs[i * elements + k];
      sum = {fused(a, o.x, sum.x), fused(a, o.y, sum.y), fused(b, o.z, sum.z),
             fused(b, o.w, sum.w)};
    }
    to[k] = sum;
  }
  if (thread() < 4)
    for (int e = 0; e < 2; ++e) {
      float mass = 0;
      for (int i = 0; i < used; ++i)
        mass = fused(weight(i, e), w.states[i * kColumns + t + 4 * e].y, mass);
      v.plain_state[std::int64_t{segment} * kColumns + t + 4 * e] = {most[e], mass};
    }
}

}  // namespace kvplan::kernels
