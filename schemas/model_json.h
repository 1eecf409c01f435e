#pragma once
// ModelSpec as JSON. Private to schemas: the `model` object of profile.json and plan.json.

#include <nlohmann/json.hpp>

#include "schemas/json_fields.h"
#include "schemas/types.h"

namespace kvplan {

nlohmann::json model_to_json(const ModelSpec& model);

/// Refuses (InputError) counts that no cache can have: KV heads that do not divide the query heads,
/// an odd rotary_dim.
ModelSpec model_from_json(JsonObject object);

}  // namespace kvplan
