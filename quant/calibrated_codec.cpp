// The calibrated codec of a plan: analysis and synthesis matrices from the plan's tensors
// (docs/formats/packing.md).

#include <string>

#include "quant/codebook.h"
#include "quant/transform_spec.h"
#include "quant/trellis.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

const Array<float>& checked(const Array<float>& tensor, const std::vector<std::int64_t>& shape,
                            const std::string& name) {
  if (tensor.shape == shape) return tensor;
  const auto listed = [](const std::vector<std::int64_t>& dims) {
    std::string text;
    for (const auto n : dims) text.append(" ").append(std::to_string(n));
    return text.empty() ? " none" : text;
  };
  throw InputError("plan.safetensors", name,
                   "expected shape" + listed(shape) + ", found" + listed(tensor.shape));
}

CodeRun make_run(const PlanTensors& tensors, int width, int begin) {
  const auto levels = tensors.levels.find(width);
  const std::string name = "levels." + std::to_string(width);
  if (levels == tensors.levels.end())
    throw InputError("plan.safetensors", name, "the plan uses this width but has no levels for it");
  if (levels->second.size() != std::size_t{1} << width)
    throw InputError("plan.safetensors", name,
                     "expected " + std::to_string(1 << width) + " levels, found " +
                         std::to_string(levels->second.size()));
  for (std::size_t i = 1; i < levels->second.size(); ++i)
    if (!(levels->second[i - 1] < levels->second[i]))
      throw InputError("plan.safetensors", name, "expected ascending levels");
  return {begin, begin, width, levels->second, midpoints(levels->second)};
}

CodeRun make_trellis_run(const PlanTensors& tensors, int width, int begin) {
  const auto values = tensors.trellis.find(width);
  const std::string name = "lut." + std::to_string(width);
  if (values == tensors.trellis.end())
    throw InputError("plan.safetensors", name,
                     "the plan codes this width by a trellis but has no values for it");
  if (values->second.size() != kTrellisStates)
    throw InputError("plan.safetensors", name,
                     "expected " + std::to_string(kTrellisStates) + " values, found " +
                         std::to_string(values->second.size()));
  return {begin, begin, width, values->second, {}};
}

}  // namespace

TransformCodecSpec calibrated_spec(const PlanBundle& bundle, int layer, Side side) {
  const SidePlan& plan = side_plan(bundle, layer, side);
  const ModelSpec& model = bundle.plan.model;
  const int d = model.head_dim, group_size = bundle.plan.group_size;
  const std::string pointer = side_pointer(layer, side) + "/heads/";
  TransformCodecSpec spec;
  spec.geometry = {model.kv_heads, d};
  spec.scale_rule = parse_scale_rule(bundle.plan);
  spec.norm = parse_norm(bundle.plan);
  for (std::size_t h = 0; h < plan.heads.size(); ++h) {
    const std::string head_pointer = pointer + std::to_string(h);
    HeadTransform& head = spec.heads.emplace_back();
    head.fp16 = is_fp16_head(plan.heads[h], head_pointer);
    if (head.fp16) continue;
    const std::vector<int>& widths = plan.heads[h].widths;
    if (group_size < 1 || static_cast<std::int64_t>(widths.size()) * group_size != d)
      throw InputError("plan.json", head_pointer + "/widths",
                       "expected one width per group of " + std::to_string(group_size) + " of " +
                           std::to_string(d) + " coordinates, found " +
                           std::to_string(widths.size()));
    if (!plan.heads[h].outliers.empty())
      throw InputError("plan.json", head_pointer + "/outliers",
                       "calibrated plans have no outlier channels; expected none");
    const bool trellis = bundle.plan.code == "tcq" && uses_trellis(widths, group_size);
    for (std::size_t g = 0; g < widths.size() && widths[g] > 0; ++g) {
      const int begin = static_cast<int>(g) * group_size;
      if (head.runs.empty() || head.runs.back().width != widths[g])
        head.runs.push_back(trellis && widths[g] <= kMaxTrellisWidth
                                ? make_trellis_run(bundle.tensors, widths[g], begin)
                                : make_run(bundle.tensors, widths[g], begin));
      head.runs.back().end = begin + group_size;
    }
    for (std::size_t g = 1; g < widths.size(); ++g)
      if (widths[g] > widths[g - 1])
        throw InputError("plan.json", head_pointer + "/widths", "expected descending widths");

    if (static_cast<std::size_t>(layer) >= bundle.tensors.layers.size())
      throw InputError("plan.safetensors", tensor_name(layer, side, "analysis"), "missing");
    const SideTensors& tensors = bundle.tensors.layers[static_cast<std::size_t>(layer)].side(side);
    const Array<float>& analysis =
        checked(tensors.analysis, {model.kv_heads, d, d}, tensor_name(layer, side, "analysis"));
    const Array<float>& synthesis =
        checked(tensors.synthesis, {model.kv_heads, d, d}, tensor_name(layer, side, "synthesis"));
    const Array<float>& lambda =
        checked(tensors.lambda, {model.kv_heads, d}, tensor_name(layer, side, "lambda"));
    const int coded = head.coded();
    const auto rows =
        analysis.row(h).first(static_cast<std::size_t>(coded) * static_cast<std::size_t>(d));
    head.analysis.assign(rows.begin(), rows.end());
    for (int i = 0; i < d; ++i) {
      head.channels.push_back(i);
      for (int j = 0; j < coded; ++j)
        head.synthesis.push_back(synthesis.row(h)[static_cast<std::size_t>(i * d + j)]);
    }
    const auto weights = lambda.row(h).first(static_cast<std::size_t>(coded));
    head.weight.assign(weights.begin(), weights.end());
  }
  spec.mean = side_mean(bundle, layer, side);
  return spec;
}

std::unique_ptr<Codec> make_calibrated_codec(const PlanBundle& bundle, int layer, Side side) {
  return make_transform_codec(calibrated_spec(bundle, layer, side));
}

}  // namespace kvplan::quant
