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
    if (split_)
      add_steps<true>(terms, phases);
    else
      add_steps<false>(terms, phases);
  }

 private:
  template <bool Split>
  KVPLAN_DEVICE void add_steps(float (&terms)[2][4], std::uint32_t phase) const {
    std::uint32_t centre = centre_, tile = tile_, low = low_;
#pragma unroll(Split ? 1 : 4)
    for (int s = 0; s < steps_; ++s) {
      const uint4 turn = load_shared4(phase), z = load_shared4(centre);
      float x[2], y[2];
      std::uint32_t b[2];
      rotate(turn.x, turn.y, z.x, z.y, x[0], y[0]);
      rotate(turn.z, turn.w, z.z, z.w, x[1], y[1]);
#pragma unroll
      for (int k = 0; k < 2; ++k) b[k] = pack_halves(x[k], y[k]);
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply(terms[i], tile + 16 * kLanes * i, b[0], b[1]);
      if constexpr (Split) {
        std::uint32_t rest[2], small[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          rest[k] = pack_halves(x[k] - low_half(b[k]), y[k] - high_half(b[k]));
          small[k] = pack_halves(x[k] / kLowScale, y[k] / kLowScale);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply(terms[i], tile + 16 * kLanes * i, rest[0], rest[1]);
          multiply(terms[i], low + 16 * kLanes * i, small[0], small[1]);
        }
        low += kRows * 16 * kLanes;
      }
      phase += 128, centre += 256, tile += kRows * 16 * kLanes;
    }
  }
  KVPLAN_DEVICE static void rotate(std::uint32_t cosine, std::uint32_t sine, std::uint32_t zx,
                                   std::uint32_t zy, float& x, float& y) {
    const float c = float_of_bits(cosine), s = float_of_bits(sine);
    x = fused(float_of_bits(zx), c, -float_of_bits(zy) * s);
    y = fused(float_of_bits(zx), -s, -float_of_bits(zy) * c);
  }
  KVPLAN_DEVICE static void multiply(float (&d)[4], std::uint32_t at, std::uint32_t b0,
                                     std::uint32_t b1) {
    const uint4 w = load_shared4(at);
    const std::uint32_t a[4] = {w.x, w.y, w.z, w.w};
    mma(d, a, b0, b1);
  }

  int steps_;
  std::uint32_t centre_, tile_, low_;  // of the lane
  bool split_;
};

}  // namespace kvplan::kernels
