#pragma once
// From scores to weights: norms, centring, masks, running maxima, in the fragments of mma.m16n8k16.
// Private to the decode kernel.

#include "kernels/page_stream.cuh"
#include "kernels/ptx.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kRows = 4;           // blocks of 16 tokens in a page
inline constexpr float kLowest = -1e30f;  // of a maximum: below every score
// A running maximum follows when it is outgrown by this much (log2 units): probabilities stay below
// 64, so fp16 holds them times norms of values up to about 1000, with kUniform tiles (a factor of
// 4) 250. docs/runtime.md, "Range of values".
inline constexpr float kSlack = 6;
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLowScale = 2048;  // of LayerView::rotary_tile_low

// What a warp keeps of its current segment.
struct Running {
  float m[2] = {kLowest, kLowest};  // of columns 2t, 2t + 1
  float l[2] = {0, 0};
  // kUniform tiles of values: the part of the outputs that the codes' offsets make.
  float codes[4] = {0, 0, 0, 0};
};

// A warp's memory and the segment it works on.
struct Work {
  std::byte* region = nullptr;  // its shared memory
  const uint2* query = nullptr;
  float4* output = nullptr;
  const RunEntry* runs = nullptr;  // of a page: keys, outliers of keys, values, outliers of values
  int key_runs = 0, key_outlier_runs = 0, value_runs = 0, value_outlier_runs = 0;
  int key_tiles = 0, value_tiles = 0;            // without those of outliers
  std::uint32_t tile_end = 0;                    // bytes of a page's tiles
  std::uint32_t key_norms = 0, value_norms = 0;  // offsets in the page
  int norm_bytes[2] = {0, 0};
  int sequence = 0, head = 0, column_block = 0, segment = 0;
  int first_query = 0;                           // position of the step's first query
  float bias[2] = {0, 0}, constant[2] = {0, 0};  // of columns 2t, 2t + 1
};

template <int Pages>
using Scores = float[Pages][kRows][4];  // [page][16 tokens][rows g, g + 8 x columns 2t, 2t + 1]
template <int Pages>
using Weights = std::uint32_t[Pages][kRows][2];  // operand B: probabilities x norms

// Scales or norms of a lane's 8 tokens of a page as stored: token 16 i + 8 h + g at index 2 i + h.
struct StoredNorms {
  uint4 words;
};

KVPLAN_DEVICE StoredNorms load_norms(const std::byte* at, int bytes) {
  if (bytes == 2) return {load_once(reinterpret_cast<const uint4*>(at) + (lane() >> 2))};
  if (bytes == 0) return {};
  const uint2 v = load_once(reinterpret_cast<const uint2*>(at) + (lane() >> 2));
  return {{v.x, v.y, 0, 0}};
}

KVPLAN_DEVICE void unpack_norms(float (&x)[8], const StoredNorms& norms, int bytes) {
  const std::uint32_t words[4] = {norms.words.x, norms.words.y, norms.words.z, norms.words.w};
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (bytes == 2) {
      x[k] = k % 2 == 0 ? low_half(words[k / 2]) : high_half(words[k / 2]);
    } else if (bytes == 1) {
      const std::uint32_t byte = words[k / 4] >> 8 * (k % 4) & 0xff;
      x[k] = exp2_fast(static_cast<float>(static_cast<std::int8_t>(byte)) * (1.0f / 32));
    } else {
      x[k] = 1;
    }
}

// Adds q . R_t mu to the scores of the group's pages. For t = t_p + j the sum over frequencies f is
// cos(w_f j) x_f + sin(w_f j) y_f with (x, y) the coefficients turned to the page's first position.
template <int Pages>
KVPLAN_DEVICE void add_centre(Scores<Pages>& s, const AttentionView& v, const Work& work,
                              int first_page) {
  const int g = lane() >> 2, t = lane() & 3;
  const auto* tile =
      reinterpret_cast<const uint4*>(shared_memory() + (v.layer.shared.rotary_tile - kSharedBase));
  const auto* low_tile = reinterpret_cast<const uint4*>(
      shared_memory() + (v.layer.shared.rotary_tile_low - kSharedBase));
  const bool split = v.layer.shared.rotary_tile_low != 0;
  const int frequencies = 8 * v.layer.phase_steps;
  const float2* centre = v.centre + std::int64_t{work.segment} * frequencies * kColumns;
  const float2* phases = v.layer.page_phase + std::int64_t{first_page} * frequencies;
#pragma unroll 1
  for (int step = 0; step < v.layer.phase_steps; ++step) {
    const int f = 8 * step + t;
    const float2 z[2] = {centre[f * kColumns + g], centre[(f + 4) * kColumns + g]};
    std::uint32_t b[Pages][2], rest[Pages][2], small[Pages][2];
#pragma unroll
    for (int n = 0; n < Pages; ++n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float2 phase = phases[n * frequencies + f + 4 * k];
        const float x = fused(z[k].x, phase.x, -z[k].y * phase.y);
        const float y = -fused(z[k].x, phase.y, z[k].y * phase.x);
        b[n][k] = pack_halves(x, y);
        if (split) {
          rest[n][k] = pack_halves(x - low_half(b[n][k]), y - high_half(b[n][k]));
          small[n][k] = pack_halves(x / kLowScale, y / kLowScale);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint4 w = tile[(step * kRows + i) * kLanes + lane()];
      const std::uint32_t a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int n = 0; n < Pages; ++n) mma(s[n][i], a, b[n][0], b[n][1]);
      if (!split) continue;
      const uint4 lw = low_tile[(step * kRows + i) * kLanes + lane()];
      const std::uint32_t low[4] = {lw.x, lw.y, lw.z, lw.w};
#pragma unroll
      for (int n = 0; n < Pages; ++n) {
        mma(s[n][i], a, rest[n][0], rest[n][1]);
        mma(s[n][i], low, small[n][0], small[n][1]);
      }
    }
  }
}

