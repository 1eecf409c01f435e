#pragma once
// How the codec families read a plan's side into the spec of a transform codec. Private to quant.

#include <optional>
#include <string>

#include "quant/codec_checks.h"
#include "quant/transform_codec.h"

namespace kvplan::quant {

/// The options that both families read from a plan. InputError for unknown names.
ScaleRule parse_scale_rule(const Plan& plan);
NormFormat parse_norm(const Plan& plan);
/// The mean of a side if the plan centres; InputError when its tensors are missing or have other
/// shapes.
std::optional<RotaryMean> side_mean(const PlanBundle& bundle, int layer, Side side);
/// All widths of a head kFp16Width; InputError when only some are, or one is outside 0..8.
bool is_fp16_head(const HeadPlan& head, const std::string& pointer);

/// Trellis codes too.
TransformCodecSpec calibrated_spec(const PlanBundle& bundle, int layer, Side side);
/// InputError when the plan needs a vector codec.
TransformCodecSpec rotated_spec(const PlanBundle& bundle, int layer, Side side);
TransformCodecSpec fp16_spec(const PlanBundle& bundle, int layer, Side side);

}  // namespace kvplan::quant
