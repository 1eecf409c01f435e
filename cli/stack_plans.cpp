#include "cli/stack_plans.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>

#include "cli/options.h"
#include "exporters/projection.h"
#include "quant/baselines.h"
#include "quant/codec.h"
#include "quant/predict.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

constexpr double kGibibyte = 1024.0 * 1024 * 1024;

exporters::Stack stack_of(const exporters::StackName& name, const ModelSpec& model) {
  return exporters::make_stack(name.target, exporters::shape_of(model), model.architecture,
                               name.options);
}

/// Tokens that stay at 16 bits until they are packed together: KVTuner's and the builder's tails,
/// none elsewhere.
int page_tokens(const std::string& target) {
  if (target == "kvtuner") return 32;
  return target == "hf" ? 128 : 1;
}

/// The name of the codec that a stack stores this side with; empty: kvplan has none.
std::string codec_name(const exporters::Stack& stack, const exporters::Format& format,
                       const exporters::CacheShape& shape, int layer, Side side) {
  const int tile = exporters::stack_rotation(stack, format, shape, layer, side, "kv").tile;
  return stack.name != "llamacpp" || tile == 0 || format.codec.empty()
             ? format.codec
             : format.codec + "+wht=" + std::to_string(tile);
}

/// What --cache-type-k and -v take; f32 and bf16 lose less than f16, which is the reference here.
constexpr std::string_view kLlamacppTypes[] = {"f16",  "q8_0", "q5_1",  "q5_0",
                                               "q4_1", "q4_0", "iq4_nl"};

/// Types of K and V after "llamacpp:"; empty if the text names something else.
std::vector<std::string> llamacpp_types(const std::string& stack) {
  constexpr std::string_view kPrefix = "llamacpp:";
  if (!stack.starts_with(kPrefix) || stack.find(',') == std::string::npos) return {};
  auto types = split_list(stack.substr(kPrefix.size()));
  if (types.size() < 2 || types.size() > 3 || (types.size() == 3 && types[2] != "unrotated"))
    throw ArgumentError("--as " + stack +
                        ": expected llamacpp:K,V with the types of keys and values, such as "
                        "llamacpp:q8_0,q4_0, perhaps with ,unrotated after them");
  for (std::size_t side = 0; side < 2; ++side)
    if (std::ranges::find(kLlamacppTypes, types[side]) == std::end(kLlamacppTypes))
      throw ArgumentError("--as " + stack + ": llama.cpp has no cache type '" + types[side] +
                          "' that kvplan knows; expected one of f16, q8_0, q5_1, q5_0, q4_1, q4_0, "
                          "iq4_nl");
  return types;
}

/// Mainline llama.cpp with one type for all keys and one for all values.
PlanBundle on_llamacpp(const PlanBundle& bundle, const std::string& stack,
                       const std::vector<std::string>& types) {
  const auto shape = exporters::shape_of(bundle.plan);
  const auto mainline = stack_of({.target = "llamacpp", .options = {}}, bundle.plan.model);
  const auto plain = exporters::choose(
      mainline, shape, [](int, Side, const exporters::Format& f) { return f.plain() ? 0.0 : 1.0; });
  PlanBundle out = exporters::as_plan(exporters::project_onto(bundle, mainline, *plain), bundle);
  Plan& plan = out.plan;
  for (const Side side : kSides) {
    const std::string& type = types[static_cast<std::size_t>(side)];
    if (type == "f16") continue;
    const exporters::Format format{.name = type, .width = 0, .codec = type};
    for (LayerPlan& layer : plan.layers) {
      const std::string name =
          types.size() == 3 ? type : codec_name(mainline, format, shape, layer.index, side);
      const PlanBundle alone = quant::baseline_plan(name, plan.model, 0, plan.context, 0, {});
      layer.side(side) = alone.plan.layers.front().side(side);
      layer.side(side).codec = name;
    }
  }
  plan.policy = "export:" + stack;
  plan.page_tokens = page_tokens("llamacpp");
  plan.predicted_kl = 0;
  plan.effective_bits = plan.effective_bits_at_context = quant::measured_effective_bits(out);
  plan.bytes_per_token = static_cast<std::int64_t>(std::ceil(
      plan.effective_bits * static_cast<double>(elements_per_token(plan.model)) / 8 - 1e-6));
  return out;
}

/// What a format costs on every layer and side, simulated once for each codec.
class StackCosts {
 public:
  StackCosts(const Profile& profile, const StackPlanOptions& options, const exporters::Stack& stack,
             const exporters::CacheShape& shape)
      : profile_(profile), options_(options), stack_(stack), shape_(shape) {}

