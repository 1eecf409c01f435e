#include "cli/plan_trials.h"

#include "evaluation/trials.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

struct NamedPlan {
  std::string name;
  PlanBundle bundle;
};

/// Measures the candidates and adds their rows.
std::vector<evaluation::Trial> measure(const std::vector<NamedPlan>& plans, const ModelText& input,
                                       const TrialFlags& flags, const GlobalOptions& global) {
  std::vector<evaluation::Candidate> candidates;
  for (const NamedPlan& plan : plans) {
    require_same_model(plan.bundle.plan.model, input.model->spec(), "the profile");
    candidates.push_back({plan.name, &plan.bundle});
  }
  evaluation::EvaluateOptions options;
  options.window = flags.input.window;
  options.threads = global.threads;
  options.weights = flags.input.weights;
  options.devices = flags.input.devices;
  options.memory_bytes = flags.input.memory_bytes;
  options.bootstrap_seed = global.seed;
  ProgressPrinter printer(global.verbosity());
  return evaluation::run_trials(*input.model, input.windows, candidates, flags.folds, options,
                                run_control(printer));
}

void record(const std::vector<evaluation::Trial>& trials, std::size_t chosen, Plan& plan) {
  for (std::size_t i = 0; i < trials.size(); ++i) {
    const evaluation::Trial& t = trials[i];
    plan.trials.push_back({t.name, t.kl, t.worst_fold_kl, t.perplexity_rise, t.held_out_kl,
                           t.held_out_perplexity_rise, i == chosen});
  }
}

std::string table_of(const std::vector<evaluation::Trial>& trials, std::size_t chosen) {
  TextTable table({"trial", "KL", "worst fold", "perplexity", "held-out KL", "perplexity", ""});
  for (std::size_t i = 0; i < trials.size(); ++i) {
    const evaluation::Trial& t = trials[i];
    table.add_row({t.name, significant(t.kl), significant(t.worst_fold_kl),
                   percent(t.perplexity_rise, 2), significant(t.held_out_kl),
                   percent(t.held_out_perplexity_rise, 2), i == chosen ? "chosen" : ""});
  }
  return table.text();
}

std::string spread_of(const std::vector<evaluation::Trial>& trials) {
  std::vector<double> kl, rise, held_out;
  for (const evaluation::Trial& t : trials) {
    kl.push_back(t.kl);
    rise.push_back(1 + t.perplexity_rise);
    held_out.push_back(t.held_out_kl);
  }
  TextTable table({"over seeds", "mean", "sd", "CV", "min", "max"});
  const auto add = [&](const char* name, const std::vector<double>& values) {
    const evaluation::Spread s = evaluation::spread(values);
    table.add_row({name, significant(s.mean), significant(s.sd, 2), significant(s.cv, 2),
                   significant(s.min), significant(s.max)});
  };
  add("KL", kl);
  add("perplexity / fp16", rise);
  add("held-out KL", held_out);
  return table.text();
}

}  // namespace

PlanBundle plan_by_trials(const TrialFlags& flags, const GlobalOptions& global,
                          const MakePlan& make_plan, std::string& summary) {
  if (flags.input.model.empty() || flags.input.text.empty())
    throw ArgumentError("plan: --seeds and --try measure candidates: give --model and --text");
  const ModelText input = open_model_text(flags.input, flags.windows);
  std::vector<std::string> changes;
  PlanBundle best = make_plan(changes, global.seed);
  std::vector<PlanTrial> finished;
  if (!flags.tries.empty()) {
    std::vector<NamedPlan> plans;
    plans.push_back({"as asked", std::move(best)});
    for (const std::string& change : flags.tries)
      plans.push_back({change, make_plan({change}, global.seed)});
    const auto trials = measure(plans, input, flags, global);
    const std::size_t chosen = evaluation::gated_choice(
        trials, evaluation::EvaluateOptions{}.bootstrap_samples, global.seed);
    if (chosen > 0) changes.push_back(flags.tries[chosen - 1]);
    summary += table_of(trials, chosen) + "\n";
    best = std::move(plans[chosen].bundle);
    record(trials, chosen, best.plan);
    finished = best.plan.trials;
  }
  if (flags.seeds > 0) {
    std::vector<NamedPlan> plans;
    for (int s = 0; s < flags.seeds; ++s) {
      const std::uint64_t seed = global.seed + static_cast<std::uint64_t>(s);
      plans.push_back({"seed " + std::to_string(seed), make_plan(changes, seed)});
    }
    const auto trials = measure(plans, input, flags, global);
    const std::size_t chosen = evaluation::smallest_worst_fold(trials);
    summary += table_of(trials, chosen) + "\n" + spread_of(trials) + "\n";
    best = std::move(plans[chosen].bundle);
    best.plan.trials = finished;
    record(trials, chosen, best.plan);
  }
  // What chose a plan cannot validate it.
  for (const ProfileSource& source : input.source_infos())
    best.plan.provenance.sources.push_back(source);
  return best;
}

void add_trial_options(CLI::App& command, TrialFlags& f) {
  auto* group = command.add_option_group("Candidates measured on calibration text");
  group
      ->add_option("--seeds", f.seeds,
                   "Measure this many rotation seeds from --seed on; keep the one of smallest "
                   "worst-fold KL")
      ->check(CLI::Range(2, 1000));
  group->add_option("--try", f.tries,
                    "OPTION=VALUE such as code=tcq, or several joined with commas: take it if it "
                    "lowers KL by more than chance (95 % paired bootstrap)");
  group->add_option("--model,-m", f.input.model, "Model to measure on");
  group->add_option("--text,-t", f.input.text, "Calibration text to measure on");
  f.input.part = "0:0.5";
  group->add_option("--part", f.input.part, "Token fractions A:B of every text file")
      ->capture_default_str();
  group->add_option("--window", f.input.window, "Tokens per window")
      ->check(CLI::Range(24, 1 << 20))
      ->capture_default_str();
  add_dtype_option(*group, f.input.weights);
  add_devices_option(*group, f.input.devices);
  add_memory_option(*group, f.input.memory_bytes);
  group->add_option("--windows", f.windows, "Windows; the last quarter only checks the choice")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  group->add_option("--folds", f.folds, "Folds of the choosing windows")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
}

}  // namespace kvplan::cli
