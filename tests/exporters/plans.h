#pragma once
// Small plans in memory for the tests of exporters.

#include <array>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "exporters/export.h"
#include "schemas/plan.h"

namespace kvplan::exporters::test {

using Bits = std::vector<std::array<double, 2>>;  // by layer: K, V

struct PlanShape {
  int kv_heads = 2, head_dim = 64, queries_per_kv = 2;
};

/// A plan with these mean widths, the same in all heads and groups, without sinks, centres and
/// rotation. Fractions appear as `bits` alone.
inline PlanBundle make_plan(const Bits& bits, const std::string& codec = "int",
                            const PlanShape& shape = {}) {
  PlanBundle bundle;
  Plan& plan = bundle.plan;
  plan.model.architecture = "llama";
  plan.model.num_layers = static_cast<int>(bits.size());
  plan.model.kv_heads = shape.kv_heads;
  plan.model.query_heads = shape.kv_heads * shape.queries_per_kv;
  plan.model.head_dim = plan.model.rotary_dim = shape.head_dim;
  plan.context = 4096;
  plan.sink_tokens = 0;
  plan.policy = "test";
  plan.codec = codec;
  plan.group_size = shape.head_dim;
  plan.norm = "fp16";
  plan.scale_rule = "one";
  plan.centre = false;
  plan.predicted_kl = 0.01;
  double payload = 0;
  const auto heads = static_cast<std::size_t>(shape.kv_heads);
  for (std::size_t l = 0; l < bits.size(); ++l) {
    LayerPlan& layer = plan.layers.emplace_back();
    layer.index = static_cast<int>(l);
    layer.rotated_cost_k = 0.2;
    layer.rotated_cost_v = 0.1;
    LayerTensors& tensors = bundle.tensors.layers.emplace_back();
    for (const Side side : kSides) {
      const double width = bits[l][static_cast<std::size_t>(side)];
      layer.side(side).bits = width;
      layer.side(side).heads.assign(heads, {.widths = {static_cast<int>(width)}, .outliers = {}});
      payload += width * shape.kv_heads * shape.head_dim;
      if (width < kFp16Width) payload += 16 * shape.kv_heads;
      Array<float>& absmax = tensors.side(side).absmax;
      absmax = Array<float>({shape.kv_heads});
      for (std::size_t h = 0; h < heads; ++h)
        absmax.data[h] = static_cast<float>(l + 1) * (side == Side::kKey ? 2.0f : 1.0f) +
                         0.5f * static_cast<float>(h);
    }
  }
  plan.effective_bits = plan.effective_bits_at_context =
      payload / static_cast<double>(elements_per_token(plan.model));
  plan.bytes_per_token = static_cast<std::int64_t>(payload / 8);
  return bundle;
}

inline PlanBundle uniform_plan(int layers, double k, double v, const std::string& codec = "int",
                               const PlanShape& shape = {}) {
  return make_plan(Bits(static_cast<std::size_t>(layers), {k, v}), codec, shape);
}

/// A file of an export, or "(none)".
inline std::string file_of(const Export& result, const std::string& name) {
  for (const ExportFile& file : result.files)
    if (file.name == name) return file.bytes;
  return "(none)";
}

/// "CODE/class/layers" of every item.
inline std::vector<std::string> items(const LossReport& report, bool counted_only = true) {
  std::vector<std::string> out;
  for (const LossItem& item : report.items)
    if (item.counted() || !counted_only)
      out.push_back(item.code + "/" + loss_class_name(item.loss) + "/" + layer_ranges(item.layers));
  return out;
}

}  // namespace kvplan::exporters::test
