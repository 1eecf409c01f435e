#pragma once
// Plans of published codecs by name: what `validate --baselines` compares with and what `plan
// --policy` takes.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "schemas/plan.h"
#include "schemas/profile.h"

namespace kvplan::quant {

/// Builds the plan of a named codec (docs/baselines.md has them all) for a model: sizes from the
/// codec's packed buffers, static_bytes as in Fit::assemble, no prediction.
///   fp16 q8_0 q4_0 q4_1 q5_0 q5_1 iq4_nl nvfp4 mxfp4 fp8_e4m3 fp8_e5m2
///   kivi:B                     B = 1..8, groups of 32: B + 1 bits
///   int:B, int:K/V [+gN]       2..8 bits, absmax, one fp16 scale per token and head or group of N
///   polar:B [+edge]            fp16 radius and B-bit angle of pairs
///   turboquant:B, :K/V         shared Haar rotation, Lloyd-Max book of the exact dimension, fp16
///                              norm; options follow, each after a "+":
///     haar hadamard rht rht2 none | heads | one nc biased unbiased | beta gauss uniform | block=N
///     std | prod prodkv | rademacher orthogonal | m=N m=Nd m=d/N | split=N outliers=N | centre
/// What serving stacks store, by their own names; K and V differ in some:
///   q6_0                       ik_llama.cpp
///   q4_0+wht=T and so on       llama.cpp: an unsigned Hadamard transform of T coordinates first
///   fp8_e4m3+tensor, +unit     one static scale of all heads, or 1; nvfp4+unit: tensor scale 1
///   int8_per_token_head, int4_per_token_head                vLLM
///   turboquant_k8v4, _4bit_nc, _k3v4_nc, _3bit_nc           vLLM
///   kvtuner:B, kvtuner:B+pertoken, hf:B+gN                  B = 1..8
///   lmdeploy_int8, lmdeploy_int4, lmdeploy_turbo
/// `seed` is the rotation seed. `inv_freq` is that of all layers; a profile's has precedence. A
/// profile of the model is needed by split, outliers (the channels of largest E x^2 after rotary in
/// each head) and centre, and gives fp8 and nvfp4 their static scales (1 without it); the plan then
/// names the profile's texts. ArgumentError names the accepted forms, or what the model lacks.
PlanBundle baseline_plan(std::string_view name, const ModelSpec& model, int sink_tokens,
                         std::int64_t context, std::uint64_t seed,
                         const std::vector<double>& inv_freq, const Profile* profile = nullptr);

/// The baselines nearest to `effective_bits`: q8_0 and q4_0 where the model's rows divide into
/// their blocks, and TurboQuant and KIVI at the nearest bits.
std::vector<std::string> nearest_baselines(double effective_bits, const ModelSpec& model);

}  // namespace kvplan::quant
