#include "exporters/export.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "exporters/writers.h"
#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan::exporters {
namespace {

struct Target {
  std::string_view name;
  Writer write;
};
constexpr Target kWriters[] = {{"vllm", write_vllm},
                               {"sglang", write_sglang},
                               {"kv-scales", write_kv_scales},
                               {"modelopt", write_modelopt},
                               {"llamacpp", write_llamacpp},
                               {"kvtuner", write_kvtuner},
                               {"hf", write_hf},
                               {"lmdeploy", write_lmdeploy}};

void check_options(std::string_view target, const ExportOptions& options) {
  const auto only_for = [&](bool given, const char* flag, auto... targets) {
    if (given && !((target == targets) || ...))
      throw ArgumentError(std::string(flag) + " means nothing to target " + std::string(target));
  };
  only_for(options.per_head, "--per-head", "kv-scales", "kvtuner");
  only_for(options.tensor_parallel != 1, "--tp", "sglang");
  only_for(!options.model.empty(), "--model", "kv-scales", "sglang", "modelopt");
  only_for(!options.mean_centre.empty(), "--mean-centre", "llamacpp");
  if (options.tensor_parallel < 1)
    throw ArgumentError("--tp: expected 1 or more ranks, found " +
                        std::to_string(options.tensor_parallel));
}

}  // namespace

Export export_plan(std::string_view target, const PlanBundle& bundle,
                   const ExportOptions& options) {
  const auto writer = std::ranges::find(kWriters, target, &Target::name);
  if (writer == std::end(kWriters))
    throw ArgumentError("unknown target '" + std::string(target) + "': expected " + target_names());
  check_options(target, options);
  const Stack stack = make_stack(target, shape_of(bundle.plan), bundle.plan.model.architecture,
                                 options.stack, options.file);
  Export out{.projection = project(bundle, stack,
                                   {.allow_lower = options.allow_lower,
                                    .mean_centre = !options.mean_centre.empty(),
                                    .head_widths = target == "kvtuner" && options.per_head,
                                    .file = options.file}),
             .files = {}};
  LossReport& report = out.projection.report;
  if (!options.target_version.empty() && options.target_version != report.target_version) {
    report.note("UNVERIFIED", "what is exported was read in version " + report.target_version);
    report.target_version = options.target_version;
  }
  out.files = writer->write(bundle, options, out.projection);
  return out;
}

std::string manifest_json(const Export& result, const PlanBundle& bundle,
                          const std::string& program, const std::string& command) {
  const LossReport& report = result.projection.report;
  nlohmann::ordered_json files = nlohmann::ordered_json::object();
  for (const ExportFile& file : result.files) files[file.name] = sha256(file.bytes);
  nlohmann::ordered_json out = {{"format", "kvplan.export"}, {"version", 1}};
  out["plan_sha256"] = bundle.sha256;
  out["target"] = report.target;
  out["dialect"] = report.dialect.empty() ? nlohmann::ordered_json(nullptr)
                                          : nlohmann::ordered_json(report.dialect);
  out["target_version"] = report.target_version;
  out["program"] = program;
  out["command"] = command;
  out["files"] = files;
  return out.dump(1) + "\n";
}

}  // namespace kvplan::exporters
