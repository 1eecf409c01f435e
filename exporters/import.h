#pragma once
// Plans of other tools as plans of ours, for comparison. Widths and the codec come from the file;
// nothing is invented: what it does not say is null in the plan.

#include <filesystem>
#include <string>
#include <string_view>

#include "schemas/plan.h"

namespace kvplan::exporters {

inline constexpr std::string_view kImportFormats[] = {"kvtuner", "modelopt"};

struct ImportOptions {
  ModelSpec model;           // that the file is for
  std::int64_t context = 0;  // that the model declares
  std::string scheme = {};   // kvtuner: kivi or pertoken; empty: from the file's name
};

/// A KVTuner preset (YAML), a layer or a head level. InputError: broken YAML (line), layers that
/// are missing or too many, a width outside 1..8, a name that tells no scheme.
PlanBundle import_kvtuner(std::string_view text, const std::string& file,
                          const ImportOptions& options);

/// ModelOpt's hf_quant_config.json or config.json. InputError with the JSON pointer: unknown names,
/// a layer twice, another schema version, no format of keys and values at all.
PlanBundle import_modelopt(std::string_view text, const std::string& file,
                           const ImportOptions& options);

/// The model of a config.json alone (Hugging Face): geometry and rotary embedding, no weights.
/// `max_context` receives max_position_embeddings, 0 when absent.
ModelSpec model_of_config(std::string_view text, const std::string& file,
                          std::int64_t& max_context);

/// Reads `file` (at most 4 MiB) and imports it. ArgumentError for an unknown format.
PlanBundle import_plan(std::string_view format, const std::filesystem::path& file,
                       const ImportOptions& options);

}  // namespace kvplan::exporters
