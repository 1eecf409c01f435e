#pragma once
// Fits codecs to a profile: transforms and lambda of the calibrated codec, cost tables for the planner, finished plans.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "schemas/cost_table.h"
#include "schemas/plan.h"
#include "schemas/profile.h"

namespace kvplan::quant {

struct FitOptions {
  std::string codec = "calibrated";  // calibrated | rotated
  std::int64_t context = 4096;       // tokens that the plan is declared for
  int group_size = 16;               // calibrated: coordinates per width; must divide head_dim
  int max_width = 6;
  std::map<int, std::string> codebooks = {{2, "uniform"}};  // others lloyd_max
  std::string norm = "log8";         // calibrated: log8 | fp16; rotated: fp16
  std::string scale_rule = "unbiased";  // rotated default: norm_corrected
  bool centre = true;
  RotationSpec rotation;             // rotated codecs
  double fisher_shrinkage = 0.05, moment_shrinkage = 0.01;
  std::uint64_t seed = 0;            // of the mixing matrices
  int threads = 1;                   // never changes a byte of the result
};

/// What goes into the plan's header beside the allocation.
struct PlanHeader {
  BudgetSpec budget;
  std::string policy = "fisher";
  int page_tokens = 64;
  std::vector<FrontPoint> front;
  std::string profile_sha256, program;
};

/// A codec family fitted to one profile. Immutable.
class Fit {
 public:
  /// ArgumentError: group_size does not divide head_dim, context <= sink_tokens, unknown names. InputError: profile without
  /// the sums needed.
  Fit(const Profile& profile, const FitOptions& options);
  ~Fit();
  Fit(Fit&&) noexcept;

  /// calibrated: units (layer, side, head, group of group_size), choices 0..max_width; cost 1/2 sum lambda D_u(b), width 0:
  /// max of the measured coherent cost and 1/2 sum lambda. rotated: one unit per (layer, side, head), cost D(b) tr(F) tr(C)/d / 2.
  /// fixed_bits: the norms.
  const CostTable& costs() const;

  /// Turns an allocation over costs().units into a plan: sorts groups into storage order, mixes equal widths, class-mean
  /// lambda, effective bits from the codec's packed size, static bytes, predicted KL and shares. A unit whose chosen width is
  /// kFp16Width must be fp16 for its whole (layer, side).
  PlanBundle assemble(const Allocation& allocation, const PlanHeader& header) const;

  /// Plan with the widths of a policy given directly per layer and side (policies on rotated codecs), and outlier channels
  /// per (layer, side, head), which may be empty.
  struct LayerWidths {
    int k = 0, v = 0;
    std::vector<std::vector<int>> outliers_k, outliers_v;  // [Hk][..] channels at 8 bits, counts multiples of 8
  };
  PlanBundle assemble(const std::vector<LayerWidths>& widths, const PlanHeader& header) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvplan::quant
