#pragma once
// q . R_t mu, what centred keys lack, for two pages at a time. Private to the decode kernels.

#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_plan.h"
#include "kernels/views.h"

namespace kvplan::kernels {

// For t = t_p + j the sum over frequencies f is cos(w_f j) x_f + sin(w_f j) y_f with (x, y) the
// coefficients turned to the page's first position. A lane keeps those that it brings to operand B:
// matrix column 2c has column c of a page, 2c + 1 the same of the page after. They turn by two
// pages at a time, and now and then are taken anew so that roundings do not add up.
class KeyCentre {
 public:
  static constexpr int kFreshPages = 64;

  KVPLAN_DEVICE KeyCentre(const AttentionView& v, const Work<1>& work, std::uint32_t turns)
      : v_(v),
        work_(work),
        tile_(static_cast<std::uint32_t>(v.layer.shared.rotary_tile) + 16 * lane()),
        low_tile_(static_cast<std::uint32_t>(v.layer.shared.rotary_tile_low) + 16 * lane()),
        turns_(turns + 16 * (lane() & 3)) {}

  /// Angles of two pages, to `turns` in shared memory; the sequence has at least three pages.
  KVPLAN_DEVICE static void write_turns(const AttentionView& v, float2* turns) {
    const int frequencies = 8 * v.layer.phase_steps;
    const float2* const phase = v.layer.page_phase;
    for (int f = lane(); f < frequencies; f += kLanes) {
      const float2 from = phase[f], to = phase[2 * frequencies + f];
      turns[f / 8 * 8 + f % 4 * 2 + f / 4 % 2] = {fused(to.x, from.x, to.y * from.y),
                                                  fused(to.y, from.x, -(to.x * from.y))};
    }
  }

  /// Coefficients at page `page` of the sequence and the one after, up to `last`.
  KVPLAN_DEVICE void look_at(int page, int last) {
    const int steps = v_.layer.phase_steps, g = lane() >> 2, t = lane() & 3;
    const int mine = g % 2 == 0 || page == last ? page : page + 1;
    const float2* const phase = v_.layer.page_phase + std::int64_t{mine} * 8 * steps + t;
    const float2* const centre = work_.centre + 4 * t + g / 2;
#pragma unroll
    for (int s = 0; s < kMaxMixedSteps; ++s)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (s >= steps) continue;
        const float2 z = centre[4 * (8 * s + 4 * k)], at = phase[8 * s + 4 * k];
        x_[s][k] = fused(z.x, at.x, -z.y * at.y);
        y_[s][k] = -fused(z.x, at.y, z.y * at.x);
      }
  }

  /// terms[i][2 h + n] = start + q . R_t mu of token 16 i + 8 h + g of page n; on to the next two.
  KVPLAN_DEVICE void next(float (&terms)[kRows][4], float start) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) terms[i][k] = start;
    const int steps = v_.layer.phase_steps;
    if (steps == kMaxMixedSteps && v_.layer.shared.rotary_tile_low == 0) {
#pragma unroll
      for (int s = 0; s < kMaxMixedSteps; ++s) add_step<false>(terms, s);
    } else {
#pragma unroll
      for (int s = 0; s < kMaxMixedSteps; ++s)
        if (s < steps) add_step<true>(terms, s);
    }
  }

 private:
  template <bool MaySplit>
  KVPLAN_DEVICE void add_step(float (&terms)[kRows][4], int s) {
    std::uint32_t b[2], rest[2] = {}, small[2] = {};
    const bool split = MaySplit && v_.layer.shared.rotary_tile_low != 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      b[k] = pack_halves(x_[s][k], y_[s][k]);
      if (split) {
        rest[k] = pack_halves(x_[s][k] - low_half(b[k]), y_[s][k] - high_half(b[k]));
        small[k] = pack_halves(x_[s][k] / kLowScale, y_[s][k] / kLowScale);
      }
    }
    const uint4 turns = load_shared4(turns_ + 64 * static_cast<std::uint32_t>(s));
    turn(s, 0, float_of_bits(turns.x), float_of_bits(turns.y));
    turn(s, 1, float_of_bits(turns.z), float_of_bits(turns.w));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const std::uint32_t at = static_cast<std::uint32_t>(s * kRows + i) * 16 * kLanes;
      const uint4 w = load_shared4(tile_ + at);
      const std::uint32_t a[4] = {w.x, w.y, w.z, w.w};
      mma(terms[i], a, b[0], b[1]);
      if (!split) continue;
      const uint4 lw = load_shared4(low_tile_ + at);
      const std::uint32_t low[4] = {lw.x, lw.y, lw.z, lw.w};
      mma(terms[i], a, rest[0], rest[1]);
      mma(terms[i], low, small[0], small[1]);
    }
  }
  KVPLAN_DEVICE void turn(int s, int k, float cosine, float sine) {
    const float x = x_[s][k], y = y_[s][k];
    x_[s][k] = fused(sine, y, cosine * x);
    y_[s][k] = fused(-sine, x, cosine * y);
  }

  const AttentionView& v_;
  const Work<1>& work_;
  std::uint32_t tile_, low_tile_, turns_;
  float x_[kMaxMixedSteps][2], y_[kMaxMixedSteps][2];
};

}  // namespace kvplan::kernels
