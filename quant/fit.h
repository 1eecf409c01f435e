#pragma once
// Fits codecs to a profile: transforms and lambda of the calibrated codec, cost tables for the
// planner, finished plans.

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
  std::string code = "scalar";       // scalar | tcq (calibrated)
  std::int64_t context = 4096;       // tokens that the plan is declared for
  int group_size = 16;  // calibrated: coordinates per width, a multiple of 8 that divides head_dim
  int max_width = 6;    // 1..8
  std::map<int, std::string> codebooks = {
      {2, "uniform"}};                  // 3..6 lloyd_max_byte, 8 uniform, others lloyd_max;
                                        // rotated also takes lloyd_max_beta
  std::string norm = "log8";            // log8 | fp16; rotated: fp16
  std::string scale_rule = "unbiased";  // one | norm_corrected | biased | unbiased
  bool centre = true;
  RotationSpec rotation;  // rotated codecs; kind "none" for calibrated ones
  double fisher_shrinkage = 0.05, moment_shrinkage = 0.01;  // 0..1
  /// Count what errors that are alike on all tokens cost together: those of width 0, and the
  /// shrinkage of rotated codes.
  bool coherent_drop = true;
  bool mixing = true;               // turn coordinates of equal width by a random rotation
  std::vector<int> outlier_counts;  // rotated: also offer this many channels at 8 bits, of largest
                                    // F_ii C_ii; multiples of 8 below head_dim, ascending
  std::uint64_t seed = 0;           // of the mixing matrices
  int threads = 1;                  // 0: all cores; never changes a byte of the result
};

/// The defaults of a codec: those above, or for "rotated" a Haar rotation, Lloyd-Max at 2 bits too,
/// norm fp16, norm_corrected.
FitOptions default_fit_options(const std::string& codec);

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
  /// Keeps nothing of `profile`. ArgumentError: group_size that does not divide head_dim, context
  /// <= sink_tokens, unknown names (each says the option and what it accepts). InputError: profile
  /// without the sums needed, or a Fisher matrix or second moment that is not positive definite
  /// after shrinkage.
  Fit(const Profile& profile, const FitOptions& options);
  ~Fit();
  Fit(Fit&&) noexcept;
  Fit& operator=(Fit&&) noexcept;

  /// calibrated: units (layer, side, head, group of group_size), choices 0..max_width; cost 1/2 sum
  /// lambda D_u(b), width 0: max of the measured coherent cost and 1/2 sum lambda. rotated: one
  /// unit per (layer, side, head), cost D(b) tr(F) tr(C)/d / 2 with C about the mean if
  /// options.centre, else about 0, and the measured coherent cost of what the code shrinks. D is
  /// the relative error of the codebook under options.scale_rule; options.outlier_counts multiply
  /// the choices; with code tcq that of the trellis for widths 1..4, also where a head will turn
  /// out too short for one. fixed_bits: the norms.
  const CostTable& costs() const;

  /// Turns an allocation over costs().units into a plan: sorts groups into storage order, mixes
  /// equal widths, class-mean lambda, effective bits and bytes per token from the codec's packed
  /// size, predicted KL and shares. A unit with choice -1 is fp16, which must hold for its whole
  /// (layer, side). static_bytes: what a runtime keeps per model beside the cache: A and A^-1
  /// (calibrated) or the distinct dense rotations (rotated; Hadamard needs none) in fp16, means in
  /// fp32 if centred, levels in fp32, trellis tables in fp16, outlier channel lists in int32;
  /// lambda (at most seven distinct numbers per head) and everything of fp16 sides are not counted.
  /// effective_bits_at_context stays 0: the caller sets it (planner/budget.h).
  PlanBundle assemble(const Allocation& allocation, const PlanHeader& header) const;

  /// Widths of a policy, given directly.
  struct LayerWidths {
    int k = 0, v = 0;  // 0..8 (calibrated: at most max_width) or kFp16Width
    std::vector<std::vector<int>> outliers_k,
        outliers_v;  // [Hk][..] channels at 8 bits, counts multiples of 8; or empty
  };
  /// Plan with one width per layer and side; outlier channels for rotated codecs only. Their
  /// predicted cost is that of the step of an 8-bit code whose range is the largest value that the
  /// profile saw in them.
  PlanBundle assemble(const std::vector<LayerWidths>& widths, const PlanHeader& header) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvplan::quant
