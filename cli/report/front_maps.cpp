#include "cli/report/front_maps.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>

#include "planner/allocator.h"
#include "planner/constraints.h"
#include "quant/fit.h"

namespace kvplan::cli {
namespace {

constexpr double kTolerance = 1e-9;  // relative, of costs: sums in another order

constexpr planner::Merge kMerges[] = {planner::Merge::kNone, planner::Merge::kTensor,
                                      planner::Merge::kLayer, planner::Merge::kSides,
                                      planner::Merge::kAll};

quant::FitOptions fit_options(const Plan& plan, int threads) {
  quant::FitOptions o = quant::default_fit_options(plan.codec);
  o.code = plan.code;
  o.context = plan.context;
  if (plan.codec == "calibrated") o.group_size = plan.group_size;
  o.norm = plan.norm;
  o.scale_rule = plan.scale_rule;
  o.centre = plan.centre;
  o.rotation = plan.rotation;
  o.seed = plan.seed;
  o.threads = threads;
  for (const auto& [width, name] : plan.codebooks) o.codebooks[width] = name;
  return o;
}

bool is_fp16(const LayerPlan& layer) {
  const auto all_fp16 = [](const SidePlan& side) {
    return std::ranges::all_of(side.heads, [](const HeadPlan& head) {
      return std::ranges::all_of(head.widths, [](int width) { return width == kFp16Width; });
    });
  };
  return all_fp16(layer.k) && all_fp16(layer.v);
}

std::string widths(const CostTable& table, const Allocation& allocation) {
  std::string text;
  const auto begins_head = [&](std::size_t u) {
    const CostUnit &a = table.units[u - 1], &b = table.units[u];
    return a.layer != b.layer || a.side != b.side || a.head != b.head;
  };
  std::vector<int> head;
  const auto finish_head = [&] {
    std::ranges::sort(head, std::greater<>());
    for (const int width : head)
      text += static_cast<char>(width < 10 ? '0' + width : 'a' + (width - 10));
    head.clear();
  };
  for (std::size_t u = 0; u < table.units.size(); ++u) {
    if (u > 0 && begins_head(u)) finish_head();
    const int choice = allocation.choice[u];
    head.push_back(choice == kFp16Choice
                       ? kFp16Width
                       : table.units[u].choices[static_cast<std::size_t>(choice)].width);
  }
  finish_head();
  return text;
}

/// The maps if every point has the cost that the plan says.
std::optional<std::vector<FrontMap>> solve(const std::vector<FrontPoint>& points,
                                           const CostTable& costs,
                                           const planner::MergedTable& merged) {
  std::vector<FrontMap> maps;
  for (const FrontPoint& point : points) {
    const auto size = std::llround(point.effective_bits * static_cast<double>(costs.elements));
    if (size < planner::minimum_bits(merged.table)) return std::nullopt;
    const Allocation found = planner::allocate(merged.table, size);
    if (found.size_bits != size ||
        std::abs(found.cost - point.predicted_kl) > kTolerance * std::abs(point.predicted_kl))
      return std::nullopt;
    maps.push_back({point, widths(costs, planner::expand(merged, costs, found))});
  }
  return maps;
}

}  // namespace

std::vector<FrontMap> front_maps(const Profile& profile, const Plan& plan, std::size_t points,
                                 int threads) {
  const bool ours = plan.codec == "calibrated" || plan.codec == "rotated";
  const bool made_by_fit = plan.policy == "fisher" || plan.policy == "uniform";
  if (plan.front.empty() || !ours || !made_by_fit) return {};
  std::vector<FrontPoint> chosen;
  const std::size_t count = std::min(points, plan.front.size());
  for (std::size_t i = 0; i < count; ++i)
    chosen.push_back(plan.front[count == 1 ? 0 : i * (plan.front.size() - 1) / (count - 1)]);
  const quant::Fit fit(profile, fit_options(plan, threads));
  planner::Constraints constraints;
  for (const LayerPlan& layer : plan.layers)
    if (is_fp16(layer)) constraints.skip_layers.push_back(layer.index);
  for (const planner::Merge merge : kMerges) {
    constraints.merge = merge;
    if (auto maps = solve(chosen, fit.costs(), planner::merge_units(fit.costs(), constraints)))
      return *std::move(maps);
  }
  return {};
}

}  // namespace kvplan::cli
