// LMDeploy: one policy for the whole cache.

#include "exporters/writers.h"

namespace kvplan::exporters {

std::vector<ExportFile> write_lmdeploy(const PlanBundle&, const ExportOptions&,
                                       Projection& projection) {
  const bool pytorch_only = projection.setting == "turbo_quant" || projection.setting == "fp8";
  return {{"lmdeploy.args", std::string(pytorch_only ? "--backend pytorch " : "") +
                                "--quant-policy " + std::to_string(projection.setting_number) +
                                "\n"}};
}

}  // namespace kvplan::exporters
