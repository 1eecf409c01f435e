// Plans of absmax integers per token ("int") and of small floats: fp8, mxfp4, nvfp4.

#include <algorithm>
#include <string>

#include "quant/vector_codec.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

/// The one width of all heads of a side, which must lie in lowest..highest.
int shared_width(const SidePlan& plan, int lowest, int highest, const std::string& codec,
                 const std::string& pointer) {
  const int width = plan.heads.front().widths.empty() ? 0 : plan.heads.front().widths.front();
  for (const HeadPlan& head : plan.heads)
    if (width < lowest || width > highest || head.widths.empty() ||
        head.widths != std::vector(head.widths.size(), width))
      throw InputError("plan.json", pointer + "/heads",
                       codec + " needs one width of " + std::to_string(lowest) + " to " +
                           std::to_string(highest) + " bits for all heads");
  return width;
}

VectorHead whole_head(std::shared_ptr<const VectorCode> code) {
  std::vector<int> channels(code->size());
  for (std::size_t i = 0; i < channels.size(); ++i) channels[i] = static_cast<int>(i);
  return {{{std::move(channels), std::move(code)}}, nullptr};
}

/// Per KV head (nvfp4: one for all), from the largest magnitudes in the plan's tensors; 1 without
/// them, as serving stacks default.
std::vector<float> static_scales(const PlanBundle& bundle, int layer, Side side) {
  const auto heads = static_cast<std::size_t>(bundle.plan.model.kv_heads);
  std::vector<float> scales(heads, 1.0f);
  if (static_cast<std::size_t>(layer) >= bundle.tensors.layers.size()) return scales;
  std::vector<float> absmax =
      bundle.tensors.layers[static_cast<std::size_t>(layer)].side(side).absmax.data;
  if (absmax.empty()) return scales;
  if (absmax.size() != heads)
    throw InputError("plan.safetensors", tensor_name(layer, side, "absmax"),
                     "expected " + std::to_string(heads) + " values, one per KV head, found " +
                         std::to_string(absmax.size()));
  if (bundle.plan.codec == "nvfp4") absmax.assign(heads, std::ranges::max(absmax));
  for (std::size_t h = 0; h < heads; ++h)
    if (absmax[h] > 0) scales[h] = absmax[h] / largest_float(bundle.plan.codec);
  return scales;
}

}  // namespace

std::unique_ptr<Codec> make_int_codec(const PlanBundle& bundle, int layer, Side side) {
  const SidePlan& plan = side_plan(bundle, layer, side);
  const ModelSpec& model = bundle.plan.model;
  const int bits = shared_width(plan, 2, 8, "int", side_pointer(layer, side));
  const int group = bundle.plan.group_size;
  if (group < 1 || model.head_dim % group != 0)
    throw InputError("plan.json", "/group_size",
                     "expected a divisor of head_dim " + std::to_string(model.head_dim) +
                         ", found " + std::to_string(group));
  VectorCodecSpec spec{{model.kv_heads, model.head_dim}, {}, std::nullopt};
  spec.heads.assign(static_cast<std::size_t>(model.kv_heads),
                    whole_head(make_absmax_code(static_cast<std::size_t>(model.head_dim), bits,
                                                static_cast<std::size_t>(group))));
  return make_vector_codec(std::move(spec));
}

std::unique_ptr<Codec> make_float_codec(const PlanBundle& bundle, int layer, Side side) {
  const SidePlan& plan = side_plan(bundle, layer, side);
  const ModelSpec& model = bundle.plan.model;
  const std::string& codec = bundle.plan.codec;
  const int bits = codec.starts_with("fp8") ? 8 : 4;
  shared_width(plan, bits, bits, codec, side_pointer(layer, side));
  VectorCodecSpec spec{{model.kv_heads, model.head_dim}, {}, std::nullopt};
  for (const float scale : static_scales(bundle, layer, side))
    spec.heads.push_back(
        whole_head(make_float_code(codec, static_cast<std::size_t>(model.head_dim), scale)));
  return make_vector_codec(std::move(spec));
}

}  // namespace kvplan::quant
