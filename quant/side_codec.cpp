// The codec that one side of a plan names for itself (SidePlan::codec): what a serving stack
// stores.

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "quant/baseline_name.h"
#include "quant/stack_codes.h"
#include "quant/vector_codec.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

/// H x / sqrt(tile) over tiles of the heads, then another codec on what comes out, in fp32 as
/// llama.cpp does. H is its own inverse.
class TransformedCodec : public Codec {
 public:
  TransformedCodec(std::unique_ptr<Codec> inner, std::size_t tile)
      : inner_(std::move(inner)), tile_(tile) {}

  std::size_t packed_bytes(const KvShape& shape) const override {
    return inner_->packed_bytes(shape);
  }
  void encode(const KvShape& shape, std::int64_t first_position, std::span<const float> x,
              std::span<std::byte> codes) const override {
    if (x.size() != static_cast<std::size_t>(shape.elements()))
      return inner_->encode(shape, first_position, x, codes);  // which refuses it
    std::vector<float> y = rounded_to_half(shape, x);
    transform(y);
    inner_->encode(shape, first_position, y, codes);
  }
  void decode(const KvShape& shape, std::int64_t first_position, std::span<const std::byte> codes,
              std::span<float> x) const override {
    inner_->decode(shape, first_position, codes, x);
    transform(x);
  }
  double bits_per_token() const override { return inner_->bits_per_token(); }

 private:
  void transform(std::span<float> x) const {
    hadamard_tiles(x, tile_);
    const float unit = 1 / std::sqrt(static_cast<float>(tile_));
    for (float& value : x) value *= unit;
  }
  std::unique_ptr<Codec> inner_;
  std::size_t tile_;
};

/// A side that names its codec, for messages.
struct NamedSide {
  int layer;
  Side side;
  const std::string& name;
  [[noreturn]] void refuse(const std::string& message) const {
    throw InputError("plan.json", side_pointer(layer, side) + "/codec", message);
  }
};

void require_widths(const SidePlan& plan, int bits, const NamedSide& where) {
  for (const HeadPlan& head : plan.heads)
    if (head.widths.empty() || std::ranges::count(head.widths, bits) != std::ssize(head.widths))
      where.refuse("\"" + where.name + "\" stores this side at " + std::to_string(bits) +
                   " bits, the plan's widths say otherwise");
}

/// What a stack does to each vector of `size` values.
std::unique_ptr<VectorCode> stack_code(const BaselineSpec& spec, std::size_t size,
                                       const NamedSide& where) {
  const std::string& codec = spec.codec;
  const bool key = where.side == Side::kKey;
  const int bits = spec.bits(where.side);
  const bool mixes_all = codec.starts_with("turboquant_") || codec == "lmdeploy_turbo";
  if (mixes_all && (!std::has_single_bit(size) || size < 16))
    where.refuse(codec + " needs a head dimension that is a power of two from 16, found " +
                 std::to_string(size));
  if (size % 2 != 0) where.refuse(codec + " needs an even head dimension");
  if (codec == "int8_per_token_head") return make_vllm_int8_code(size);
  if (codec == "int4_per_token_head") return make_vllm_int4_code(size);
  if (codec == "turboquant_k8v4" && key) return make_float_code("fp8_e4m3", size, 1);
  if (codec.starts_with("turboquant_"))
    return key ? make_vllm_turbo_key_code(size, bits) : make_vllm_turbo_value_code(size, bits);
  if (codec == "lmdeploy_int8" || codec == "lmdeploy_int4") return make_lmdeploy_code(size, bits);
  if (codec == "lmdeploy_turbo")
    return key ? make_lmdeploy_turbo_key_code(size) : make_lmdeploy_turbo_value_code(size);
  if (codec == "hf") return make_hf_code(size, bits, static_cast<std::size_t>(spec.group_size));
  throw InternalError("no vector code for " + codec);
}

/// The plan that says by its own fields what `spec` does to this one layer and side.
PlanBundle plain_plan(const PlanBundle& bundle, int layer, Side side, const BaselineSpec& spec) {
  PlanBundle own;
  Plan& plan = own.plan;
  plan.model = bundle.plan.model;
  plan.codec = spec.codec;
  plan.code = spec.code;
  plan.norm = spec.norm;
  plan.scale_rule = spec.scale_rule;
  plan.centre = false;
  plan.group_size = spec.group_size;
  plan.rotation = spec.rotation;
  plan.rotation.seed = spec.codec == "rotated" ? bundle.plan.seed : 0;
  plan.variant = spec.variant;
  if (spec.codec == "rotated") plan.codebooks[spec.bits(side)] = spec.codebook;
  plan.layers.resize(static_cast<std::size_t>(layer) + 1);
  SidePlan& into = plan.layers.back().side(side);
  into.heads.resize(static_cast<std::size_t>(plan.model.kv_heads));
  for (HeadPlan& head : into.heads)
    head.widths.assign(static_cast<std::size_t>(plan.model.head_dim / spec.group_size),
                       spec.bits(side));
  if (static_cast<std::size_t>(layer) >= bundle.tensors.layers.size()) return own;
  own.tensors.layers.resize(plan.layers.size());
  own.tensors.layers.back() = bundle.tensors.layers[static_cast<std::size_t>(layer)];
  Array<float>& absmax = own.tensors.layers.back().side(side).absmax;
  if (spec.scales == "unit") absmax = {};
  if (spec.scales == "tensor" && !absmax.empty())
    std::ranges::fill(absmax.data, std::ranges::max(absmax.data));
  return own;
}

}  // namespace

std::unique_ptr<Codec> make_side_codec(const PlanBundle& bundle, int layer, Side side) {
  const SidePlan& plan = side_plan(bundle, layer, side);
  const NamedSide where{layer, side, plan.codec};
  const HeadGeometry geometry{bundle.plan.model.kv_heads, bundle.plan.model.head_dim};
  const auto size = static_cast<std::size_t>(geometry.head_dim);
  BaselineSpec spec;
  try {
    spec = parse_baseline(plan.codec, geometry.head_dim);
  } catch (const ArgumentError& error) {
    where.refuse(error.what());
  }
  if (spec.centre || spec.outliers > 0)
    where.refuse("a side's own codec has neither means nor outlier channels");
  require_widths(plan, spec.bits(side), where);
  if (spec.ggml() && (geometry.kv_heads * geometry.head_dim) % 32 != 0)
    where.refuse(plan.codec + " needs kv_heads x head_dim to be a multiple of 32");
  if (spec.wht > 0)
    return std::make_unique<TransformedCodec>(make_ggml_codec(spec.codec, geometry, true),
                                              static_cast<std::size_t>(spec.wht));
  if (spec.ggml()) return make_ggml_codec(spec.codec, geometry);
  if (spec.codec == "kvtuner")
    return make_kvtuner_codec(geometry, spec.bits(side), spec.channel_keys && side == Side::kKey);
  if (!spec.stack || spec.scales != "head")
    return make_codec(plain_plan(bundle, layer, side, spec), layer, side);
  const std::shared_ptr<const VectorCode> code = stack_code(spec, size, where);
  VectorHead head;
  head.parts.push_back({{}, code});
  for (int channel = 0; channel < geometry.head_dim; ++channel)
    head.parts.front().channels.push_back(channel);
  return make_vector_codec(
      {geometry, std::vector(static_cast<std::size_t>(geometry.kv_heads), head), std::nullopt});
}

}  // namespace kvplan::quant
