#pragma once
// From a profile's raw sums to means, centred second moments and Fisher matrices at a context length.

#include <vector>

#include "schemas/profile.h"

namespace kvplan::quant {

/// Of one KV head and side; matrices d x d row-major, after rotary (averaged over the context for keys).
struct HeadMoments {
  std::vector<double> mean;    // [d] k: before rotary
  std::vector<double> second;  // C, centred
  std::vector<double> fisher;  // F
};

/// Averages a pre-rotary matrix over positions first..last: mean of R_t X R_t^T, exactly, by geometric sums of the
/// frequencies in pair coordinates (rope style half). X, result: d x d row-major symmetric.
std::vector<double> average_over_positions(std::span<const double> x, int d, int rotary_dim, std::span<const double> inv_freq,
                                           std::int64_t first, std::int64_t last);

/// Moments of one head, positions sink_tokens .. context-1; not yet shrunk.
HeadMoments head_moments(const Profile& profile, int layer, Side side, int head, std::int64_t context);

/// X_s = sum_t h_t (x_t - m_t)^T of coherent window s from the profile's cross and phase sums, d x d row-major.
std::vector<double> centred_cross(const Profile& profile, int layer, Side side, int head, int s, std::span<const double> mean);

/// Fills profile.summary (one per layer).
std::vector<LayerSummary> summarise(const Profile& profile);

}  // namespace kvplan::quant
