#pragma once
// Plans that need no profile: block formats, KIVI, TurboQuant, fp16; what `validate --baselines` compares with.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "schemas/plan.h"

namespace kvplan::quant {

/// Parses "fp16", "q8_0", "q4_0", "kivi:2", "kivi:4", "turboquant:B" (B = 1..8), "turboquant:K/V" (e.g. 6/3) and builds the plan for
/// a model: effective_bits and bytes filled in from the codec. `seed` is the rotation seed of turboquant.
/// ArgumentError names the accepted forms.
PlanBundle baseline_plan(std::string_view name, const ModelSpec& model, int sink_tokens, std::int64_t context, std::uint64_t seed,
                         const std::vector<double>& inv_freq);

/// The baselines nearest to `effective_bits`: q8_0, q4_0, and TurboQuant and KIVI at the nearest bits.
std::vector<std::string> nearest_baselines(double effective_bits, const ModelSpec& model);

}  // namespace kvplan::quant
