#pragma once
// One function per target: an exported plan's files. Private to exporters.

#include <vector>

#include "exporters/export.h"

namespace kvplan::exporters {

/// May add notes to the report.
using Writer = std::vector<ExportFile> (*)(const PlanBundle& bundle, const ExportOptions& options,
                                           Projection& projection);

std::vector<ExportFile> write_vllm(const PlanBundle&, const ExportOptions&, Projection&);
std::vector<ExportFile> write_kv_scales(const PlanBundle&, const ExportOptions&, Projection&);
std::vector<ExportFile> write_sglang(const PlanBundle&, const ExportOptions&, Projection&);
std::vector<ExportFile> write_modelopt(const PlanBundle&, const ExportOptions&, Projection&);
std::vector<ExportFile> write_llamacpp(const PlanBundle&, const ExportOptions&, Projection&);
std::vector<ExportFile> write_kvtuner(const PlanBundle&, const ExportOptions&, Projection&);
std::vector<ExportFile> write_hf(const PlanBundle&, const ExportOptions&, Projection&);
std::vector<ExportFile> write_lmdeploy(const PlanBundle&, const ExportOptions&, Projection&);

/// GGUF with the mean of every quantised layer's keys as they are cached (PrismML's
/// --kv-mean-center). InputError: a plan without means after rotary.
std::string mean_centre_gguf(const PlanBundle& bundle, const Projection& projection,
                             const std::string& file);

/// Layers that stay plain on both sides, as vLLM's skip list names them ("0", "sliding_window").
std::vector<std::string> vllm_skip_list(const Projection& projection);

}  // namespace kvplan::exporters
