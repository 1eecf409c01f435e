#pragma once
// JSON of a calibration text, as profiles and plans name it. Private to schemas.

#include "schemas/json_fields.h"
#include "schemas/types.h"

namespace kvplan {

nlohmann::json source_to_json(const ProfileSource& source);
ProfileSource source_from_json(JsonObject object);

}  // namespace kvplan
