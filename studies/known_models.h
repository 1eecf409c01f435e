#pragma once
// Models that publications name, recognised by their geometry, and the candidates that several
// studies of a model share.

#include <array>
#include <string_view>

#include "schemas/types.h"
#include "studies/model_lab.h"

namespace kvplan::studies {

/// "Qwen2.5-1.5B" and the like, or empty. Fine-tuned versions of a model count as the model.
std::string_view known_model(const ModelSpec& spec);

/// K/V bits of the rotated codecs that "smallest configuration under a limit" is chosen from.
struct KvBits {
  int k = 0, v = 0;
};
inline constexpr std::array<KvBits, 8> kGrid = {
    {{3, 3}, {4, 3}, {6, 3}, {8, 3}, {4, 4}, {5, 4}, {6, 4}, {8, 4}}};

/// kGrid as baselines, in its order.
ModelLab::NamedBundles grid_bundles(ModelLab& lab);

/// Effective bits of the calibrated plans that are compared with baselines.
inline constexpr std::array<double, 4> kPlanBits = {2.5, 2.75, 3.25, 3.5};

/// A published perplexity limit for "neutral enough".
inline constexpr double kPerplexityLimit = 0.05;

}  // namespace kvplan::studies
