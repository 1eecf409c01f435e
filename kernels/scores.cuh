#pragma once
// From scores to weights: norms, centring, masks, running maxima, in the fragments of mma.m16n8k16.
// Private to the decode kernel.

#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/tile_codes.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

inline constexpr int kRows = 4;  // blocks of 16 tokens in a page
// A running maximum follows when it is outgrown by this much (log2 units).
inline constexpr float kSlack = 6;

// A warp serves Blocks = 1 or 2 times four columns of a segment: lane 4g+t has those of columns t +
// 4e, e < Blocks, of tokens 16 i + 8 h + g of a page.
template <int Blocks>
using Scores = float[kRows][2][Blocks];

KVPLAN_DEVICE float digits(int high, int low) { return static_cast<float>(high * 256 + low); }

// Calls visit(i, h, e) for a lane's elements of Scores.
template <int Blocks, class Visit>
KVPLAN_DEVICE void for_scores(Visit visit) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < Blocks; ++e) visit(i, h, e);
}

// What a warp keeps of its current segment, by e.
template <int Blocks>
struct Running {
  float m[Blocks];       // maximum, log2 units
  float l[Blocks];       // mass: sum of 2^(score - m) over the lane's tokens
  float norms[Blocks];   // the same times the norms of values
  bool started = false;  // every column has read something
  KVPLAN_DEVICE Running() {
#pragma unroll
    for (int e = 0; e < Blocks; ++e) m[e] = kLowest, l[e] = norms[e] = 0;
  }
};

// Outputs of a tile that a lane holds in shared memory: of coordinates g and g + 8, e by e.
template <int Blocks>
struct alignas(8 * Blocks) Output {
  float x[2 * Blocks];
};

// What a warp knows of the piece that it works on.
template <int Blocks>
struct Work {
  std::byte* tables = nullptr;  // MixedPath: TileTables
  const uint2* query = nullptr;
  Output<Blocks>* output = nullptr;
  const RunEntry* runs = nullptr;  // of a page: keys, outliers of keys, values, outliers of values
  int key_runs = 0, key_outlier_runs = 0, value_runs = 0, value_outlier_runs = 0;
  int key_tiles = 0, value_tiles = 0;  // without those of outliers
  int value_outlier_tiles = 0;
  std::uint32_t key_norms = 0, value_norms = 0;  // offsets in the second half of a page
  std::uint32_t key_scales = 0, value_scales = 0;
  int norm_bytes[2] = {0, 0};
  int column_block = 0;
  int first_query = 0;             // position of the step's first query
  int lowest = 0;                  // no position from here to first_query is masked for any query
  const float2* centre = nullptr;  // [pairs of frequencies][4 Blocks][2]
  float bias[Blocks], unit[Blocks], constant[Blocks];
};

// Norms or scales of a lane's 8 tokens of a page: token 16 i + 8 h + g at index 2 i + h; fp16 or
// log8, of the lane at `at`.
KVPLAN_DEVICE void load_half_norms(float (&x)[8], std::uint32_t at) {
  const uint4 v = load_shared4(at);
  const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) x[k] = k % 2 == 0 ? low_half(words[k / 2]) : high_half(words[k / 2]);
}
/// The log8 norms in the lowest bytes of `bytes`.
template <int Count>
KVPLAN_DEVICE void log_norms_of(float (&x)[Count], std::uint32_t bytes) {
  static_assert(Count <= 4);
  // 2^(q / 32): 2^23 + (q + 128) is a float whose low byte is q + 128.
  constexpr float kBase = (8388608.0f + 128) / 32;
  bytes ^= 0x80808080;
#pragma unroll
  for (int k = 0; k < Count; ++k)
    x[k] = exp2_fast(fused(
        float_of_bits(select_bytes(bytes, 0x4b000000, 0x7440u | static_cast<std::uint32_t>(k))),
        1.0f / 32, -kBase));
}
KVPLAN_DEVICE void load_log_norms(float (&x)[8], std::uint32_t at) {
  const uint2 v = load_shared2(at);
  float low[4], high[4];
  log_norms_of(low, v.x);
  log_norms_of(high, v.y);
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] = low[k], x[4 + k] = high[k];
}
// Of all lanes at `at`, of so many bytes each; 0: there are none.
KVPLAN_DEVICE void load_norms(float (&x)[8], std::uint32_t at, int bytes) {
  at += static_cast<std::uint32_t>(8 * bytes * (lane() >> 2));
  if (bytes == 2) {
    load_half_norms(x, at);
  } else if (bytes == 1) {
    load_log_norms(x, at);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = 1;
  }
}

