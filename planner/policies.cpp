#include "planner/policies.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "schemas/error.h"
#include "schemas/plan.h"

namespace kvplan::planner {
namespace {

constexpr int kOutlierMultiple = 8;

void require_layers(std::size_t count) {
  if (count == 0) throw ArgumentError("a policy needs at least one layer");
}

void require_width(int width) {
  if ((width < 0 || width > 8) && width != kFp16Width) {
    throw ArgumentError("width " + std::to_string(width) + " is unknown: expected 0 to 8 or 16");
  }
}

void require_finite(double value, const char* name, std::size_t layer) {
  if (!std::isfinite(value)) {
    throw ArgumentError(std::string(name) + " of layer " + std::to_string(layer) + " is " +
                        std::to_string(value) + ", expected a finite number");
  }
}

/// Pads the outlier channels of one head; all arguments are of that head.
std::vector<int> pad_channels(std::vector<int> channels, const double* rms, int head_dim) {
  std::sort(channels.begin(), channels.end());
  channels.erase(std::unique(channels.begin(), channels.end()), channels.end());
  std::vector<int> others;
  for (int c = 0; c < head_dim; ++c) {
    if (!std::binary_search(channels.begin(), channels.end(), c)) others.push_back(c);
  }
  std::stable_sort(others.begin(), others.end(), [&](int a, int b) { return rms[a] > rms[b]; });
  for (int c : others) {
    if (channels.size() % kOutlierMultiple == 0) break;
    channels.push_back(c);
  }
  std::sort(channels.begin(), channels.end());
  return channels;
}

}  // namespace

std::vector<SideWidths> uniform_widths(int num_layers, int k, int v) {
  require_layers(static_cast<std::size_t>(std::max(num_layers, 0)));
  require_width(k);
  require_width(v);
  return std::vector<SideWidths>(static_cast<std::size_t>(num_layers), SideWidths{k, v});
}

std::vector<SideWidths> rank432_widths(const std::vector<LayerSummary>& layers) {
  require_layers(layers.size());
  for (std::size_t l = 0; l < layers.size(); ++l) {
    require_finite(layers[l].weight_mse, "weight_mse", l);
  }
  std::vector<std::size_t> ranking(layers.size());
  std::iota(ranking.begin(), ranking.end(), std::size_t{0});
  std::stable_sort(ranking.begin(), ranking.end(), [&](std::size_t a, std::size_t b) {
    return layers[a].weight_mse > layers[b].weight_mse;
  });
  std::vector<SideWidths> widths(layers.size(), SideWidths{3, 3});
  const std::size_t quarter = layers.size() / 4;
  for (std::size_t i = 0; i < quarter; ++i) {
    widths[ranking[i]] = {4, 4};
    widths[ranking[ranking.size() - 1 - i]] = {2, 2};
  }
  return widths;
}

std::vector<SideWidths> norm_ratio_widths(const std::vector<LayerSummary>& layers) {
  require_layers(layers.size());
  double sum = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    require_finite(layers[l].norm_ratio, "norm_ratio", l);
    sum += layers[l].norm_ratio;
  }
  const double mean = sum / static_cast<double>(layers.size());
  const int k = mean < 10 ? 3 : mean < 100 ? 6 : 8;
  return uniform_widths(static_cast<int>(layers.size()), k, 3);
}

std::vector<std::vector<std::vector<int>>> outlier83_channels(
    const std::vector<LayerSummary>& layers, const std::vector<std::vector<double>>& rms,
    int kv_heads, int head_dim) {
  if (kv_heads <= 0 || head_dim <= 0 || head_dim % kOutlierMultiple != 0) {
    throw ArgumentError("outlier83: " + std::to_string(kv_heads) + " KV heads of " +
                        std::to_string(head_dim) +
                        " channels, expected at least one head and a multiple of 8 channels");
  }
  if (rms.size() != layers.size()) {
    throw ArgumentError("outlier83: RMS of " + std::to_string(rms.size()) + " layers, expected " +
                        std::to_string(layers.size()));
  }
  const std::int64_t width = std::int64_t{kv_heads} * head_dim;
  std::vector<std::vector<std::vector<int>>> result;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    if (static_cast<std::int64_t>(rms[l].size()) != width) {
      throw ArgumentError("outlier83: RMS of " + std::to_string(rms[l].size()) +
                          " channels in layer " + std::to_string(l) + ", expected " +
                          std::to_string(width));
    }
    for (double value : rms[l]) require_finite(value, "channel RMS", l);
    std::vector<std::vector<int>> heads(static_cast<std::size_t>(kv_heads));
    for (int channel : layers[l].outlier_channels_k) {
      if (channel < 0 || channel >= width) {
        throw ArgumentError("outlier83: channel " + std::to_string(channel) + " of layer " +
                            std::to_string(l) + " is outside 0.." + std::to_string(width - 1));
      }
      heads[static_cast<std::size_t>(channel / head_dim)].push_back(channel % head_dim);
    }
    for (std::size_t h = 0; h < heads.size(); ++h) {
      heads[h] = pad_channels(std::move(heads[h]),
                              rms[l].data() + h * static_cast<std::size_t>(head_dim), head_dim);
    }
    result.push_back(std::move(heads));
  }
  return result;
}

}  // namespace kvplan::planner
