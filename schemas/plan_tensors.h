#pragma once
// plan.safetensors: the tensors of a plan by name. Private to schemas.

#include <filesystem>
#include <string>

#include "schemas/plan.h"
#include "schemas/safetensors.h"

namespace kvplan {

/// All tensors of the bundle, borrowed: it must outlive the writer. InternalError: a shape that the
/// plan does not give, a non-finite value, a tensor that the codec needs missing.
SafetensorsWriter collect_plan_tensors(const PlanBundle& bundle);

/// Reads and checks plan.safetensors against its plan: SHA-256, names, shapes, finite values,
/// completeness. InputError.
PlanTensors read_plan_tensors(const Plan& plan, const std::filesystem::path& file,
                              const std::string& sha256);

}  // namespace kvplan
