#pragma once
// Baseline policies: published rules that give widths per layer and side from a few figures of the
// profile.

#include <vector>

#include "schemas/profile.h"

namespace kvplan::planner {

struct SideWidths {
  int k = 0, v = 0;
  bool operator==(const SideWidths&) const = default;
};

/// The same widths in every layer. ArgumentError: widths other than 0..8 and kFp16Width, no layers.
std::vector<SideWidths> uniform_widths(int num_layers, int k, int v);

/// Layers ranked by weight-MSE sensitivity, largest first, equal ones by layer: the first
/// floor(L/4) get 4 bits, the last floor(L/4) 2, the rest 3. ArgumentError: no layers, values that
/// are not finite.
std::vector<SideWidths> rank432_widths(const std::vector<LayerSummary>& layers);

/// Mean over the layers of the K/V norm ratio: below 10 K3V3, below 100 K6V3, else K8V3.
/// ArgumentError as above.
std::vector<SideWidths> norm_ratio_widths(const std::vector<LayerSummary>& layers);

/// Key channels at 8 bits by the RMS rule of the summary (the rest of K, and V, get 3 bits), as
/// [layer][head] lists of channels of the head, ascending. Each list is padded to a multiple of 8
/// with the channels of next largest RMS (equal ones: lower channel first); a head without outlier
/// channels has none.
///   rms  [layer][head*head_dim + channel] of k before rotary
/// ArgumentError: sizes that do not match, channels outside the layer, values that are not finite,
/// a head_dim that is no multiple of 8.
std::vector<std::vector<std::vector<int>>> outlier83_channels(
    const std::vector<LayerSummary>& layers, const std::vector<std::vector<double>>& rms,
    int kv_heads, int head_dim);

}  // namespace kvplan::planner