  double of(int layer, Side side, const exporters::Format& format) {
    if (format.plain()) return 0;
    const std::string name = codec_name(stack_, format, shape_, layer, side);
    if (name.empty()) return exporters::kForbidden;
    auto found = costs_.find(name);
    if (found == costs_.end()) {
      const PlanBundle bundle =
          quant::baseline_plan(name, profile_.model, 0, options_.context, options_.seed,
                               profile_.layers.at(0).inv_freq, &profile_);
      found = costs_
                  .emplace(name, quant::simulate_cost(
                                     bundle, profile_,
                                     {.seed = options_.seed, .threads = options_.threads}))
                  .first;
    }
    return found->second.sides[static_cast<std::size_t>(layer)][static_cast<std::size_t>(side)];
  }

 private:
  const Profile& profile_;
  const StackPlanOptions& options_;
  const exporters::Stack& stack_;
  const exporters::CacheShape& shape_;
  std::map<std::string, quant::SimulatedCost> costs_;
};

/// Bytes per token that a budget of bits, bytes or GiB allows.
std::int64_t byte_limit(const StackPlanOptions& options, std::int64_t elements) {
  const BudgetSpec& budget = options.budget;
  double bytes = budget.value;
  if (budget.kind == "bits") bytes = budget.value * static_cast<double>(elements) / 8 + 1e-6;
  if (budget.kind == "gib")
    bytes = budget.value * kGibibyte /
            (static_cast<double>(options.context) * static_cast<double>(options.batch));
  return static_cast<std::int64_t>(std::min(bytes, 9e15));
}

class StackPlanner {
 public:
  StackPlanner(const Profile& profile, const StackPlanOptions& options)
      : options_(options),
        shape_(exporters::shape_of(profile.model)),
        stack_(stack_of(exporters::parse_stack(options.stack), profile.model)),
        costs_(profile, options, stack_, shape_) {
    const auto simulated = [](const exporters::Format& f) {
      return !f.plain() && !f.codec.empty();
    };
    if (std::ranges::none_of(stack_.formats, simulated))
      throw InputError(options.stack, "formats",
                       "kvplan has no codec that does what this stack's types do, so it cannot "
                       "plan for them; plan freely and use `kvplan export`");
  }

  const exporters::Stack& stack() const { return stack_; }

  exporters::Assignment choose() {
    if (options_.budget.kind == "max_kl") return cheapest_below(options_.budget.value);
    const std::int64_t limit = byte_limit(options_, shape_.elements());
    auto found = within(limit);
    if (!found) refuse(static_cast<double>(limit));
    return *std::move(found);
  }

  double cost(int layer, Side side, const exporters::Format& format) {
    return costs_.of(layer, side, format);
  }

 private:
  std::optional<exporters::Assignment> within(std::int64_t limit) {
    return exporters::choose(
        stack_, shape_,
        [&](int layer, Side side, const exporters::Format& format) {
          return costs_.of(layer, side, format);
        },
        limit);
  }

  /// The fewest bytes whose least cost is below a ceiling.
  exporters::Assignment cheapest_below(double ceiling) {
    auto best = within(exporters::kNoLimit);
    if (!best || best->cost > ceiling)
      throw InfeasibleError(ceiling, best ? best->cost : 0,
                            options_.stack + " reaches no predicted KL below " +
                                significant(best ? best->cost : 0, 4));
    std::int64_t low = 0, high = best->bytes_per_token;  // infeasible, feasible
    while (high - low > 1) {
      const std::int64_t middle = low + (high - low) / 2;
      auto found = within(middle);
      if (found && found->cost <= ceiling) {
        high = found->bytes_per_token;
        best = std::move(found);
      } else {
        low = middle;
      }
    }
    return *std::move(best);
  }

  [[noreturn]] void refuse(double limit) {
    const auto smallest = exporters::choose(
        stack_, shape_, [&](int layer, Side side, const exporters::Format& format) {
          if (!std::isfinite(costs_.of(layer, side, format))) return exporters::kForbidden;
          const auto& own = shape_.layers[static_cast<std::size_t>(layer)];
          return static_cast<double>(own.kv_heads * format.bytes(own.head_dim_of(side)));
        });
    const double least = smallest ? static_cast<double>(smallest->bytes_per_token) : 0;
    const auto bits = [&](double bytes) {
      return significant(8 * bytes / static_cast<double>(shape_.elements()), 4) + " effective bits";
    };
    throw InfeasibleError(8 * limit, 8 * least,
                          "no plan for " + options_.stack + " fits " + bits(limit) +
                              " per element; the smallest takes " + bits(least) + " (" +
                              fixed(least, 0) + " bytes per token)");
  }

  const StackPlanOptions& options_;
  exporters::CacheShape shape_;
  exporters::Stack stack_;
  StackCosts costs_;
};

