#pragma once
// The centring term of keys: R_t mu for the positions of a run of tokens.

#include <cstdint>
#include <span>
#include <vector>

#include "schemas/types.h"

namespace kvplan::quant {

/// Means [heads, head_dim] turned by the rotary embedding of a position; without frequencies they
/// stay as they are.
class RotaryMean {
 public:
  RotaryMean(std::span<const float> means, int head_dim);
  /// InputError when the style is unknown or there are not rotary_dim/2 frequencies.
  RotaryMean(std::span<const float> means, int head_dim, const RopeSpec& rope, int rotary_dim,
             std::span<const double> inv_freq);

  /// out [tokens, heads, head_dim]. The phase of t is that of its multiple of kStep turned by the
  /// rest, so it depends on t alone.
  void fill(std::int64_t first_position, std::int64_t tokens, std::span<float> out) const;

  std::span<const double> means() const { return means_; }        // [heads, head_dim], not turned
  std::span<const double> inv_freq() const { return inv_freq_; }  // [pairs]; none: never turned
  /// Pair j is channels j * pair_stride() and j * pair_stride() + pair_distance().
  int pair_stride() const { return pair_stride_; }
  int pair_distance() const { return pair_distance_; }

 private:
  static constexpr std::int64_t kStep = 64;
  int head_dim_;
  std::vector<double> means_;
  std::vector<double> inv_freq_;
  std::vector<double> fine_cos_, fine_sin_;  // [kStep, pairs]
  int pair_stride_ = 1, pair_distance_ = 1;
};

}  // namespace kvplan::quant
