#pragma once
// q . R_t mu, what centred keys lack, for a page. Private to the decode kernels.

#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/views.h"

namespace kvplan::kernels {

// For t = t_h + j the sum over frequencies f is cos(w_f j) x_f + sin(w_f j) y_f with (x, y) the
// coefficients turned to the first position t_h of a half page: so the 32 rows j of the rotary tile
// serve both halves. Matrix column 2c + n of operand B has column c in half n.
class KeyCentre {
 public:
  KVPLAN_DEVICE KeyCentre(const AttentionView& v, const Work<1>& work)
      : steps_(v.layer.phase_steps),
        centre_(shared_address(work.centre) +
                16 * static_cast<std::uint32_t>(4 * (lane() & 3) + (lane() >> 3))),
        tile_(static_cast<std::uint32_t>(v.layer.shared.rotary_tile + 16 * lane())),
        low_(static_cast<std::uint32_t>(v.layer.shared.rotary_tile_low + 16 * lane())),
        split_(v.layer.shared.rotary_tile_low != 0) {}

  /// terms[i][2 h + n] += q . R_t mu of token 32 n + 16 i + 8 h + g; `phases`: of the page, at a
  /// shared address.
  KVPLAN_DEVICE void add(float (&terms)[2][4], std::uint32_t phases) const {
    phases += 64 * static_cast<std::uint32_t>(lane() >> 2 & 1) +
              16 * static_cast<std::uint32_t>(lane() & 3);
    Place at{phases, centre_, tile_, low_};
    if (split_) {
#pragma unroll 1
      for (int s = 0; s < steps_; ++s) add_steps<1, true>(terms, at);
    } else if (steps_ == 8) {  // head_dim 128
      add_steps<8, false>(terms, at);
    } else if (steps_ == 4) {  // 64
      add_steps<4, false>(terms, at);
    } else {
#pragma unroll 1
      for (int s = 0; s < steps_; ++s) add_steps<1, false>(terms, at);
    }
  }

 private:
  static constexpr int kStepBytes = kHalfPageRows * 16 * kLanes;  // of the rotary tile

  /// Of a step, at shared addresses.
  struct Place {
    std::uint32_t phase, centre, tile, low;
  };

  template <int Steps, bool Split>
  KVPLAN_DEVICE static void add_steps(float (&terms)[2][4], Place& at) {
    uint4 turn[2], z[2];  // of a step and the next one
    const auto load = [&](int s) {
      turn[s % 2] = load_shared4(at.phase + 128 * s), z[s % 2] = load_shared4(at.centre + 256 * s);
    };
    load(0);
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      const std::uint32_t offset = kStepBytes * s;
      uint4 a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) a[i] = load_shared4(at.tile + offset + 16 * kLanes * i);
      if (s + 1 < Steps) load(s + 1);
      float x[2], y[2];
      std::uint32_t b[2];
      rotate(turn[s % 2].x, turn[s % 2].y, z[s % 2].x, z[s % 2].y, x[0], y[0]);
      rotate(turn[s % 2].z, turn[s % 2].w, z[s % 2].z, z[s % 2].w, x[1], y[1]);
#pragma unroll
      for (int k = 0; k < 2; ++k) b[k] = pack_halves(x[k], y[k]);
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply(terms[i], a[i], b);
      if constexpr (Split) {
        std::uint32_t rest[2], small[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          rest[k] = pack_halves(x[k] - low_half(b[k]), y[k] - high_half(b[k]));
          small[k] = pack_halves(x[k] / kLowScale, y[k] / kLowScale);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply(terms[i], a[i], rest);
          multiply(terms[i], load_shared4(at.low + offset + 16 * kLanes * i), small);
        }
      }
    }
    at.phase += 128 * Steps, at.centre += 256 * Steps;
    at.tile += kStepBytes * Steps, at.low += kStepBytes * Steps;
  }
  KVPLAN_DEVICE static void rotate(std::uint32_t cosine, std::uint32_t sine, std::uint32_t zx,
                                   std::uint32_t zy, float& x, float& y) {
    const float c = float_of_bits(cosine), s = float_of_bits(sine);
    x = fused(float_of_bits(zx), c, -float_of_bits(zy) * s);
    y = fused(float_of_bits(zx), -s, -float_of_bits(zy) * c);
  }
  KVPLAN_DEVICE static void multiply(float (&d)[4], const uint4& w, const std::uint32_t (&b)[2]) {
    const std::uint32_t a[4] = {w.x, w.y, w.z, w.w};
    mma(d, a, b[0], b[1]);
  }

  int steps_;
  std::uint32_t centre_, tile_, low_;  // of the lane
  bool split_;
};

}  // namespace kvplan::kernels