/// The quantised formats that a stack offers for all layers alike under one setting, K = V alone
/// where it offers every pair; a layer that does not offer them keeps its own first choice.
void add_sizes(const exporters::Stack& stack, const exporters::CacheShape& shape,
               const std::string& name, std::vector<StackSize>& sizes) {
  const auto add = [&](const exporters::LayerFormat& wanted,
                       const std::vector<std::vector<exporters::LayerFormat>>* choices) {
    StackSize size{.stack = name, .format = stack.format(wanted, Side::kKey).name};
    const std::string& v = stack.format(wanted, Side::kValue).name;
    if (v != size.format && v != size.format + " (V)") size.format += ", " + v;
    for (int l = 0; l < shape.num_layers(); ++l) {
      const auto at = static_cast<std::size_t>(l);
      const bool offered =
          !choices || std::ranges::find((*choices)[at], wanted) != (*choices)[at].end();
      size.bytes_per_token +=
          stack.bytes(shape.layers[at], offered ? wanted : (*choices)[at].front());
    }
    if (std::ranges::none_of(sizes, [&](const StackSize& other) {
          return other.stack == size.stack && other.format == size.format;
        }))
      sizes.push_back(std::move(size));
  };
  if (stack.segments)
    for (int format = 0; format < static_cast<int>(stack.formats.size()); ++format)
      if (!stack.formats[static_cast<std::size_t>(format)].plain()) add({format, format}, nullptr);
  constexpr std::size_t kFewSettings = 16;
  for (const exporters::Setting& setting : stack.settings) {
    if (setting.number != 0 && stack.dialect == "thetom") continue;  // modes mix formats
    // The layer in the middle is no boundary.
    const auto& choices = setting.choices[setting.choices.size() / 2];
    const bool every_pair = choices.size() > 4 || stack.settings.size() > kFewSettings;
    for (const auto& wanted : choices) {
      const bool plain =
          stack.format(wanted, Side::kKey).plain() || stack.format(wanted, Side::kValue).plain();
      if (!plain && (!every_pair || wanted.k == wanted.v)) add(wanted, &setting.choices);
    }
  }
}

}  // namespace

PlanBundle plan_on_stack(const PlanBundle& bundle, const std::string& stack) {
  if (const auto types = llamacpp_types(stack); !types.empty())
    return on_llamacpp(bundle, stack, types);
  const auto name = exporters::parse_stack(stack);
  PlanBundle out =
      exporters::as_plan(exporters::project(bundle, stack_of(name, bundle.plan.model)), bundle);
  out.plan.page_tokens = page_tokens(name.target);
  out.plan.policy = "export:" + stack;
  return out;
}

PlanBundle plan_for_stack(const Profile& profile, const StackPlanOptions& options) {
  StackPlanner planner(profile, options);
  const exporters::Assignment chosen = planner.choose();
  // Scales and texts of the profile; a rotation is wished for wherever the stack has one.
  PlanBundle wish = quant::baseline_plan("fp8_e4m3", profile.model, 0, options.context,
                                         options.seed, profile.layers.at(0).inv_freq, &profile);
  wish.plan.codec = "rotated";
  wish.plan.rotation = {.kind = "hadamard"};
  const auto projection = exporters::project_onto(wish, planner.stack(), chosen);
  PlanBundle out = exporters::as_plan(projection, wish);
  Plan& plan = out.plan;
  plan.policy = "for:" + options.stack;
  plan.budget = options.budget;
  plan.page_tokens = page_tokens(planner.stack().name);
  plan.provenance.profile_sha256 = options.profile_sha256;
  plan.provenance.program = options.program;
  quant::SimulatedCost cost{.kl = chosen.cost, .sides = {}};
  for (int l = 0; l < profile.model.num_layers; ++l)
    cost.sides.push_back({planner.cost(l, Side::kKey, projection.format(l, Side::kKey)),
                          planner.cost(l, Side::kValue, projection.format(l, Side::kValue))});
  quant::set_prediction(cost, plan);
  plan.effective_bits = quant::measured_effective_bits(out);
  return out;
}

std::vector<StackSize> stack_sizes(const ModelSpec& model) {
  constexpr std::array<const char*, 9> kStacks = {"vllm",
                                                  "llamacpp:mainline",
                                                  "llamacpp:ik",
                                                  "llamacpp:thetom",
                                                  "llamacpp:buun",
                                                  "lmdeploy",
                                                  "modelopt",
                                                  "kvtuner",
                                                  "hf"};
  const auto shape = exporters::shape_of(model);
  std::vector<StackSize> sizes;
  for (const char* name : kStacks) {
    try {
      add_sizes(stack_of(exporters::parse_stack(name), model), shape, name, sizes);
    } catch (const InputError&) {
      continue;  // this stack cannot hold the model
    }
  }
  return sizes;
}

}  // namespace kvplan::cli
