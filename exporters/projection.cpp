#include "exporters/projection.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "exporters/losses.h"
#include "schemas/error.h"

namespace kvplan::exporters {
namespace {

constexpr double kWidthTolerance = 1e-9;  // of means that are whole numbers but for rounding

int round_up(double bits) { return static_cast<int>(std::ceil(bits - kWidthTolerance)); }

const SidePlan& side_of(const Plan& plan, int layer, Side side) {
  return plan.layers.at(static_cast<std::size_t>(layer)).side(side);
}

/// Why nothing that the stack can be told reaches the plan's widths.
[[noreturn]] void refuse(const Plan& plan, const Stack& stack, const CacheShape& shape,
                         const ProjectionOptions& options) {
  int layer = 0, want = 0;
  Side side = Side::kKey;
  for (int l = 0; l < shape.num_layers(); ++l)
    for (const Side s : kSides)
      if (shape.layers[static_cast<std::size_t>(l)].cached() &&
          wanted_width(side_of(plan, l, s)) > want) {
        layer = l;
        side = s;
        want = wanted_width(side_of(plan, l, s));
      }
  int most = 0;
  for (const Format& format : stack.formats) most = std::max(most, format.width);
  std::string message = "the plan wants " + std::to_string(want) + " bits here, " + stack.name +
                        " offers nothing that wide";
  if (most >= want) message += " in the combination that the other layers need";
  throw InputError(
      options.file, "/layers/" + std::to_string(layer) + "/" + side_name(side) + "/bits",
      message + (options.allow_lower ? "; choose another target"
                                     : "; give --allow-lower or choose another target"));
}

Assignment choose_for(const Plan& plan, const Stack& stack, const CacheShape& shape,
                      const ProjectionOptions& options) {
  const auto want = [&](int layer, Side side) { return wanted_width(side_of(plan, layer, side)); };
  if (!options.allow_lower) {
    auto found = choose(stack, shape, [&](int layer, Side side, const Format& format) {
      return format.width >= want(layer, side) ? 0 : kForbidden;
    });
    if (!found) refuse(plan, stack, shape, options);
    return *std::move(found);
  }
  const FormatCost deficit = [&](int layer, Side side, const Format& format) {
    const std::int64_t elements = shape.layers[static_cast<std::size_t>(layer)].elements(side);
    return static_cast<double>(std::max(0, want(layer, side) - format.width) * elements);
  };
  if (auto found = choose(stack, shape, deficit, plan.bytes_per_token)) return *std::move(found);
  // Nothing is as small as the plan: the smallest that there is.
  const auto smallest = choose(stack, shape, [&](int layer, Side side, const Format& format) {
    const LayerShape& own = shape.layers[static_cast<std::size_t>(layer)];
    return static_cast<double>(own.kv_heads * format.bytes(own.head_dim_of(side)));
  });
  auto found = smallest ? choose(stack, shape, deficit, smallest->bytes_per_token) : std::nullopt;
  if (!found) refuse(plan, stack, shape, options);
  return *std::move(found);
}

/// A width for each KV head: the smallest that is offered and wide enough, or the largest of all.
void choose_head_widths(const Plan& plan, const ProjectionOptions& options, Projection& p) {
  const auto& formats = p.stack.formats;
  std::int64_t bytes = 0;
  for (int l = 0; l < p.shape.num_layers(); ++l) {
    auto& heads = p.heads.emplace_back();
    const LayerShape& shape = p.shape.layers[static_cast<std::size_t>(l)];
    for (const Side side : kSides)
      for (const HeadPlan& head : side_of(plan, l, side).heads) {
        const int want = round_up(std::accumulate(head.widths.begin(), head.widths.end(), 0.0) /
                                  static_cast<double>(head.widths.size()));
        const auto wide = std::ranges::find_if(
            formats, [&](const Format& format) { return format.width >= want; });
        if (wide == formats.end() && !options.allow_lower) refuse(plan, p.stack, p.shape, options);
        const auto chosen = wide == formats.end() ? std::prev(formats.end()) : wide;
        heads[static_cast<std::size_t>(side)].push_back(static_cast<int>(chosen - formats.begin()));
        bytes += chosen->bytes(shape.head_dim_of(side));
      }
  }
  p.report.bytes_per_token = bytes;
}

}  // namespace

int wanted_width(const SidePlan& side) { return round_up(side.bits); }

std::string rotated_sides(const Plan& plan) {
  if (plan.codec == "rotated" && plan.rotation.kind != "none") return plan.rotation.sides;
  if (plan.codec == "calibrated") return "kv";
  std::string sides;  // that store with a codec of their own behind a Hadamard transform
  for (const Side side : kSides)
    if (std::ranges::any_of(plan.layers, [&](const LayerPlan& layer) {
          return layer.side(side).codec.find("+wht=") != std::string::npos;
        }))
      sides += side_name(side);
  return sides;
}

double Projection::width(int layer, Side side) const {
  if (heads.empty()) return format(layer, side).width;
  const auto& own = heads[static_cast<std::size_t>(layer)][static_cast<std::size_t>(side)];
  double total = 0;
  for (const int head : own) total += stack.formats[static_cast<std::size_t>(head)].width;
  return total / static_cast<double>(own.size());
}

std::string Projection::codec(int layer, Side side) const {
  if (!cached(layer)) return "fp16";
  const Format& own = format(layer, side);
  const StackRotation& turned =
      rotation.at(static_cast<std::size_t>(layer))[static_cast<std::size_t>(side)];
  if (stack.name != "llamacpp" || own.codec.empty() || turned.tile == 0) return own.codec;
  return own.codec + "+wht=" + std::to_string(turned.tile);
}

Projection project(const PlanBundle& bundle, const Stack& stack, const ProjectionOptions& options) {
  return project_onto(bundle, stack, choose_for(bundle.plan, stack, shape_of(bundle.plan), options),
                      options);
}

Projection project_onto(const PlanBundle& bundle, const Stack& stack, const Assignment& assignment,
                        const ProjectionOptions& options) {
  Projection p;
  p.stack = stack;
  p.shape = shape_of(bundle.plan);
  p.layers = assignment.layers;
  p.segments = assignment.segments;
  if (std::ssize(p.layers) != p.shape.num_layers())
    throw InternalError("an assignment of " + std::to_string(p.layers.size()) +
                        " layers for a plan of " + std::to_string(p.shape.num_layers()));
  if (assignment.setting) {
    p.setting = assignment.setting->name;
    p.setting_number = assignment.setting->number;
    p.forced16 = assignment.setting->forced16;
  }
  p.report.bytes_per_token = assignment.bytes_per_token;
  if (options.head_widths) choose_head_widths(bundle.plan, options, p);
  const std::string sides = rotated_sides(bundle.plan);
  for (int l = 0; l < p.shape.num_layers(); ++l) {
    auto& turned = p.rotation.emplace_back();
    if (!p.cached(l)) continue;
    for (const Side side : kSides) {
      const auto s = static_cast<std::size_t>(side);
      // ik ignores -khad and -vhad under a base type of f16.
      const bool ignored =
          stack.segments && stack.formats[static_cast<std::size_t>(p.segments[s].base)].plain();
      if (!ignored) turned[s] = stack_rotation(p.stack, p.format(l, side), p.shape, l, side, sides);
    }
  }
  report_losses(bundle, options, p);
  return p;
}

PlanBundle as_plan(const Projection& projection, const PlanBundle& bundle) {
  PlanBundle out;
  Plan& plan = out.plan;
  plan.model = bundle.plan.model;
  plan.context = bundle.plan.context;
  plan.page_tokens = bundle.plan.page_tokens;
  plan.sink_tokens = 0;
  plan.seed = bundle.plan.seed;
  plan.provenance = bundle.plan.provenance;
  plan.budget.kind = "none";
  plan.policy = "export:" + projection.stack.name;
  if (!projection.stack.dialect.empty()) plan.policy += ":" + projection.stack.dialect;
  plan.codec = "fp16";
  plan.group_size = plan.model.head_dim;
  plan.scale_rule = "one";
  plan.norm = "fp16";
  plan.centre = false;
  plan.effective_bits = plan.effective_bits_at_context = projection.report.export_bits;
  plan.bytes_per_token = projection.report.bytes_per_token;
  plan.predicted_kl = projection.report.export_predicted_kl.value_or(0);
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    const LayerPlan& from = bundle.plan.layers[static_cast<std::size_t>(l)];
    LayerPlan& layer = plan.layers.emplace_back();
    layer.index = l;
    layer.kind = from.kind;
    layer.rotated_cost_k = from.rotated_cost_k;
    layer.rotated_cost_v = from.rotated_cost_v;
    for (const Side side : kSides) {
      SidePlan& own = layer.side(side);
      const int width = projection.cached(l) ? projection.format(l, side).width : kFp16Width;
      own.bits = width;
      own.heads.assign(static_cast<std::size_t>(plan.model.kv_heads),
                       {.widths = {width}, .outliers = {}});
      if (width == kFp16Width) continue;
      own.codec = projection.codec(l, side);
      if (own.codec.empty())
        throw InputError("plan.json", "/layers/" + std::to_string(l) + "/" + side_name(side),
                         "kvplan has no codec that does what " + projection.stack.name +
                             " does as " + projection.format(l, side).name);
    }
  }
  for (const LayerTensors& from : bundle.tensors.layers) {
    LayerTensors& layer = out.tensors.layers.emplace_back();
    layer.inv_freq = from.inv_freq;
    layer.k.absmax = from.k.absmax;
    layer.v.absmax = from.v.absmax;
  }
  return out;
}

}  // namespace kvplan::exporters
