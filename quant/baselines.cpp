#include "quant/baselines.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>
#include <utility>

#include "quant/baseline_name.h"
#include "quant/codec.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kMaxBits = 8;
constexpr int kBlock = 32;  // values of a ggml block
constexpr double kHalfBytes = 2, kFloatBytes = 4, kChannelBytes = 4;

bool divides_into_blocks(const ModelSpec& model) {
  return std::int64_t{model.kv_heads} * model.head_dim % kBlock == 0;
}

int nearest_bits(double bits) {
  return std::clamp(static_cast<int>(std::lround(std::clamp(bits, 1.0, double{kMaxBits}))), 1,
                    kMaxBits);
}

/// Sum of x^2 after rotary by channel of one head.
std::vector<double> channel_energy(const LayerProfile& layer, Side side, std::size_t head) {
  if (side == Side::kKey) {
    const auto squares = layer.k_rotated_sumsq.row(head);
    return {squares.begin(), squares.end()};
  }
  const auto d = static_cast<std::size_t>(layer.head_dim);
  const auto outer = layer.v.outer.row(head);
  std::vector<double> energy(d);
  for (std::size_t i = 0; i < d; ++i) energy[i] = outer[i * d + i];
  return energy;
}

/// The `count` largest, ascending by channel; ties to the lower channel.
std::vector<int> largest_channels(const std::vector<double>& energy, int count) {
  std::vector<int> channels(energy.size());
  std::iota(channels.begin(), channels.end(), 0);
  std::ranges::stable_sort(channels, std::greater<>(),
                           [&](int channel) { return energy[static_cast<std::size_t>(channel)]; });
  channels.resize(static_cast<std::size_t>(count));
  std::ranges::sort(channels);
  return channels;
}

/// Bits of codes and signs over head_dim, without norms and scales.
double payload_bits(const Plan& plan, const HeadPlan& head, Side side) {
  const RotatedVariant& variant = plan.variant;
  const double d = plan.model.head_dim, width = head.widths.front();
  const auto outliers = static_cast<double>(head.outliers.size());
  if (plan.code != "scalar") return width / 2;  // one angle for two channels
  if (variant.sketch == "none" || variant.sketch_sides.find(side_name(side)) == std::string::npos)
    return (width * (d - outliers) + variant.outlier_bits * outliers) / d;
  const double outlier_bits = variant.outlier_bits - (variant.outlier_code == "rotated" ? 1 : 0);
  return ((width - 1) * (d - outliers) + outlier_bits * outliers + variant.sketch_rows) / d;
}

void fill_layers(const BaselineSpec& spec, const Profile* profile, PlanBundle& bundle,
                 const std::vector<double>& inv_freq) {
  Plan& plan = bundle.plan;
  const auto heads = static_cast<std::size_t>(plan.model.kv_heads);
  const auto groups = static_cast<std::size_t>(plan.model.head_dim / plan.group_size);
  for (int index = 0; index < plan.model.num_layers; ++index) {
    LayerPlan& layer = plan.layers.emplace_back();
    layer.index = index;
    layer.kind = layer_kind(plan.model, index);
    bundle.tensors.layers.emplace_back().inv_freq =
        profile ? profile->layers[static_cast<std::size_t>(index)].inv_freq : inv_freq;
    for (const Side side : kSides) {
      SidePlan& own = layer.side(side);
      for (std::size_t h = 0; h < heads; ++h) {
        HeadPlan& head = own.heads.emplace_back();
        head.widths.assign(groups, spec.bits(side));
        if (spec.outliers > 0)
          head.outliers = largest_channels(
              channel_energy(profile->layers[static_cast<std::size_t>(index)], side, h),
              spec.outliers);
        own.bits += payload_bits(plan, head, side) / static_cast<double>(heads);
      }
      if (spec.stack) own.codec = plan.policy;
    }
  }
}

/// Largest magnitudes for static scales and, if the plan centres, means.
void fill_tensors(const Profile& profile, PlanBundle& bundle) {
  const std::int64_t heads = bundle.plan.model.kv_heads, d = bundle.plan.model.head_dim;
  const std::string& own = bundle.plan.layers.front().k.codec;
  const std::string& codec = own.empty() ? bundle.plan.codec : own;
  const bool scaled = codec.starts_with("fp8") || codec.starts_with("nvfp4");
  const auto tokens = static_cast<double>(profile.tokens);
  const auto mean_of = [&](const Array<double>& sum) {
    Array<float> mean({heads, d});
    std::ranges::transform(sum.data, mean.data.begin(),
                           [&](double total) { return static_cast<float>(total / tokens); });
    return mean;
  };
  for (std::size_t l = 0; l < profile.layers.size(); ++l) {
    const LayerProfile& from = profile.layers[l];
    LayerTensors& to = bundle.tensors.layers[l];
    for (const Side side : kSides) {
      const SideSums& sums = from.side(side);
      SideTensors& own = to.side(side);
      if (scaled) {
        own.absmax = Array<float>({heads});
        for (std::size_t h = 0; h < own.absmax.data.size(); ++h)
          own.absmax.data[h] = std::ranges::max(sums.absmax.row(h));
      }
      if (bundle.plan.centre) own.mean = mean_of(sums.sum);
    }
    if (bundle.plan.centre) to.k.mean_rotated = mean_of(from.k_rotated_sum);
  }
}

