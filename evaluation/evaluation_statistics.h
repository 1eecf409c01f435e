#pragma once
// From per-token scores to the figures of a validation.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "schemas/validation.h"

namespace kvplan::evaluation {

inline constexpr int kPositionBins = 16;

/// One figure per scored token, window by window: values[window * scored + position].
struct TokenScores {
  std::int64_t windows = 0;
  std::int64_t scored = 0;  // positions of each window
  std::vector<double> values;

  std::span<const double> window(std::int64_t w) const {
    return std::span(values).subspan(static_cast<std::size_t>(w * scored),
                                     static_cast<std::size_t>(scored));
  }
};

double mean(std::span<const double> values);
/// Mean of each window.
std::vector<double> window_means(const TokenScores& scores);

/// Mean of independent draws with its standard error, which is 0 for a single one. At least one.
MeanEstimate mean_estimate(std::span<const double> values);

/// Quantile of ascending values, linear between neighbours (rank p (n - 1)).
double quantile(std::span<const double> ascending, double p);

/// Standard error from the spread of window means, windows being the independent draws; 0 for a
/// single window. CVaR95: mean of the largest ceil(5 %) tokens.
KlStatistics kl_statistics(const TokenScores& kl);

/// Means over the windows in kPositionBins equal parts of the scored positions. scored >=
/// kPositionBins.
std::vector<double> mean_by_position(const TokenScores& scores);

/// 95 % percentile interval of `statistic` over resampled windows. It is handed the drawn window
/// numbers; equal (seed, windows, samples) draw alike, so that every comparison of a run is paired.
Interval bootstrap_interval(std::int64_t windows, int samples, std::uint64_t seed,
                            const std::function<double(std::span<const std::uint32_t>)>& statistic);

}  // namespace kvplan::evaluation
