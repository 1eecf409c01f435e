#pragma once
// The widths behind the points of a plan's Pareto front: a plan keeps sizes and costs alone, its
// profile gives the rest.

#include <cstddef>
#include <string>
#include <vector>

#include "schemas/plan.h"
#include "schemas/profile.h"

namespace kvplan::cli {

struct FrontMap {
  FrontPoint point;
  /// A base-36 digit for each group: layer by layer, keys then values, heads, groups in storage
  /// order.
  std::string widths;
};

/// At most `points` maps, evenly spaced over the plan's front. The profile is fitted again and
/// every point solved exactly. Empty when that does not give the plan's own front: it has none, or
/// its profile is another one, or it was made with options that a plan does not keep (--widths,
/// shrinkages, --outliers).
std::vector<FrontMap> front_maps(const Profile& profile, const Plan& plan, std::size_t points,
                                 int threads);

}  // namespace kvplan::cli
