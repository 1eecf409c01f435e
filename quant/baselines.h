#pragma once
// Plans that need no profile: block formats, KIVI, TurboQuant, fp16; what `validate --baselines`
// compares with.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "schemas/plan.h"

namespace kvplan::quant {

/// Builds the plan of a named baseline for a model, its sizes taken from the codec's packed
/// buffers:
///   fp16, q8_0, q4_0      16, 8.5 and 4.5 bits
///   kivi:B                B = 1..8, groups of 32: B + 1 bits
///   turboquant:B or :K/V  as published: shared Haar rotation, Lloyd-Max book of the exact
///   dimension, fp16 norm, B = 1..8 turboquant+:B or :K/V the same with the norm corrected
/// `seed` is the rotation seed of turboquant. ArgumentError names the accepted forms, or what the
/// model lacks.
PlanBundle baseline_plan(std::string_view name, const ModelSpec& model, int sink_tokens,
                         std::int64_t context, std::uint64_t seed,
                         const std::vector<double>& inv_freq);

/// The baselines nearest to `effective_bits`: q8_0 and q4_0 where the model's rows divide into
/// their blocks, and TurboQuant and KIVI at the nearest bits.
std::vector<std::string> nearest_baselines(double effective_bits, const ModelSpec& model);

}  // namespace kvplan::quant
