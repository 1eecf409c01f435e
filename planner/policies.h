#pragma once
// Baseline policies: published rules that give widths per layer and side from a few figures of the profile.

#include <string>
#include <vector>

#include "schemas/profile.h"

namespace kvplan::planner {

struct SideWidths {
  int k = 0, v = 0;
};

/// The same width everywhere.
std::vector<SideWidths> uniform_widths(int num_layers, int k, int v);

/// Top 25 % of layers by weight-MSE sensitivity 4 bits, bottom 25 % 2, the rest 3; both counts rounded down; ties to the lower layer.
std::vector<SideWidths> rank432_widths(const std::vector<LayerSummary>& layers);

/// Model's mean K/V norm ratio < 10: K3V3; < 100: K6V3; else K8V3.
std::vector<SideWidths> norm_ratio_widths(const std::vector<LayerSummary>& layers);

/// Outlier channels (RMS rule of the summary) at 8 bits, the rest and V at 3 bits: channels per layer and KV head, padded to
/// multiples of 8 with the next largest RMS channels. rms[layer][head*head_dim + channel] of k before rotary.
std::vector<std::vector<std::vector<int>>> outlier83_channels(const std::vector<LayerSummary>& layers,
                                                              const std::vector<std::vector<double>>& rms, int kv_heads, int head_dim);

}  // namespace kvplan::planner