// Adds q . R_t mu to the scores of a page; `phases`: of its first position, at a shared address.
// For t = t_p + j the sum over frequencies f is cos(w_f j) x_f + sin(w_f j) y_f with (x, y) the
// coefficients turned to the page's first position.
template <int Blocks>
KVPLAN_DEVICE void add_centre(Scores<Blocks>& s, const AttentionView& v, const Work<Blocks>& work,
                              std::uint32_t phases) {
  constexpr int kKept = 4 * Blocks;
  const int g = lane() >> 2, t = lane() & 3;
  const bool used = Blocks == 2 || g % 2 == 0;  // whether the lane's matrix column is a column
  const int column = Blocks == 2 ? g / 2 + 4 * (g % 2) : g / 2;
  const std::uint32_t tile = static_cast<std::uint32_t>(v.layer.shared.rotary_tile) + 16 * lane();
  const std::uint32_t low_tile =
      static_cast<std::uint32_t>(v.layer.shared.rotary_tile_low) + 16 * lane();
  const bool split = v.layer.shared.rotary_tile_low != 0;
  const float2* centre = work.centre + 2 * (t * kKept + column);
  phases += 16 * t;
  float d[kRows][4] = {};
#pragma unroll 1
  for (int step = 0; step < v.layer.phase_steps; ++step) {
    float2 z[2] = {centre[8 * step * kKept], centre[8 * step * kKept + 1]};
    if (!used) z[0] = z[1] = {0, 0};
    std::uint32_t b[2], rest[2], small[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint2 bits = load_shared2(phases + 128 * step + 8 * k);
      const float cosine = float_of_bits(bits.x), sine = float_of_bits(bits.y);
      const float x = fused(z[k].x, cosine, -z[k].y * sine);
      const float y = -fused(z[k].x, sine, z[k].y * cosine);
      b[k] = pack_halves(x, y);
      if (split) {
        rest[k] = pack_halves(x - low_half(b[k]), y - high_half(b[k]));
        small[k] = pack_halves(x / kLowScale, y / kLowScale);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::uint32_t at = static_cast<std::uint32_t>(step * kRows + i) * 16 * kLanes;
      const uint4 w = load_shared4(tile + at);
      const std::uint32_t a[4] = {w.x, w.y, w.z, w.w};
      mma(d[i], a, b[0], b[1]);
      if (!split) continue;
      const uint4 lw = load_shared4(low_tile + at);
      const std::uint32_t low[4] = {lw.x, lw.y, lw.z, lw.w};
      mma(d[i], a, rest[0], rest[1]);
      mma(d[i], low, small[0], small[1]);
    }
  }
  for_scores<Blocks>([&](int i, int h, int e) { s[i][h][e] += d[i][2 * h + e]; });
}

// Position of the query of column t + 4e, the last it may read.
template <int Blocks>
KVPLAN_DEVICE int query_position(const AttentionView& v, const Work<Blocks>& work, int e) {
  const int column = work.column_block * kColumns + (lane() & 3) + 4 * e;
  return work.first_query + column / v.queries_per_kv;
}

template <int Blocks>
KVPLAN_DEVICE void cap(Scores<Blocks>& s, float soft_cap) {
  const float top = soft_cap * kLog2e, slope = 2 * kLog2e * reciprocal_fast(top);
  for_scores<Blocks>([&](int i, int h, int e) {
    float& x = s[i][h][e];
    x = top - 2 * top * reciprocal_fast(exp2_fast(x * slope) + 1);
  });
}

// -infinity for what a query must not read: later positions, positions before its window. `first`:
// position of the page's first token.
template <int Blocks>
KVPLAN_DEVICE void mask(Scores<Blocks>& s, const AttentionView& v, const Work<Blocks>& work,
                        int first) {
  // Tokens from .. until - 1.
  int from[Blocks], until[Blocks];
#pragma unroll
  for (int e = 0; e < Blocks; ++e) {
    const int last = query_position(v, work, e);
    until[e] = last - first + 1;
    from[e] = v.window > 0 && last + 1 - v.window > first
                  ? static_cast<int>(last + 1 - v.window) - first
                  : 0;
  }
  for_scores<Blocks>([&](int i, int h, int e) {
    const int token = 16 * i + 8 * h + (lane() >> 2);
    if (token >= until[e] || token < from[e]) s[i][h][e] = -INFINITY;
  });
}

template <int Blocks>
KVPLAN_DEVICE void clear_output(const Work<Blocks>& work, int tiles) {
  for (int j = 0; j < tiles; ++j) work.output[j * kLanes + lane()] = {};
}

template <int Blocks>
KVPLAN_DEVICE void scale_output(const Work<Blocks>& work, int tiles,
                                const float (&factor)[Blocks]) {
#pragma unroll 1
  for (int j = 0; j < tiles; ++j) {
    Output<Blocks>& o = work.output[j * kLanes + lane()];
#pragma unroll
    for (int k = 0; k < 2 * Blocks; ++k) o.x[k] *= factor[k / 2];
  }
}

template <int Blocks>
KVPLAN_DEVICE void largest(const Scores<Blocks>& s, float (&top)[Blocks]) {
  // Rows side by side.
  float tops[kRows][Blocks];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int e = 0; e < Blocks; ++e) tops[i][e] = s[i][0][e];
  for_scores<Blocks>([&](int i, int h, int e) { tops[i][e] = fmaxf(tops[i][e], s[i][h][e]); });
#pragma unroll
  for (int e = 0; e < Blocks; ++e)
    top[e] = fmaxf(fmaxf(tops[0][e], tops[1][e]), fmaxf(tops[2][e], tops[3][e]));
}

