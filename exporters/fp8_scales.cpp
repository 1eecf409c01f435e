// fp8 with static scales: an overlay of the checkpoint (vLLM, SGLang) and SGLang's JSON.

#include <algorithm>

#include "exporters/checkpoint.h"
#include "exporters/writers.h"
#include "schemas/error.h"

namespace kvplan::exporters {
namespace {

using nlohmann::ordered_json;

constexpr const char* kSglangScales = "sglang_kv_scales.json";

std::vector<ExportFile> overlay(const PlanBundle& bundle, const ExportOptions& options,
                                Checkpoint& checkpoint, Projection& projection) {
  const ScaleNames names = add_fp8_scheme(checkpoint, options.per_head);
  auto files = scale_files(bundle, checkpoint, names, options.file, projection);
  files.push_back({"config.json", json_text(checkpoint.config)});
  return files;
}

/// One float per layer, the larger of K and V, under each rank.
std::string sglang_json(const PlanBundle& bundle, const ExportOptions& options,
                        const std::string& model_type, const Projection& projection) {
  ordered_json factors = ordered_json::object();
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    const auto k = absmax_of(bundle, l, Side::kKey, options.file),
               v = absmax_of(bundle, l, Side::kValue, options.file);
    factors[std::to_string(l)] = std::max(std::ranges::max(k), std::ranges::max(v)) / kFp8Max;
  }
  ordered_json ranks = ordered_json::object();
  for (int rank = 0; rank < options.tensor_parallel; ++rank) ranks[std::to_string(rank)] = factors;
  return json_text({{"model_type", model_type},
                    {"kv_cache", {{"dtype", "float8_e4m3fn"}, {"scaling_factor", ranks}}}});
}

}  // namespace

std::vector<ExportFile> write_kv_scales(const PlanBundle& bundle, const ExportOptions& options,
                                        Projection& projection) {
  if (options.model.empty())
    throw ArgumentError(
        "target kv-scales adds tensors to a checkpoint: give the original Hugging "
        "Face folder as --model");
  Checkpoint checkpoint = read_checkpoint(options.model, projection.shape);
  auto files = overlay(bundle, options, checkpoint, projection);
  std::string args = "--kv-cache-dtype auto";
  const auto skipped = vllm_skip_list(projection);
  if (!skipped.empty()) args += " --kv-cache-dtype-skip-layers";
  for (const std::string& entry : skipped) args += " " + entry;
  files.push_back({"vllm.args", args + "\n"});
  return files;
}

std::vector<ExportFile> write_sglang(const PlanBundle& bundle, const ExportOptions& options,
                                     Projection& projection) {
  std::vector<ExportFile> files;
  std::string model_type = bundle.plan.model.architecture;
  if (options.model.empty()) {
    projection.report.note("SCALES", "without --model no scales in the checkpoint, JSON alone");
  } else {
    Checkpoint checkpoint = read_checkpoint(options.model, projection.shape);
    const ordered_json stated = checkpoint.config.value("model_type", ordered_json());
    if (stated != model_type)
      throw InputError(
          (options.model / "config.json").string(), "/model_type",
          "expected \"" + model_type + "\", the plan's architecture, found " + stated.dump());
    files = overlay(bundle, options, checkpoint, projection);
  }
  files.push_back({kSglangScales, sglang_json(bundle, options, model_type, projection)});
  files.push_back({"sglang.args", std::string("--kv-cache-dtype fp8_e4m3 "
                                              "--quantization-param-path ") +
                                      kSglangScales + "\n"});
  return files;
}

}  // namespace kvplan::exporters
