#include "quant/baselines.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>

#include "quant/codec.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kMaxBits = 8;
constexpr int kBlock = 32;  // values of a q8_0 or q4_0 block

struct SideBits {
  int k = 0, v = 0;
};

std::optional<int> parse_bits(std::string_view text) {
  int bits = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), bits);
  if (error != std::errc() || end != text.data() + text.size() || bits < 1 || bits > kMaxBits)
    return std::nullopt;
  return bits;
}

// "3" or "6/3".
std::optional<SideBits> parse_side_bits(std::string_view text) {
  const auto slash = text.find('/');
  const auto k = parse_bits(text.substr(0, slash));
  const auto v = slash == std::string_view::npos ? k : parse_bits(text.substr(slash + 1));
  if (!k || !v) return std::nullopt;
  return SideBits{*k, *v};
}

// Sets the fields that tell the baseline and returns its widths; nullopt for another name.
std::optional<SideBits> describe_baseline(std::string_view name, std::uint64_t seed, Plan& plan) {
  plan.codec = std::string(name.substr(0, name.find(':')));
  const auto after = name.find(':');
  const std::string_view bits = after == std::string_view::npos ? "" : name.substr(after + 1);
  if (name == "fp16") return SideBits{kFp16Width, kFp16Width};
  if (name == "q8_0") return SideBits{8, 8};
  if (name == "q4_0") return SideBits{4, 4};
  if (plan.codec == "kivi") {
    const auto both = parse_bits(bits);
    return both ? std::optional(SideBits{*both, *both}) : std::nullopt;
  }
  if (plan.codec != "turboquant" && plan.codec != "turboquant+") return std::nullopt;
  plan.scale_rule = plan.codec == "turboquant" ? "one" : "norm_corrected";
  plan.codec = "rotated";
  plan.rotation.kind = "haar";
  plan.rotation.seed = seed;
  const auto sides = parse_side_bits(bits);
  if (sides)
    for (const int width : {sides->k, sides->v}) plan.codebooks[width] = "lloyd_max_beta";
  return sides;
}

bool divides_into_blocks(const ModelSpec& model) {
  return std::int64_t{model.kv_heads} * model.head_dim % kBlock == 0;
}

int nearest_bits(double bits) {
  return std::clamp(static_cast<int>(std::lround(std::clamp(bits, 1.0, double{kMaxBits}))), 1,
                    kMaxBits);
}

}  // namespace

PlanBundle baseline_plan(std::string_view name, const ModelSpec& model, int sink_tokens,
                         std::int64_t context, std::uint64_t seed,
                         const std::vector<double>& inv_freq) {
  if (model.num_layers < 1 || model.kv_heads < 1 || model.head_dim < 1)
    throw ArgumentError("a baseline needs a model with layers, KV heads and channels");
  if (sink_tokens < 0 || context < 1)
    throw ArgumentError("a baseline needs sink_tokens >= 0 and context >= 1, got " +
                        std::to_string(sink_tokens) + " and " + std::to_string(context));
  PlanBundle bundle;
  Plan& plan = bundle.plan;
  plan.model = model;
  plan.context = context;
  plan.sink_tokens = sink_tokens;
  plan.seed = seed;
  plan.budget.kind = "none";
  plan.policy = "uniform";
  plan.norm = "fp16";
  plan.scale_rule = "one";
  plan.centre = false;
  plan.group_size = model.head_dim;
  const std::optional<SideBits> bits = describe_baseline(name, seed, plan);
  if (!bits)
    throw ArgumentError("unknown baseline \"" + std::string(name) +
                        "\"; expected fp16, q8_0, q4_0, kivi:B, turboquant:B, turboquant:K/V, "
                        "turboquant+:B or turboquant+:K/V with 1 to 8 bits");
  if ((name == "q8_0" || name == "q4_0") && !divides_into_blocks(model))
    throw ArgumentError(std::string(name) + " needs kv_heads x head_dim to be a multiple of " +
                        std::to_string(kBlock) + ", the model has " +
                        std::to_string(model.kv_heads) + " x " + std::to_string(model.head_dim));
  for (int layer = 0; layer < model.num_layers; ++layer) {
    LayerPlan& layer_plan = plan.layers.emplace_back();
    layer_plan.index = layer;
    for (const Side side : kSides) {
      const int width = side == Side::kKey ? bits->k : bits->v;
      layer_plan.side(side).bits = width;
      layer_plan.side(side).heads.assign(static_cast<std::size_t>(model.kv_heads), {{width}, {}});
    }
    bundle.tensors.layers.emplace_back().inv_freq = inv_freq;
  }

  // All layers are alike, so one codec of each side tells the size of all.
  double token_bits = 0;
  for (const Side side : kSides)
    token_bits += make_codec(bundle, 0, side)->bits_per_token() * model.num_layers;
  const auto elements = static_cast<double>(elements_per_token(model));
  const std::int64_t packed =
      std::max<std::int64_t>(context - sink_tokens, 0) / plan.page_tokens * plan.page_tokens;
  plan.effective_bits = token_bits / elements;
  plan.effective_bits_at_context = kFp16Width + (plan.effective_bits - kFp16Width) *
                                                    static_cast<double>(packed) /
                                                    static_cast<double>(context);
  plan.bytes_per_token = static_cast<std::int64_t>(std::ceil(token_bits / 8));
  return bundle;
}

std::vector<std::string> nearest_baselines(double effective_bits, const ModelSpec& model) {
  std::vector<std::string> names;
  if (divides_into_blocks(model)) names = {"q8_0", "q4_0"};
  const double norm_bits = 16.0 / model.head_dim;
  names.push_back("turboquant:" + std::to_string(nearest_bits(effective_bits - norm_bits)));
  names.push_back("kivi:" + std::to_string(nearest_bits(effective_bits - 1)));
  return names;
}

}  // namespace kvplan::quant