// Lets the maxima follow the scores, masses the maxima, and outputs too: scale_outputs(factors)
// multiplies them. Scores become differences to the maxima. `above`: they are that already
// (Running::started).
template <int Blocks, class Scale>
KVPLAN_DEVICE void follow_maximum(Running<Blocks>& r, Scores<Blocks>& s, bool above,
                                  Scale scale_outputs) {
  float top[Blocks], base[Blocks];
  largest<Blocks>(s, top);
  bool grown = false;
#pragma unroll
  for (int e = 0; e < Blocks; ++e) {
    base[e] = above ? 0 : r.m[e];  // the maximum as the scores count
    grown = grown || top[e] > base[e] + kSlack;
  }
  if (any(grown)) [[unlikely]] {
    float factor[Blocks];
#pragma unroll
    for (int e = 0; e < Blocks; ++e) {
      top[e] = fmaxf(top[e], base[e]);
#pragma unroll
      for (int step = 4; step < kLanes; step *= 2)
        top[e] = fmaxf(top[e], shuffle_xor(top[e], step));
      factor[e] = exp2_fast(base[e] - top[e]);
      r.m[e] = above ? r.m[e] + top[e] : top[e];
      base[e] = top[e];
      r.l[e] *= factor[e];
      r.norms[e] *= factor[e];
    }
    scale_outputs(factor);
    for_scores<Blocks>([&](int i, int h, int e) { s[i][h][e] -= base[e]; });
  } else if (!above) [[unlikely]] {
    for_scores<Blocks>([&](int i, int h, int e) { s[i][h][e] -= base[e]; });
  }
  if (r.started) return;
  bool missing = false;
#pragma unroll
  for (int e = 0; e < Blocks; ++e) missing = missing || r.m[e] <= kLowest;
  r.started = !any(missing);
}

