#include "studies/seed_runs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "evaluation/evaluation_statistics.h"
#include "schemas/error.h"
#include "studies/captures.h"
#include "studies/vectors.h"

namespace kvplan::studies {
namespace {

double mean_distortion(ModelLab& lab, const PlanBundle& bundle) {
  const auto& capture = lab.capture();
  const auto stored = stored_layers(capture, bundle);
  double sum = 0;
  for (std::size_t l = 0; l < capture.size(); ++l)
    sum += vector_errors(capture[l].k, stored[l].k, bundle.plan.sink_tokens).relative_mse +
           vector_errors(capture[l].v, stored[l].v, bundle.plan.sink_tokens).relative_mse;
  return sum / static_cast<double>(2 * capture.size());
}

/// Standard deviations that a value lies below the mean.
double lead(std::span<const double> values, std::size_t index) {
  const Spread s = spread(values);
  return s.sd > 0 ? (s.mean - values[index]) / s.sd : 0;
}

}  // namespace

Spread spread(std::span<const double> values) {
  if (values.size() < 2)
    throw ArgumentError("a spread needs at least two values, got " + std::to_string(values.size()));
  Spread s;
  s.mean = evaluation::mean(values);
  for (const double x : values) s.sd += square(x - s.mean);
  s.sd = std::sqrt(s.sd / static_cast<double>(values.size() - 1));
  const auto [min, max] = std::ranges::minmax(values);
  s.min = min;
  s.max = max;
  return s;
}

SeedRuns seed_runs(ModelLab& lab, const std::string& name, int count,
                   const std::function<PlanBundle(std::uint64_t seed)>& bundle) {
  ModelLab::NamedBundles bundles;
  for (int seed = 0; seed < count; ++seed)
    bundles.emplace_back(name + " seed " + std::to_string(seed),
                         bundle(static_cast<std::uint64_t>(seed)));
  lab.prepare(bundles);
  SeedRuns runs;
  runs.name = name;
  for (const auto& [label, stored] : bundles) {
    const LabScores& scores = lab.scores(label, stored);
    runs.distortion.push_back(mean_distortion(lab, stored));
    runs.kl.push_back(scores.kl.mean);
    runs.perplexity.push_back(scores.perplexity);
    runs.perplexity_rise.push_back(scores.perplexity_rise);
    const std::vector<double> windows = evaluation::window_means(scores.tokens.kl);
    const std::size_t half = windows.size() / 2;
    if (half == 0) throw ArgumentError("choosing a seed needs at least two held-out windows");
    runs.first_kl.push_back(evaluation::mean(std::span(windows).first(half)));
    runs.second_kl.push_back(evaluation::mean(std::span(windows).subspan(half)));
  }
  return runs;
}

SeedChoice choose_seed(const SeedRuns& runs) {
  SeedChoice choice;
  choice.winner =
      static_cast<std::size_t>(std::ranges::min_element(runs.first_kl) - runs.first_kl.begin());
  choice.chosen_lead = lead(runs.first_kl, choice.winner);
  choice.held_out_lead = lead(runs.second_kl, choice.winner);
  return choice;
}

StudyTable spread_table(const std::vector<SeedRuns>& runs) {
  StudyTable table{"Spread over seeds", {"codec", "figure", "mean", "sd", "CV", "min", "max"}, {}};
  for (const SeedRuns& run : runs)
    for (const auto& [figure_name, values] : {std::pair{"relative squared error", &run.distortion},
                                              {"KL, nats per token", &run.kl},
                                              {"perplexity", &run.perplexity},
                                              {"perplexity rise", &run.perplexity_rise}}) {
      const Spread s = spread(*values);
      table.rows.push_back({run.name, figure_name, figure(s.mean), figure(s.sd), figure(s.cv(), 3),
                            figure(s.min), figure(s.max)});
    }
  return table;
}

}  // namespace kvplan::studies
