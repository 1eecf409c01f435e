#pragma once
// From a profile's raw sums to means, centred second moments and Fisher matrices at a context
// length.

#include <cstdint>
#include <span>
#include <vector>

#include "schemas/profile.h"

namespace kvplan::quant {

/// Of one KV head and side; matrices d x d row-major, after rotary (averaged over the context for
/// keys).
struct HeadMoments {
  std::vector<double> mean;    // [d] k: before rotary
  std::vector<double> second;  // C, about the mean
  std::vector<double> fisher;  // F
};

/// Averages a pre-rotary matrix over positions first..last: mean of R_t X R_t^T, exactly, by
/// geometric sums of the frequencies in pair coordinates (rope style half; channels from rotary_dim
/// on stay). X, result: d x d row-major. inv_freq [rotary_dim/2], radians per position.
/// ArgumentError: sizes that do not fit, last < first.
std::vector<double> average_over_positions(std::span<const double> x, int d, int rotary_dim,
                                           std::span<const double> inv_freq, std::int64_t first,
                                           std::int64_t last);

/// Moments of one head, positions sink_tokens .. context-1; not yet shrunk. Without `centre` the
/// mean is 0 and C = E x x^T.
HeadMoments head_moments(const Profile& profile, int layer, Side side, int head,
                         std::int64_t context, bool centre = true);

/// X_s = sum_t h_t (x_t - m_t)^T of coherent window s from the profile's cross and phase sums, d x
/// d row-major; m_t = R_t mean for keys, mean for values.
std::vector<double> centred_cross(const Profile& profile, int layer, Side side, int head, int s,
                                  std::span<const double> mean);

/// What to put into Profile::summary, one per layer. Outlier channels are those whose RMS (k before
/// rotary) exceeds outlier_factor times the median over the layer's channels. InputError for a
/// profile without tokens.
std::vector<LayerSummary> summarise(const Profile& profile, double outlier_factor = 3);

/// [layer][head*head_dim + channel] root mean square of k before rotary.
std::vector<std::vector<double>> key_channel_rms(const Profile& profile);

}  // namespace kvplan::quant
