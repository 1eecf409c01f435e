#pragma once
// Outcomes of studies as one JSON document and as Markdown (docs/formats/study.md).

#include <optional>
#include <string>
#include <vector>

#include "studies/study.h"

namespace kvplan::studies {

/// What the figures were measured with.
struct StudyRun {
  std::string program;
  std::uint64_t seed = 0;
  /// "SmolLM2.gguf: llama, 30 layers, 3 KV heads of 64"; empty without a model.
  std::string model;
  std::string text;  // files, parts, windows
};

/// Sorted keys; infinite bounds are null. No clock and no run times: equal runs give equal bytes.
std::string study_json(const std::vector<Outcome>& outcomes, const StudyRun& run);

/// A page: table of verdicts, then every study with claim, source, checks, tables, explanation.
std::string study_markdown(const std::vector<Outcome>& outcomes, const StudyRun& run);

}  // namespace kvplan::studies