// Differences to the maxima become probabilities 2^s, added to the masses.
template <int Blocks>
KVPLAN_DEVICE void exponentiate(Scores<Blocks>& s, Running<Blocks>& r) {
  float sums[kRows][Blocks] = {};
  for_scores<Blocks>([&](int i, int h, int e) {
    s[i][h][e] = exp2_fast(s[i][h][e]);
    sums[i][e] += s[i][h][e];
  });
#pragma unroll
  for (int e = 0; e < Blocks; ++e) r.l[e] += (sums[0][e] + sums[1][e]) + (sums[2][e] + sums[3][e]);
}

// By what the weights of tokens are multiplied so that the largest of a column is `top`; weights
// times factor times `unit` are what they were.
template <int Blocks>
KVPLAN_DEVICE void measure_weights(const Scores<Blocks>& w, float top, float (&factor)[Blocks],
                                   float (&unit)[Blocks]) {
  float most[Blocks];
  largest<Blocks>(w, most);
#pragma unroll
  for (int e = 0; e < Blocks; ++e) {
#pragma unroll
    for (int step = 4; step < kLanes; step *= 2)
      most[e] = fmaxf(most[e], shuffle_xor(most[e], step));
    most[e] = fmaxf(most[e], 1e-30f);
    factor[e] = top * reciprocal_fast(most[e]);
    unit[e] = most[e] * (1 / top);
  }
}

// Operand B of the products with bytes: weights 0..65535 as two unsigned bytes. Matrix column 2t
// has the high ones of column t, 2t + 1 the low ones; row order as in tile_bytes.cuh.
template <int Blocks>
using ByteWeights = std::uint32_t[kRows][Blocks];
inline constexpr float kTopByteWeight = 65000;

template <int Blocks>
KVPLAN_DEVICE void make_byte_weights(ByteWeights<Blocks>& p, const Scores<Blocks>& w,
                                     const float (&factor)[Blocks]) {
  constexpr float kRound = 8388608;  // 2^23: the float's low bits are the integer
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int e = 0; e < Blocks; ++e)
      p[i][e] =
          transpose8x8(select_bytes(bits_of_float(fused(w[i][0][e], factor[e], kRound)),
                                    bits_of_float(fused(w[i][1][e], factor[e], kRound)), 0x4051));
}

// Operand B of mma.m16n8k16: matrix column 2t + e has column t + 4e.
using HalfWeights = std::uint32_t[kRows][2];

template <int Blocks>
KVPLAN_DEVICE void make_half_weights(HalfWeights& p, const Scores<Blocks>& w) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      p[i][h] = transpose8x8(pack_halves(w[i][h][0], Blocks == 2 ? w[i][h][Blocks - 1] : 0.0f));
}

// Sums of products in fp16: matrix column 2t + e has column t + 4e.
using HalfSums = float[kRows][4];

// o += (even + odd) * unit, both as HalfSums.
template <int Blocks>
KVPLAN_DEVICE void add_output(Output<Blocks>& o, const float (&even)[4], const float (&odd)[4],
                              const float (&unit)[Blocks]) {
#pragma unroll
  for (int k = 0; k < 2 * Blocks; ++k) {
    const int from = 2 * (k % 2) + k / 2;
    o.x[k] = fused(even[from] + odd[from], unit[k / 2], o.x[k]);
  }
}

// Sums over the lanes that share columns.
template <int Blocks>
KVPLAN_DEVICE void reduce_masses(Running<Blocks>& r) {
#pragma unroll
  for (int e = 0; e < Blocks; ++e)
#pragma unroll
    for (int step = 4; step < kLanes; step *= 2) {
      r.l[e] += shuffle_xor(r.l[e], step);
      r.norms[e] += shuffle_xor(r.norms[e], step);
    }
}

template <int Blocks>
KVPLAN_DEVICE void store_state(float2* state, const Running<Blocks>& r) {
  if (lane() >= 4) return;
#pragma unroll
  for (int e = 0; e < 2; ++e)
    state[lane() + 4 * e] =
        e < Blocks ? float2{r.m[e % Blocks], r.l[e % Blocks]} : float2{kLowest, 0};
}

}  // namespace kvplan::kernels
