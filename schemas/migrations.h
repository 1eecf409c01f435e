#pragma once
// Documents of earlier builds as this one reads them. Private to schemas.
//
// A field that joins a format is added here with the value that older documents mean by its
// absence, and its version stays. A change that older programs would misread raises the version;
// the step from n to n + 1 is then written here, and kept (docs/compatibility.md).

#include <nlohmann/json.hpp>

namespace kvplan {

/// `document` as parsed; what is no such document is left to its reader, which refuses it.
void migrate_plan(nlohmann::json& document);
void migrate_validation(nlohmann::json& document);

}  // namespace kvplan