// Position of the query of column 2t + e, the last it may read.
KVPLAN_DEVICE int query_position(const AttentionView& v, const Work& work, int e) {
  const int column = work.column_block * kColumns + 2 * (lane() & 3) + e;
  return work.first_query + column / v.queries_per_kv;
}

template <int Pages>
KVPLAN_DEVICE void cap(Scores<Pages>& s, float soft_cap) {
  const float top = soft_cap * kLog2e, slope = 2 * kLog2e / top;
#pragma unroll
  for (int n = 0; n < Pages; ++n)
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (float& x : s[n][i]) x = top - 2 * top / (exp2_fast(x * slope) + 1);
}

// -infinity for what a query must not read: tokens from `tokens` on, later positions, positions
// before its window. `first`: position of the first of all pages.
template <int Pages>
KVPLAN_DEVICE void mask(Scores<Pages>& s, const AttentionView& v, const Work& work, int first,
                        int tokens) {
  const std::int64_t lowest =
      v.window > 0 ? work.first_query + v.batch.max_new_tokens - 1 - v.window : -1;
  if (tokens == Pages * quant::kPageTokens && first + tokens - 1 <= work.first_query &&
      first > lowest)
    return;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int last = query_position(v, work, e);
    // Tokens begin .. end - 1 of the pages.
    const int until = last - first + 1 < tokens ? last - first + 1 : tokens;
    const int from = v.window > 0 && last + 1 - v.window > first
                         ? static_cast<int>(last + 1 - v.window) - first
                         : 0;
#pragma unroll
    for (int n = 0; n < Pages; ++n)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int token = n * quant::kPageTokens + 16 * i + 8 * h + (lane() >> 2);
          if (token >= until || token < from) s[n][i][2 * h + e] = -INFINITY;
        }
  }
}

// Lets the maxima follow the scores; -> by what outputs so far must be multiplied.
template <int Pages>
KVPLAN_DEVICE void update_maximum(Running& r, const Scores<Pages>& s, float (&factor)[2]) {
  float top[2] = {r.m[0], r.m[1]};
#pragma unroll
  for (int n = 0; n < Pages; ++n) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) top[k % 2] = fmaxf(top[k % 2], s[n][i][k]);
  }
  factor[0] = factor[1] = 1;
  if (!any(top[0] > r.m[0] + kSlack || top[1] > r.m[1] + kSlack)) return;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int step = 4; step < kLanes; step *= 2) top[e] = fmaxf(top[e], shuffle_xor(top[e], step));
    factor[e] = exp2_fast(r.m[e] - top[e]);
    r.m[e] = top[e];
    r.l[e] *= factor[e];
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) r.codes[k] *= factor[k % 2];
}

// s <- probabilities 2^(s - m), added to the masses.
template <int Pages>
KVPLAN_DEVICE void exponentiate(Scores<Pages>& s, Running& r, int n) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      s[n][i][k] = exp2_fast(s[n][i][k] - r.m[k % 2]);
      r.l[k % 2] += s[n][i][k];
    }
}

template <int Pages>
KVPLAN_DEVICE void make_weights(Weights<Pages>& p, const Scores<Pages>& s, int n,
                                const float (&norm)[8]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      p[n][i][h] = transpose8x8(
          pack_halves(s[n][i][2 * h] * norm[2 * i + h], s[n][i][2 * h + 1] * norm[2 * i + h]));
}

template <int Pages>
KVPLAN_DEVICE void scale_high_tokens(Weights<Pages>& p, float factor) {
  const std::uint32_t f = pack_halves(factor, factor);
#pragma unroll
  for (int n = 0; n < Pages; ++n)
#pragma unroll
    for (int i = 0; i < kRows; ++i) p[n][i][1] = multiply_halves(p[n][i][1], f);
}

// What the offsets of the codes of kUniform tiles add to every coordinate; `p` scaled for them.
template <int Pages>
KVPLAN_DEVICE void add_code_offsets(Running& r, const Weights<Pages>& p) {
  constexpr float kHigh = UniformTile::kHighOffset / UniformTile::kHighFactor;
  const std::uint32_t low = pack_halves(UniformTile::kLowOffset, UniformTile::kLowOffset);
  const std::uint32_t high = pack_halves(kHigh, kHigh);
  const std::uint32_t a[4] = {low, low, high, high};
#pragma unroll
  for (int n = 0; n < Pages; ++n)
#pragma unroll
    for (int i = 0; i < kRows; ++i) mma(r.codes, a, p[n][i][0], p[n][i][1]);
}

// Sums of the lanes that share columns.
KVPLAN_DEVICE void reduce_masses(Running& r) {
#pragma unroll
  for (int e = 0; e < 2; ++e)
#pragma unroll
    for (int step = 4; step < kLanes; step *= 2) r.l[e] += shuffle_xor(r.l[e], step);
}

KVPLAN_DEVICE void clear_output(const Work& work, int tiles) {
  for (int j = 0; j < tiles; ++j) work.output[j * kLanes + lane()] = {0, 0, 0, 0};
}

KVPLAN_DEVICE void store_state(float2* state, const Running& r) {
  if (lane() >= 4) return;
  state[2 * lane()] = {r.m[0], r.l[0]};
  state[2 * lane() + 1] = {r.m[1], r.l[1]};
}

}  // namespace kvplan::kernels
