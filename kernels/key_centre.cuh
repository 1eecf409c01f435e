#pragma once
// q . R_t mu, what centred keys lack, for two pages at a time. Private to the decode kernels.

#include "kernels/page_feed.cuh"
#include "kernels/ptx.cuh"
#include "kernels/scores.cuh"
#include "kernels/tile_plan.h"
#include "kernels/views.h"

namespace kvplan::kernels {

// For t = t_p + j the sum over frequencies f is cos(w_f j) x_f + sin(w_f j) y_f with (x, y) the
// coefficients turned to the page's first position. Matrix column 2c of operand B has column c of a
// page, 2c + 1 the same of the page after. The phases of two pages are copied to shared memory
// while the two before are at work.
class KeyCentre {
 public:
  /// `phases`: the warp's PhasePair in shared memory.
  KVPLAN_DEVICE KeyCentre(const AttentionView& v, const Work<1>& work, std::byte* phases)
      : v_(v), phases_(phases), centre_(shared_address(work.centre + (lane() & 3) * 4)) {
    centre_ += 8 * static_cast<std::uint32_t>(lane() >> 3);
  }

  /// Sends for the phases of page `page` of the sequence and the one after, if they are no later
  /// than `last`.
  KVPLAN_DEVICE void send_for(int page, int last) {
    const int quads = 4 * v_.layer.phase_steps;  // of a page
    const int end = (last - page + 1) * quads;
    const auto* const from = reinterpret_cast<const uint4*>(v_.layer.page_phase) +
                             static_cast<std::int64_t>(page) * quads;
    for (int i = lane(); i < 2 * quads && i < end; i += kLanes)
      copy_16(phases_ + 16 * i + (i < quads ? 0 : kPhaseGap), from + i);
    end_group();
  }

  /// terms[i][2 h + n] = start + q . R_t mu of token 16 i + 8 h + g of page n. Calls between()
  /// when the phases are no longer needed.
  template <class Between>
  KVPLAN_DEVICE void add(float (&terms)[kRows][4], float start, Between between) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) terms[i][k] = start;
    const int steps = v_.layer.phase_steps;
    wait_groups<0>();
    sync_warp();
    const int g = lane() >> 2, t = lane() & 3;
    std::uint32_t phase = shared_address(phases_) + 8 * static_cast<std::uint32_t>(t);
    if (g % 2 == 1) phase += 64 * static_cast<std::uint32_t>(steps) + kPhaseGap;
    std::uint32_t centre = centre_;
    std::uint32_t tile = static_cast<std::uint32_t>(v_.layer.shared.rotary_tile) +
                         16 * static_cast<std::uint32_t>(lane());
    const std::uint32_t low =
        static_cast<std::uint32_t>(v_.layer.shared.rotary_tile_low - v_.layer.shared.rotary_tile);
    const auto add_steps = [&]<bool Split>() {
#pragma unroll(Split ? 1 : 4)
      for (int s = 0; s < steps; ++s) {
        add_step<Split>(terms, phase, centre, tile, low);
        phase += 64, centre += 8 * 4 * 8, tile += kRows * 16 * kLanes;
      }
    };
    if (v_.layer.shared.rotary_tile_low == 0)
      add_steps.template operator()<false>();
    else
      add_steps.template operator()<true>();
    sync_warp();
    between();
  }

 private:
  template <bool Split>
  KVPLAN_DEVICE static void add_step(float (&terms)[kRows][4], std::uint32_t phase,
                                     std::uint32_t centre, std::uint32_t tile, std::uint32_t low) {
    float x[2], y[2];
    std::uint32_t b[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint2 turn = load_shared2(phase + 32 * k), z = load_shared2(centre + 128 * k);
      const float cosine = float_of_bits(turn.x), sine = float_of_bits(turn.y);
      const float zx = float_of_bits(z.x), zy = float_of_bits(z.y);
      x[k] = fused(zx, cosine, -zy * sine);
      y[k] = fused(zx, -sine, -zy * cosine);
      b[k] = pack_halves(x[k], y[k]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) multiply(terms[i], tile + 16 * kLanes * i, b[0], b[1]);
    if constexpr (Split) {
      std::uint32_t rest[2], small[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        rest[k] = pack_halves(x[k] - low_half(b[k]), y[k] - high_half(b[k]));
        small[k] = pack_halves(x[k] / kLowScale, y[k] / kLowScale);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        multiply(terms[i], tile + 16 * kLanes * i, rest[0], rest[1]);
        multiply(terms[i], tile + low + 16 * kLanes * i, small[0], small[1]);
      }
    }
  }
  KVPLAN_DEVICE static void multiply(float (&d)[4], std::uint32_t at, std::uint32_t b0,
                                     std::uint32_t b1) {
    const uint4 w = load_shared4(at);
    const std::uint32_t a[4] = {w.x, w.y, w.z, w.w};
    mma(d, a, b0, b1);
  }

  const AttentionView& v_;
  std::byte* phases_;
  std::uint32_t centre_;  // of the lane in Work::centre
};

}  // namespace kvplan::kernels
