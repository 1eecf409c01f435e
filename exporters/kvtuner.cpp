// KVTuner: widths per layer and side, or per KV head, as YAML.

#include "exporters/writers.h"

namespace kvplan::exporters {

std::vector<ExportFile> write_kvtuner(const PlanBundle&, const ExportOptions& options,
                                      Projection& projection) {
  const auto pair = [](const std::string& k, const std::string& v) {
    return "{nbits_key: " + k + ", nbits_value: " + v + "}";
  };
  std::string yaml;
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    yaml += std::to_string(l) + ":";
    if (projection.heads.empty()) {
      yaml += " " +
              pair(projection.format(l, Side::kKey).name, projection.format(l, Side::kValue).name) +
              "\n";
      continue;
    }
    yaml += "\n";
    const auto& [k, v] = projection.heads[static_cast<std::size_t>(l)];
    for (std::size_t h = 0; h < k.size(); ++h) {
      const auto name = [&](int format) {
        return projection.stack.formats[static_cast<std::size_t>(format)].name;
      };
      yaml += "  " + std::to_string(h) + ": " + pair(name(k[h]), name(v[h])) + "\n";
    }
  }
  return {{"kvplan_" + options.stack.scheme + ".yaml", yaml}};
}

}  // namespace kvplan::exporters
