// vLLM: one dtype for the whole cache and a list of layers that stay at the model's dtype.

#include <algorithm>

#include "exporters/writers.h"

namespace kvplan::exporters {

std::vector<std::string> vllm_skip_list(const Projection& projection) {
  const auto plain = [&](int l) { return projection.format(l, Side::kKey).plain(); };
  bool all_sliding = true, any_sliding = false;
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    if (projection.shape.layers[static_cast<std::size_t>(l)].kind != "sliding") continue;
    any_sliding = true;
    all_sliding = all_sliding && plain(l);
  }
  const bool by_kind = any_sliding && all_sliding;
  std::vector<std::string> skipped;
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    const LayerShape& layer = projection.shape.layers[static_cast<std::size_t>(l)];
    if (!layer.cached() || !plain(l) || (by_kind && layer.kind == "sliding")) continue;
    skipped.push_back(std::to_string(l));
  }
  if (by_kind) skipped.push_back("sliding_window");
  return skipped;
}

std::vector<ExportFile> write_vllm(const PlanBundle&, const ExportOptions&,
                                   Projection& projection) {
  bool quantised = false;
  for (int l = 0; l < projection.shape.num_layers(); ++l)
    quantised = quantised || (projection.cached(l) && !projection.format(l, Side::kKey).plain());
  const std::string dtype = quantised ? projection.setting : "auto";
  std::string args = "--kv-cache-dtype " + dtype, yaml = "kv-cache-dtype: " + dtype + "\n";
  const auto skipped = quantised ? vllm_skip_list(projection) : std::vector<std::string>{};
  if (!skipped.empty()) {
    args += " --kv-cache-dtype-skip-layers";
    std::string list;
    for (const std::string& entry : skipped) {
      args += " " + entry;
      list += (list.empty() ? "\"" : ", \"") + entry + "\"";
    }
    yaml += "kv-cache-dtype-skip-layers: [" + list + "]\n";
  }
  return {{"vllm.args", args + "\n"}, {"vllm.yaml", yaml}};
}

}  // namespace kvplan::exporters
