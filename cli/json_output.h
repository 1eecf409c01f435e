#pragma once
// The one JSON document that belongs to no file format: a model as `inspect --json` prints it.

#include <string>

#include "models/model.h"

namespace kvplan::cli {

std::string model_json(const models::ModelReader& model);

}  // namespace kvplan::cli
