#include <algorithm>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/dry_run.h"
#include "evaluation/evaluator.h"
#include "planner/allocator.h"
#include "planner/budget.h"
#include "quant/baselines.h"
#include "quant/fit.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

struct SweepFlags {
  ModelTextOptions input;
  std::filesystem::path profile, out;
  std::vector<int> k_bits{2, 3, 4, 5, 6, 8}, v_bits{2, 3, 4, 5};
  std::vector<double> plan_bits{1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 4};
  std::string codec = "turboquant", codec_options;
  double max_ppl_rise = .05;
  std::int64_t windows = 8, context = 4096;
  int group_size = 16;
};

struct Point {
  std::string name;
  int k = 0, v = 0;  // 0: a plan
  double requested_bits = 0;
  CandidateResult result;
};

/// Plans of the profile at the given budgets; what a plan command with the same flags writes.
std::vector<std::pair<double, PlanBundle>> make_plans(const SweepFlags& flags,
                                                      const GlobalOptions& global) {
  std::vector<std::pair<double, PlanBundle>> plans;
  if (flags.profile.empty()) return plans;
  const Profile profile = read_profile(flags.profile);
  quant::FitOptions options;
  options.context = flags.context;
  options.group_size = flags.group_size;
  options.seed = global.seed;
  options.threads = global.threads;
  const quant::Fit fit(profile, options);
  for (const double bits : flags.plan_bits) {
    quant::PlanHeader header;
    header.budget = {"bits", bits};
    header.profile_sha256 = profile_sha256(flags.profile);
    header.program = kProgram;
    planner::CacheGeometry geometry;
    geometry.elements = fit.costs().elements;
    geometry.context = flags.context;
    const auto budget = planner::budget_bits(header.budget, geometry);
    plans.emplace_back(bits, fit.assemble(planner::allocate(fit.costs(), budget), header));
  }
  return plans;
}

/// The point of fewest bits whose perplexity rise keeps the limit; null if none does.
const Point* smallest(const std::vector<Point>& points, double limit, bool plans) {
  const Point* best = nullptr;
  for (const Point& point : points) {
    if ((point.k == 0) != plans || point.result.perplexity_rise > limit) continue;
    if (!best || point.result.effective_bits < best->result.effective_bits ||
        (point.result.effective_bits == best->result.effective_bits &&
         point.result.perplexity_rise < best->result.perplexity_rise))
      best = &point;
  }
  return best;
}

nlohmann::json to_json(const Point& point) {
  const CandidateResult& r = point.result;
  return {{"name", point.name},
          {"k_bits", point.k},
          {"v_bits", point.v},
          {"effective_bits", r.effective_bits},
          {"perplexity_rise", r.perplexity_rise},
          {"perplexity_rise_interval",
           {{"low", r.perplexity_rise_interval.low}, {"high", r.perplexity_rise_interval.high}}},
          {"kl", r.kl.mean},
          {"kl_standard_error", r.kl.standard_error}};
}

std::string describe_point(const Point* point) {
  if (!point) return "none within the limit";
  const CandidateResult& r = point->result;
  return point->name + ", " + significant(r.effective_bits, 4) + " bits, perplexity " +
         percent(r.perplexity_rise) + " [" + percent(r.perplexity_rise_interval.low) + ", " +
         percent(r.perplexity_rise_interval.high) + "], KL " + significant(r.kl.mean);
}

void print_grid(const SweepFlags& flags, const std::vector<Point>& points) {
  std::vector<std::string> header{"perplexity rise"};
  for (const int v : flags.v_bits) header.push_back("V " + std::to_string(v));
  TextTable table(header);
  for (const int k : flags.k_bits) {
    std::vector<std::string> cells{"K " + std::to_string(k)};
    for (const int v : flags.v_bits) {
      const auto found = std::ranges::find_if(
          points, [&](const Point& point) { return point.k == k && point.v == v; });
      cells.push_back(percent(found->result.perplexity_rise));
    }
    table.add_row(cells);
  }
  std::cout << table.text();
  TextTable plans({"plan bits", "perplexity rise", "95 % low", "high", "KL"});
  bool any = false;
  for (const Point& point : points) {
    if (point.k != 0) continue;
    any = true;
    const CandidateResult& r = point.result;
    plans.add_row({significant(r.effective_bits, 4), percent(r.perplexity_rise),
                   percent(r.perplexity_rise_interval.low),
                   percent(r.perplexity_rise_interval.high), significant(r.kl.mean)});
  }
  if (any) std::cout << '\n' << plans.text();
}

