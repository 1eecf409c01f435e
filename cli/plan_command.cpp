#include <algorithm>
#include <cmath>
#include <iostream>

#include "cli/commands.h"
#include "cli/describe.h"
#include "cli/plan_trials.h"
#include "cli/stack_plans.h"
#include "planner/allocator.h"
#include "planner/budget.h"
#include "planner/constraints.h"
#include "planner/correction.h"
#include "planner/policies.h"
#include "quant/baselines.h"
#include "quant/fit.h"
#include "quant/moments.h"
#include "quant/predict.h"
#include "schemas/error.h"
#include "schemas/validation.h"

namespace kvplan::cli {
namespace {

struct PlanFlags {
  std::filesystem::path profile, out;
  double bits = 0, bytes_per_token = 0, gib = 0, max_kl = 0;
  std::int64_t context = 4096, batch = 1;
  std::string policy = "fisher", codec = "calibrated", code = "scalar", norm, merge = "none",
              rotation, scale_rule;
  std::vector<std::string> codebooks;
  int group_size = 16, max_width = 6;
  std::vector<int> widths, skip_layers, outliers;
  double fisher_shrinkage = quant::FitOptions{}.fisher_shrinkage;
  double moment_shrinkage = quant::FitOptions{}.moment_shrinkage;
  bool no_mixing = false, no_coherent = false;
  std::vector<std::filesystem::path> corrections;
  TrialFlags trials;
  bool no_centre = false;
  std::string stack;
};

constexpr int kPageTokens = 64;
constexpr std::string_view kPolicies[] = {"fisher", "uniform", "rank432", "norm-ratio",
                                          "outlier83"};
/// Points of the Pareto front that a plan keeps, evenly spaced in bits.
constexpr std::size_t kFrontPoints = 512;

planner::Merge parse_merge(const std::string& name) {
  if (name == "none") return planner::Merge::kNone;
  if (name == "tensor") return planner::Merge::kTensor;
  if (name == "layer") return planner::Merge::kLayer;
  if (name == "kv") return planner::Merge::kSides;
  return planner::Merge::kAll;
}

BudgetSpec parse_budget(const PlanFlags& f) {
  const std::pair<const char*, double> given[] = {{"bits", f.bits},
                                                  {"bytes_per_token", f.bytes_per_token},
                                                  {"gib", f.gib},
                                                  {"max_kl", f.max_kl}};
  BudgetSpec budget{"none", 0};
  for (const auto& [kind, value] : given) {
    if (value > 0) budget = {kind, value};
  }
  return budget;
}

quant::FitOptions fit_options(const PlanFlags& f, const GlobalOptions& global) {
  quant::FitOptions o = quant::default_fit_options(f.codec);
  o.code = f.code;
  o.context = f.context;
  o.max_width =
      f.widths.empty() ? f.max_width : *std::max_element(f.widths.begin(), f.widths.end());
  o.seed = global.seed;
  o.threads = global.threads;
  o.centre = !f.no_centre;
  o.mixing = !f.no_mixing;
  o.coherent_drop = !f.no_coherent;
  o.fisher_shrinkage = f.fisher_shrinkage;
  o.moment_shrinkage = f.moment_shrinkage;
  o.outlier_counts = f.outliers;
  if (f.codec == "calibrated") o.group_size = f.group_size;
  if (!f.norm.empty()) o.norm = f.norm;
  if (!f.scale_rule.empty()) o.scale_rule = f.scale_rule;
  if (!f.rotation.empty()) o.rotation.kind = f.rotation;
  o.rotation.seed = o.rotation.kind == "none" ? 0 : global.seed;
  for (const auto& item : f.codebooks) {
    const auto eq = item.find('=');
    if (eq != 1 || item[0] < '1' || item[0] > '8') {
      throw ArgumentError("--codebook: expected WIDTH=NAME such as 2=lloyd_max; found '" + item +
                          "'");
    }
    o.codebooks[item[0] - '0'] = item.substr(2);
  }
  return o;
}

std::vector<FrontPoint> thinned_front(const CostTable& table) {
  const auto front = planner::pareto_front(table);
  std::vector<FrontPoint> out;
  const std::size_t kept = std::min(front.size(), kFrontPoints);
  for (std::size_t i = 0; i < kept; ++i) {
    const auto& point = front[kept == 1 ? 0 : i * (front.size() - 1) / (kept - 1)];
    out.push_back(
        {static_cast<double>(point.size_bits) / static_cast<double>(table.elements), point.cost});
  }
  return out;
}

/// The policies that are published rules for rotated codecs and fix their widths themselves.
std::vector<quant::Fit::LayerWidths> rule_widths(const Profile& profile,
                                                 const std::string& policy) {
  const auto layers = profile.summary.size();
  std::vector<planner::SideWidths> widths;
  if (policy == "rank432") {
    widths = planner::rank432_widths(profile.summary);
  } else if (policy == "norm-ratio") {
    widths = planner::norm_ratio_widths(profile.summary);
  } else {
    widths = planner::uniform_widths(static_cast<int>(layers), 3, 3);
  }
  std::vector<quant::Fit::LayerWidths> out(layers);
  for (std::size_t l = 0; l < layers; ++l) {
    out[l].k = widths[l].k;
    out[l].v = widths[l].v;
  }
  if (policy == "outlier83") {
    const auto channels =
        planner::outlier83_channels(profile.summary, quant::key_channel_rms(profile),
                                    profile.model.kv_heads, profile.model.head_dim);
    for (std::size_t l = 0; l < layers; ++l) out[l].outliers_k = channels[l];
  }
  return out;
}

/// planner::allocate with its refusal in the user's unit.
Allocation allocate(const CostTable& table, std::int64_t bits) {
  try {
    return planner::allocate(table, bits);
  } catch (const InfeasibleError& e) {
    const auto per_element = [&](double x) {
      return significant(x / static_cast<double>(table.elements), 4) + " effective bits";
    };
    throw InfeasibleError(
        e.requested(), e.minimum(),
        "no plan fits " + per_element(e.requested()) +
            " per element; the smallest feasible budget is " + per_element(e.minimum()) + " (" +
            fixed(std::ceil(e.minimum() / 8), 0) +
            " bytes per token); widen the budget, or relax --widths, --merge or --skip-layers");
  }
}

/// Policies that are no rule of ours name a published codec (docs/baselines.md).
bool names_codec(const std::string& policy) {
  return std::ranges::find(kPolicies, policy) == std::end(kPolicies);
}

/// The codec that the policy names, its cost simulated from the profile.
PlanBundle make_published_plan(const Profile& profile, const std::string& profile_sha,
                               const PlanFlags& flags, const GlobalOptions& global) {
  PlanBundle bundle =
      quant::baseline_plan(flags.policy, profile.model, profile.sink_tokens, flags.context,
                           global.seed, profile.layers.at(0).inv_freq, &profile);
  bundle.plan.provenance.profile_sha256 = profile_sha;
  bundle.plan.provenance.program = kProgram;
  quant::set_prediction(
      quant::simulate_cost(bundle, profile, {.seed = global.seed, .threads = global.threads}),
      bundle.plan);
  return bundle;
}

/// OPTION=VALUE of --try.
void apply_change(const std::string& change, PlanFlags& flags) {
  const auto equals = change.find('=');
  const std::string name = change.substr(0, equals);
  const std::string value = equals == std::string::npos ? "" : change.substr(equals + 1);
  if (name == "code") {
    flags.code = value;
  } else if (name == "norm") {
    flags.norm = value;
  } else if (name == "scale-rule") {
    flags.scale_rule = value;
  } else if (name == "rotation") {
    flags.rotation = value;
  } else if (name == "codebook") {
    flags.codebooks.push_back(value);
  } else if (name == "group-size" || name == "max-width") {
    const int number = value.size() < 4 ? std::atoi(value.c_str()) : 0;
    (name == "group-size" ? flags.group_size : flags.max_width) = number;
  } else {
    throw ArgumentError(
        "--try: expected code, norm, scale-rule, rotation, codebook, group-size or "
        "max-width with =VALUE; found '" +
        change + "'");
  }
}

/// The curve from predicted to measured KL of validated plans.
planner::CorrectionCurve read_correction(const std::vector<std::filesystem::path>& files) {
  std::vector<planner::CorrectionPoint> points;
  for (const auto& file : files) {
    for (const CandidateResult& candidate : read_validation(file).candidates) {
      if (candidate.predicted_kl && candidate.mode == "worst")
        points.push_back({*candidate.predicted_kl, candidate.kl.mean, candidate.kl.standard_error});
    }
  }
  if (!files.empty() && points.empty())
    throw InputError(files.front().string(), "/candidates",
                     "expected a plan measured in mode worst beside its predicted KL, found none");
  return planner::fit_correction(points);
}

PlanBundle make_plan(const Profile& profile, const std::string& profile_sha, const PlanFlags& flags,
                     const GlobalOptions& global) {
  if (names_codec(flags.policy)) return make_published_plan(profile, profile_sha, flags, global);
  if (!flags.stack.empty()) {
    BudgetSpec budget = parse_budget(flags);
    if (budget.kind == "max_kl")
      budget.value = read_correction(flags.corrections).predicted(budget.value);
    PlanBundle bundle = plan_for_stack(profile, {.stack = flags.stack,
                                                 .budget = budget,
                                                 .context = flags.context,
                                                 .batch = flags.batch,
                                                 .seed = global.seed,
                                                 .threads = global.threads,
                                                 .profile_sha256 = profile_sha,
                                                 .program = kProgram});
    bundle.plan.budget = parse_budget(flags);
    return bundle;
  }
  quant::PlanHeader header;
  header.budget = parse_budget(flags);
  header.policy = flags.policy;
  header.page_tokens = kPageTokens;
  header.profile_sha256 = profile_sha;
  header.program = kProgram;
  const quant::Fit fit(profile, fit_options(flags, global));
  if (flags.policy != "fisher" && flags.policy != "uniform")
    return fit.assemble(rule_widths(profile, flags.policy), header);

  planner::Constraints constraints;
  constraints.merge = flags.policy == "uniform" ? planner::Merge::kAll : parse_merge(flags.merge);
  constraints.widths = flags.widths;
  constraints.skip_layers = flags.skip_layers;
  const auto merged = planner::merge_units(fit.costs(), constraints);
  header.front = thinned_front(merged.table);
  planner::CacheGeometry geometry;
  geometry.elements = fit.costs().elements;
  geometry.context = flags.context;
  geometry.batch = flags.batch;
  geometry.sink_tokens = profile.sink_tokens;
  geometry.page_tokens = kPageTokens;
  const auto allocation =
      header.budget.kind == "max_kl"
          ? planner::allocate_for_cost(
                merged.table, read_correction(flags.corrections).predicted(header.budget.value))
          : allocate(merged.table, planner::budget_bits(header.budget, geometry));
  return fit.assemble(planner::expand(merged, fit.costs(), allocation), header);
}

int run(const PlanFlags& flags, const GlobalOptions& global) {
  const bool has_budget = parse_budget(flags).kind != "none";
  const bool takes_budget = flags.policy == "fisher" || flags.policy == "uniform";
  if (takes_budget && !has_budget) {
    throw ArgumentError("plan: policy " + flags.policy +
                        " needs a budget: one of --bits, --bytes-per-token, --gib, --max-kl");
  }
  if (names_codec(flags.policy)) {
    if (has_budget) {
      throw ArgumentError("plan: policy " + flags.policy +
                          " is not fisher or uniform, which take a budget; the name of a published "
                          "codec fixes its bits: give no budget with it");
    }
  } else if (!takes_budget && (has_budget || flags.codec != "rotated")) {
    throw ArgumentError("plan: policy " + flags.policy +
                        " is a published rule for rotated codecs that fixes its widths: give "
                        "--codec rotated and no budget");
  }
  if (!flags.stack.empty() && flags.policy != "fisher")
    throw ArgumentError(
        "plan: --for chooses among the stack's own formats, so it takes no --policy");
  require_absent(flags.out, global);
  const auto profile = read_profile(flags.profile);
  const std::string profile_sha = profile_sha256(flags.profile);
  const auto plan_with = [&](const std::vector<std::string>& changes, std::uint64_t seed) {
    PlanFlags changed = flags;
    for (const std::string& change : changes)
      for (const std::string& option : split_list(change)) apply_change(option, changed);
    GlobalOptions seeded = global;
    seeded.seed = seed;
    return make_plan(profile, profile_sha, changed, seeded);
  };
  std::string trials;
  PlanBundle bundle = flags.trials.asked() ? plan_by_trials(flags.trials, global, plan_with, trials)
                                           : plan_with({}, global.seed);
  planner::CacheGeometry geometry;
  geometry.elements = elements_per_token(profile.model);
  geometry.context = flags.context;
  geometry.sink_tokens = bundle.plan.sink_tokens;
  geometry.page_tokens = bundle.plan.page_tokens;
  bundle.plan.effective_bits_at_context =
      planner::effective_bits_at_context(bundle.plan.effective_bits, geometry);
  if (!global.dry_run) write_plan(bundle, flags.out, global.force);
  if (!global.json) std::cout << trials;
  std::cout << (global.json ? plan_json(bundle) : describe(bundle));
  return 0;
}

}  // namespace

void add_plan(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "plan", "Allocate bits exactly over layers, K and V, heads and channel groups");
  auto f = std::make_shared<PlanFlags>();
  command->add_option("--profile,-p", f->profile, "Profile folder")->required();
  auto* budget = command->add_option_group("Budget (one)");
  budget->add_option("--bits", f->bits, "Effective bits per element, everything stored counted")
      ->check(positive_number());
  budget->add_option("--bytes-per-token", f->bytes_per_token, "Bytes per packed token, all layers")
      ->check(positive_number());
  budget->add_option("--gib", f->gib, "GiB for --batch sequences of --context tokens")
      ->check(positive_number());
  budget
      ->add_option("--max-kl", f->max_kl,
                   "Smallest plan with at most this predicted KL (nats per token)")
      ->check(positive_number());
  budget->require_option(0, 1);
  command->add_option("--context", f->context, "Context length the plan is made for")
      ->check(CLI::Range(1, 1 << 27))
      ->capture_default_str();
  command->add_option("--batch", f->batch, "Sequences held, for --gib")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_option("--policy", f->policy,
                   "fisher, uniform, rank432, norm-ratio, outlier83, or a published codec by name, "
                   "such as q4_0 or turboquant:3+rht (docs/baselines.md)")
      ->capture_default_str();
  auto* stack = command->add_option(
      "--for", f->stack,
      "Plan under the constraints of a serving stack, with what its own codecs cost: vllm, "
      "vllm:DTYPE, llamacpp, llamacpp:ik, kvtuner, hf, lmdeploy, modelopt, sglang or kv-scales");
  command->add_option("--codec", f->codec, "calibrated or rotated")
      ->check(CLI::IsMember({"calibrated", "rotated"}))
      ->capture_default_str();
  command
      ->add_option("--code", f->code,
                   "scalar, or tcq: trellis code for widths 1 to 4 (calibrated codec)")
      ->check(CLI::IsMember({"scalar", "tcq"}))
      ->capture_default_str();
  command->add_option(
      "--codebook", f->codebooks,
      "WIDTH=lloyd_max|lloyd_max_byte|uniform (default: 2 and 8 uniform, 3..6 lloyd_max_byte, "
      "others lloyd_max)");
  command->add_option("--group-size", f->group_size, "Coordinates that share a width")
      ->check(CLI::IsMember({8, 16, 32, 64, 128}))
      ->capture_default_str();
  command->add_option("--norm", f->norm, "log8 (calibrated default) or fp16")
      ->check(CLI::IsMember({"log8", "fp16"}));
  command
      ->add_option("--scale-rule", f->scale_rule,
                   "one, norm_corrected (rotated default), biased, unbiased (calibrated default)")
      ->check(CLI::IsMember({"one", "norm_corrected", "biased", "unbiased"}));
  command
      ->add_option("--rotation", f->rotation,
                   "Rotated codec: haar (default), hadamard or signed_hadamard")
      ->check(CLI::IsMember({"haar", "hadamard", "signed_hadamard"}));
  command
      ->add_option("--outliers", f->outliers,
                   "Rotated codec: also choose between these numbers of channels at 8 bits, "
                   "such as 8,16")
      ->delimiter(',');
  command
      ->add_option("--correction", f->corrections,
                   "For --max-kl: validation.json files of this model's plans; the ceiling then "
                   "holds for the KL that their predictions turned out as")
      ->needs("--max-kl");
  add_trial_options(*command, f->trials);
  auto* ingredients = command->add_option_group("Ingredients, to measure what each is worth");
  ingredients
      ->add_option("--fisher-shrinkage", f->fisher_shrinkage,
                   "Towards the identity; 1 plans by variance alone inside a head")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  ingredients->add_option("--moment-shrinkage", f->moment_shrinkage)
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  ingredients->add_flag("--no-mixing", f->no_mixing,
                        "Store coordinates of equal width as they are");
  ingredients->add_flag("--no-coherent", f->no_coherent,
                        "Cost of width 0 without its measured coherence over tokens");
  command->add_flag("--no-centre", f->no_centre, "Do not subtract the mean");
  command->add_option("--max-width", f->max_width, "Largest width")
      ->check(CLI::Range(1, 8))
      ->capture_default_str();
  command->add_option("--widths", f->widths, "Allowed widths, such as 0,2,4")
      ->delimiter(',')
      ->check(CLI::Range(0, 8));
  command
      ->add_option("--merge", f->merge,
                   "One width per tensor, per layer (K = V), or one K and one V width for all (kv)")
      ->check(CLI::IsMember({"none", "tensor", "layer", "kv"}))
      ->capture_default_str();
  command->add_option("--skip-layers", f->skip_layers, "Layers kept in fp16")->delimiter(',');
  for (const char* other :
       {"--codec", "--code", "--codebook", "--group-size", "--norm", "--scale-rule", "--rotation",
        "--outliers", "--max-width", "--widths", "--merge", "--skip-layers"})
    stack->excludes(command->get_option(other));
  command->add_option("--out,-o", f->out, "Folder of the plan")->required();
  add_global_options(*command, global);
  command->callback([f, &global, &action] { action = [f, &global] { return run(*f, global); }; });
}

}  // namespace kvplan::cli
