#include "evaluation/evaluation_statistics.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "quant/random.h"

namespace kvplan::evaluation {

double mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

MeanEstimate mean_estimate(std::span<const double> values) {
  const double centre = mean(values), count = static_cast<double>(values.size());
  double squares = 0;
  for (const double value : values) squares += (value - centre) * (value - centre);
  return {centre, values.size() > 1 ? std::sqrt(squares / (count - 1) / count) : 0.0};
}

std::vector<double> window_means(const TokenScores& scores) {
  std::vector<double> means;
  for (std::int64_t w = 0; w < scores.windows; ++w) means.push_back(mean(scores.window(w)));
  return means;
}

double quantile(std::span<const double> ascending, double p) {
  const double rank = p * static_cast<double>(ascending.size() - 1);
  const auto below = static_cast<std::size_t>(rank),
             above = std::min(below + 1, ascending.size() - 1);
  return std::lerp(ascending[below], ascending[above], rank - static_cast<double>(below));
}

KlStatistics kl_statistics(const TokenScores& kl) {
  std::vector<double> ascending = kl.values;
  std::sort(ascending.begin(), ascending.end());
  const auto tail =
      static_cast<std::size_t>(std::ceil(0.05 * static_cast<double>(ascending.size())));

  return {.mean = mean(kl.values),
          .standard_error = mean_estimate(window_means(kl)).standard_error,
          .p50 = quantile(ascending, 0.50),
          .p95 = quantile(ascending, 0.95),
          .p99 = quantile(ascending, 0.99),
          .max = ascending.back(),
          .cvar95 = mean(std::span(ascending).last(tail))};
}

std::vector<double> mean_by_position(const TokenScores& scores) {
  std::vector<double> sums(kPositionBins), counts(kPositionBins);
  for (std::int64_t w = 0; w < scores.windows; ++w) {
    const auto window = scores.window(w);
    for (std::size_t i = 0; i < window.size(); ++i) {
      const std::size_t bin = i * kPositionBins / window.size();
      sums[bin] += window[i];
      counts[bin] += 1;
    }
  }
  std::transform(sums.begin(), sums.end(), counts.begin(), sums.begin(), std::divides<>());
  return sums;
}

Interval bootstrap_interval(
    std::int64_t windows, int samples, std::uint64_t seed,
    const std::function<double(std::span<const std::uint32_t>)>& statistic) {
  quant::RandomStream stream(seed, quant::StreamPurpose::kBootstrap);
  std::vector<std::uint32_t> drawn(static_cast<std::size_t>(windows));
  std::vector<double> found(static_cast<std::size_t>(samples));
  for (double& value : found) {
    for (std::uint32_t& w : drawn) w = stream.next_below(static_cast<std::uint32_t>(windows));
    value = statistic(drawn);
  }
  std::sort(found.begin(), found.end());
  return {quantile(found, 0.025), quantile(found, 0.975)};
}

}  // namespace kvplan::evaluation
