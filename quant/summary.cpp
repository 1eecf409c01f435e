#include <algorithm>
#include <cmath>
#include <string>

#include "quant/moments.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

/// Figures of one layer and side over all its KV heads.
struct SideFigures {
  double norm = 0;         // E|x|
  double mean_share = 0;   // |mu|^2 / E|x|^2
  double sensitivity = 0;  // 1/2 sum_heads tr(F C)
  std::vector<int> outlier_channels;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

/// [heads*d] RMS of every channel.
std::vector<double> channel_rms(const SideSums& sums, std::size_t heads, std::size_t d, double n) {
  std::vector<double> rms;
  rms.reserve(heads * d);
  for (std::size_t h = 0; h < heads; ++h)
    for (std::size_t i = 0; i < d; ++i) rms.push_back(std::sqrt(sums.outer.row(h)[i * d + i] / n));
  return rms;
}

void require_tokens(const Profile& profile) {
  if (profile.tokens <= 0)
    throw InputError("profile.json", "/tokens",
                     "expected at least one token outside the sinks, found " +
                         std::to_string(profile.tokens) + "; profile more text");
}

SideFigures side_figures(const Profile& profile, const LayerProfile& layer, Side side,
                         double outlier_factor) {
  const SideSums& sums = layer.side(side);
  const auto heads = static_cast<std::size_t>(layer.kv_heads);
  const auto d = static_cast<std::size_t>(layer.head_dim);
  const auto n = static_cast<double>(profile.tokens);

  SideFigures figures;
  double mean_energy = 0, energy = 0, product = 0;
  for (std::size_t h = 0; h < heads; ++h) {
    figures.norm += sums.norm_sum.data[h] / (n * static_cast<double>(heads));
    const auto sum = sums.sum.row(h);
    const auto outer = sums.outer.row(h);
    const auto fisher = sums.fisher.row(h);
    for (std::size_t i = 0; i < d; ++i) {
      const double square = outer[i * d + i] / n;
      energy += square;
      mean_energy += (sum[i] / n) * (sum[i] / n);
      for (std::size_t j = 0; j < d; ++j)
        product += fisher[i * d + j] * (outer[i * d + j] / n - (sum[i] / n) * (sum[j] / n));
    }
  }
  figures.mean_share = energy > 0 ? mean_energy / energy : 0;
  // The Fisher matrix and C turn together, so tr(F C) needs no average over positions.
  if (profile.fisher_tokens > 0)
    figures.sensitivity = product / static_cast<double>(profile.fisher_tokens) / 2;
  const std::vector<double> rms = channel_rms(sums, heads, d, n);
  const double threshold = outlier_factor * median(rms);
  for (std::size_t c = 0; c < rms.size(); ++c)
    if (rms[c] > threshold) figures.outlier_channels.push_back(static_cast<int>(c));
  return figures;
}

}  // namespace

std::vector<LayerSummary> summarise(const Profile& profile, double outlier_factor) {
  require_tokens(profile);
  std::vector<LayerSummary> summary;
  for (const LayerProfile& layer : profile.layers) {
    SideFigures k = side_figures(profile, layer, Side::kKey, outlier_factor);
    SideFigures v = side_figures(profile, layer, Side::kValue, outlier_factor);
    summary.push_back({.key_norm = k.norm,
                       .value_norm = v.norm,
                       .norm_ratio = v.norm > 0 ? k.norm / v.norm : 0,
                       .mean_share_k = k.mean_share,
                       .mean_share_v = v.mean_share,
                       .outlier_channels_k = std::move(k.outlier_channels),
                       .outlier_channels_v = std::move(v.outlier_channels),
                       .sensitivity_k = k.sensitivity,
                       .sensitivity_v = v.sensitivity,
                       .weight_mse = layer.weight_mse});
  }
  return summary;
}

std::vector<std::vector<double>> key_channel_rms(const Profile& profile) {
  require_tokens(profile);
  std::vector<std::vector<double>> rms;
  for (const LayerProfile& layer : profile.layers)
    rms.push_back(channel_rms(layer.k, static_cast<std::size_t>(layer.kv_heads),
                              static_cast<std::size_t>(layer.head_dim),
                              static_cast<double>(profile.tokens)));
  return rms;
}

}  // namespace kvplan::quant
