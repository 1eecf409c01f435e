#include "quant/transform_spec.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "schemas/error.h"

namespace kvplan::quant {
namespace {

template <class T>
T parse(const std::string& name, const char* field,
        std::initializer_list<std::pair<const char*, T>> accepted) {
  std::string names;
  for (const auto& [known, value] : accepted) {
    if (name == known) return value;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  throw InputError("plan.json", field, "expected one of " + names + ", found " + name);
}

}  // namespace

ScaleRule parse_scale_rule(const Plan& plan) {
  return parse<ScaleRule>(plan.scale_rule, "/scale_rule",
                          {{"one", ScaleRule::kOne},
                           {"norm_corrected", ScaleRule::kNormCorrected},
                           {"biased", ScaleRule::kBiased},
                           {"unbiased", ScaleRule::kUnbiased}});
}

NormFormat parse_norm(const Plan& plan) {
  return parse<NormFormat>(plan.norm, "/norm",
                           {{"log8", NormFormat::kLog8}, {"fp16", NormFormat::kFp16}});
}

std::optional<RotaryMean> side_mean(const PlanBundle& bundle, int layer, Side side) {
  if (!bundle.plan.centre) return std::nullopt;
  const ModelSpec& model = bundle.plan.model;
  if (static_cast<std::size_t>(layer) >= bundle.tensors.layers.size())
    throw InputError("plan.safetensors", tensor_name(layer, side, "mean"),
                     "a plan that centres needs the means of every layer, found none");
  const LayerTensors& tensors = bundle.tensors.layers[static_cast<std::size_t>(layer)];
  const Array<float>& mean = tensors.side(side).mean;
  if (mean.shape != std::vector<std::int64_t>{model.kv_heads, model.head_dim})
    throw InputError("plan.safetensors", tensor_name(layer, side, "mean"),
                     "expected shape [" + std::to_string(model.kv_heads) + ", " +
                         std::to_string(model.head_dim) + "]");
  if (side == Side::kValue) return RotaryMean(mean.data, model.head_dim);
  return RotaryMean(mean.data, model.head_dim, model.rope, model.rotary_dim, tensors.inv_freq);
}

bool is_fp16_head(const HeadPlan& head, const std::string& pointer) {
  const auto fp16 = std::count(head.widths.begin(), head.widths.end(), kFp16Width);
  if (!head.widths.empty() && fp16 == static_cast<std::ptrdiff_t>(head.widths.size())) return true;
  const bool possible = std::all_of(head.widths.begin(), head.widths.end(),
                                    [](int width) { return width >= 0 && width <= 8; });
  if (head.widths.empty() || fp16 != 0 || !possible)
    throw InputError("plan.json", pointer + "/widths",
                     "expected widths of 0 to 8 bits, or " + std::to_string(kFp16Width) +
                         " for every group of the head");
  return false;
}

TransformCodecSpec fp16_spec(const PlanBundle& bundle, int layer, Side side) {
  side_plan(bundle, layer, side);
  const ModelSpec& model = bundle.plan.model;
  TransformCodecSpec spec;
  spec.geometry = {model.kv_heads, model.head_dim};
  spec.heads.resize(static_cast<std::size_t>(model.kv_heads));
  for (HeadTransform& head : spec.heads) head.fp16 = true;
  return spec;
}

TransformCodecSpec transform_spec(const PlanBundle& bundle, int layer, Side side) {
  const Plan& plan = bundle.plan;
  const bool trellis = plan.code == "tcq" && plan.codec == "calibrated";
  if (plan.code != "scalar" && !trellis)
    throw InputError("plan.json", "/code",
                     "the CUDA runtime and the paged cache read scalar codes, and trellis codes of "
                     "calibrated plans, found " +
                         plan.code);
  if (plan.codec == "calibrated") return calibrated_spec(bundle, layer, side);
  if (plan.codec == "rotated") return rotated_spec(bundle, layer, side);
  if (plan.codec == "fp16") return fp16_spec(bundle, layer, side);
  throw InputError("plan.json", "/codec",
                   "the CUDA runtime and the paged cache hold calibrated, rotated and fp16 plans, "
                   "found " +
                       plan.codec);
}

std::unique_ptr<Codec> make_fp16_codec(const PlanBundle& bundle, int layer, Side side) {
  return make_transform_codec(fp16_spec(bundle, layer, side));
}

}  // namespace kvplan::quant