/// What a runtime keeps beside the cache: distinct dense rotations and rows of sketches in fp16
/// (signs as bits), codebooks, means and static scales in fp32, channel lists in int32.
double static_bytes(const PlanBundle& bundle) {
  const Plan& plan = bundle.plan;
  const double d = plan.model.head_dim;
  const bool dense_kind = plan.rotation.kind == "haar", rotates = plan.rotation.kind != "none";
  const bool shared = plan.rotation.scope == "model";
  const bool sketched = plan.variant.sketch != "none";
  const double sketch_bytes =
      plan.variant.sketch_rows * d * (plan.variant.sketch == "rademacher" ? 1.0 / 8 : kHalfBytes);
  double bytes = 0;
  std::set<std::size_t> shared_sizes;
  std::set<std::pair<int, std::size_t>> books;
  const auto add_instance = [&](std::size_t size, int width, bool has_sketch) {
    const bool dense = rotates && (dense_kind || !std::has_single_bit(size));
    if (dense && (!shared || shared_sizes.insert(size).second))
      bytes += static_cast<double>(size * size) * kHalfBytes;
    const int bits = width - (has_sketch ? 1 : 0);
    if (bits > 0 && plan.code == "scalar" && books.insert({bits, size}).second)
      bytes += std::exp2(bits) * kFloatBytes;
  };
  bool sketch_counted = false;
  for (std::size_t l = 0; l < plan.layers.size(); ++l)
    for (const Side side : kSides) {
      const SideTensors& tensors = bundle.tensors.layers[l].side(side);
      bytes +=
          static_cast<double>(tensors.mean.data.size() + tensors.absmax.data.size()) * kFloatBytes;
      if (plan.codec != "rotated") continue;
      const bool has_sketch =
          sketched && plan.variant.sketch_sides.find(side_name(side)) != std::string::npos;
      for (const HeadPlan& head : plan.layers[l].side(side).heads) {
        const std::size_t outliers = head.outliers.size();
        bytes += static_cast<double>(outliers) * kChannelBytes;
        add_instance(static_cast<std::size_t>(plan.model.head_dim) - outliers, head.widths.front(),
                     has_sketch);
        if (outliers > 0 && plan.variant.outlier_code == "rotated")
          add_instance(outliers, plan.variant.outlier_bits, has_sketch);
        if (has_sketch && (!shared || !std::exchange(sketch_counted, true))) bytes += sketch_bytes;
      }
    }
  return bytes;
}

void check_arguments(std::string_view name, const ModelSpec& model, int sink_tokens,
                     std::int64_t context, const Profile* profile) {
  if (model.num_layers < 1 || model.kv_heads < 1 || model.head_dim < 1)
    throw ArgumentError("a baseline needs a model with layers, KV heads and channels");
  if (sink_tokens < 0 || context < 1)
    throw ArgumentError("a baseline needs sink_tokens >= 0 and context >= 1, got " +
                        std::to_string(sink_tokens) + " and " + std::to_string(context));
  if (profile && (profile->tokens < 1 || profile->model.kv_heads != model.kv_heads ||
                  profile->model.head_dim != model.head_dim ||
                  std::ssize(profile->layers) != model.num_layers))
    throw ArgumentError("baseline " + std::string(name) +
                        " was given a profile without tokens or of another model");
}

}  // namespace

PlanBundle baseline_plan(std::string_view name, const ModelSpec& model, int sink_tokens,
                         std::int64_t context, std::uint64_t seed,
                         const std::vector<double>& inv_freq, const Profile* profile) {
  check_arguments(name, model, sink_tokens, context, profile);
  const BaselineSpec spec = parse_baseline(name, model.head_dim);
  if (spec.ggml() && !divides_into_blocks(model))
    throw ArgumentError(std::string(name) + " needs kv_heads x head_dim to be a multiple of " +
                        std::to_string(kBlock) + ", the model has " +
                        std::to_string(model.kv_heads) + " x " + std::to_string(model.head_dim));
  if ((spec.outliers > 0 || spec.centre) && !profile)
    throw ArgumentError(std::string(name) +
                        " needs a profile for its outlier channels or means; make one with "
                        "`kvplan profile` and use `kvplan plan --policy`");
  PlanBundle bundle;
  Plan& plan = bundle.plan;
  plan.model = model;
  plan.context = context;
  plan.sink_tokens = sink_tokens;
  plan.seed = seed;
  plan.budget.kind = "none";
  plan.policy = name;
  plan.codec = spec.stack ? "fp16" : spec.codec;  // stack: each side names its own
  plan.code = spec.code;
  plan.norm = spec.norm;
  plan.scale_rule = spec.scale_rule;
  plan.centre = spec.centre;
  plan.group_size = spec.group_size;
  plan.rotation = spec.rotation;
  plan.variant = spec.variant;
  if (spec.codec == "rotated") {
    plan.rotation.seed = seed;
    plan.codebooks = {{spec.k_bits, spec.codebook}, {spec.v_bits, spec.codebook}};
    if (spec.outliers > 0 && spec.variant.outlier_code == "rotated")
      plan.codebooks[spec.variant.outlier_bits] = spec.codebook;
  }
  fill_layers(spec, profile, bundle, inv_freq);
  if (profile) {
    fill_tensors(*profile, bundle);
    plan.provenance.calibration_tokens = profile->tokens;
    plan.provenance.sources = profile->sources;
  }
  plan.static_bytes = static_cast<std::int64_t>(std::ceil(static_bytes(bundle)));

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
