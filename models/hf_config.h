#pragma once
// config.json of a Hugging Face folder.

#include <filesystem>

#include "models/families.h"
#include "models/model.h"

namespace kvplan::models {

struct HfConfig {
  const Family* family = nullptr;
  ModelConfig config;
};

/// InputError naming the field for a setting that is missing, of another type, not supported, or
/// unknown: what may change the forward pass is never ignored.
HfConfig read_hf_config(const std::filesystem::path& file);

}  // namespace kvplan::models
