#pragma once
// A small synthetic profile and options that the tests of Fit share.

#include <vector>

#include "quant/fit.h"
#include "tests/quant/synthetic_profile.h"

namespace kvplan::quant::testing {

inline const PlanHeader kNoHeader;

inline const Profile& small_profile() {
  static const Profile profile = synthetic_profile({});
  return profile;
}

inline FitOptions small_options() {
  FitOptions options;
  options.context = 40;
  options.group_size = 8;
  return options;
}

inline FitOptions rotated_options() {
  FitOptions options = default_fit_options("rotated");
  options.context = 40;
  return options;
}

inline std::vector<Fit::LayerWidths> same_widths(int layers, int k, int v) {
  return std::vector<Fit::LayerWidths>(static_cast<std::size_t>(layers), {k, v, {}, {}});
}

}  // namespace kvplan::quant::testing