int run(const SweepFlags& flags, const GlobalOptions& global) {
  if (!flags.out.empty()) require_absent(flags.out, global);
  const ModelText input = open_model_text(flags.input, flags.windows);
  const std::string suffix = flags.codec_options.empty() ? "" : "+" + flags.codec_options;
  std::vector<Point> points;
  std::vector<PlanBundle> bundles;
  for (const int k : flags.k_bits)
    for (const int v : flags.v_bits) {
      const std::string name =
          flags.codec + ":" + std::to_string(k) + "/" + std::to_string(v) + suffix;
      bundles.push_back(quant::baseline_plan(name, input.model->spec(), 4, flags.context,
                                             global.seed,
                                             models::rotary_frequencies(input.model->config())));
      points.push_back({name, k, v, 0, {}});
    }
  for (auto& [bits, bundle] : make_plans(flags, global)) {
    require_same_model(bundle.plan.model, input.model->spec(), flags.profile.string());
    points.push_back({"plan at " + significant(bits, 4) + " bits", 0, 0, bits, {}});
    bundles.push_back(std::move(bundle));
  }
  std::vector<evaluation::Candidate> candidates;
  for (std::size_t i = 0; i < points.size(); ++i)
    candidates.push_back({points[i].name, &bundles[i]});
  evaluation::EvaluateOptions options;
  options.window = flags.input.window;
  options.threads = global.threads;
  options.weights = flags.input.weights;
  options.bootstrap_seed = global.seed;
  if (global.dry_run) {
    print_dry_run(
        "would evaluate " + std::to_string(points.size()) + " configurations on " +
            std::to_string(input.windows.size()) + " windows of " +
            std::to_string(flags.input.window) + " tokens",
        {{"command", "sweep"},
         {"configurations", points.size()},
         {"windows", input.windows.size()},
         {"window", flags.input.window},
         {"out", flags.out.string()}},
        [&] {
          return estimates::estimate_evaluation(*input.model, input.windows, candidates, options);
        },
        global);
    return 0;
  }
  if (!flags.out.empty()) options.partial_file = flags.out.string() + ".partial";
  ProgressPrinter printer(global.verbosity());
  const Validation measured =
      evaluation::evaluate(*input.model, input.windows, candidates, options, run_control(printer));
  for (std::size_t i = 0; i < points.size(); ++i) points[i].result = measured.candidates[i + 1];

  const Point* grid = smallest(points, flags.max_ppl_rise, false);
  const Point* plan = smallest(points, flags.max_ppl_rise, true);
  nlohmann::json document = {{"format", "kvplan.sweep"},
                             {"version", 1},
                             {"program", kProgram},
                             {"max_perplexity_rise", flags.max_ppl_rise},
                             {"window", measured.window},
                             {"windows", measured.windows},
                             {"smallest_grid", grid ? to_json(*grid) : nlohmann::json()},
                             {"smallest_plan", plan ? to_json(*plan) : nlohmann::json()},
                             {"points", nlohmann::json::array()}};
  for (const Point& point : points) document["points"].push_back(to_json(point));
  if (!flags.out.empty()) {
    write_file_atomically(flags.out, document.dump(1) + "\n");
    std::filesystem::remove(options.partial_file);
  }
  if (global.json) {
    std::cout << document.dump(1) << '\n';
    return 0;
  }
  print_grid(flags, points);
  std::cout << "\nsmallest " << flags.codec << " within " << percent(flags.max_ppl_rise) << ": "
            << describe_point(grid) << '\n';
  if (!flags.profile.empty())
    std::cout << "smallest plan within " << percent(flags.max_ppl_rise) << ": "
              << describe_point(plan) << '\n';
  std::cout << "Both were chosen on this text; validate the choice on other text.\n";
  return 0;
}

}  // namespace

void add_sweep(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "sweep",
      "Grid of K bits x V bits of a codec: the smallest within a perplexity limit, beside plans");
  auto f = std::make_shared<SweepFlags>();
  add_model_text_options(*command, f->input);
  command->add_option("--k-bits", f->k_bits, "Key widths of the grid")
      ->delimiter(',')
      ->check(CLI::Range(1, 8))
      ->capture_default_str();
  command->add_option("--v-bits", f->v_bits, "Value widths of the grid")
      ->delimiter(',')
      ->check(CLI::Range(1, 8))
      ->capture_default_str();
  command->add_option("--codec", f->codec, "turboquant or int")
      ->check(CLI::IsMember({"turboquant", "int"}))
      ->capture_default_str();
  command->add_option("--codec-options", f->codec_options,
                      "Options of the codec as in a baseline's name, such as nc+rht");
  command->add_option("--max-ppl-rise", f->max_ppl_rise, "Largest rise of perplexity, .05 is 5 %")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command->add_option("--profile,-p", f->profile, "Profile of the plans beside the grid");
  command->add_option("--plan-bits", f->plan_bits, "Budgets of the plans")
      ->delimiter(',')
      ->check(positive_number())
      ->capture_default_str();
  command->add_option("--group-size", f->group_size, "Of the plans")
      ->check(CLI::IsMember({8, 16, 32, 64, 128}))
      ->capture_default_str();
  command->add_option("--context", f->context, "Context length of the plans")
      ->check(CLI::Range(1, 1 << 27))
      ->capture_default_str();
  command->add_option("--windows", f->windows, "Windows to evaluate; 0: all")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  command->add_option("--out,-o", f->out, "JSON file");
  add_global_options(*command, global);
  command->callback([f, &global, &action] { action = [f, &global] { return run(*f, global); }; });
}

}  // namespace kvplan::cli
