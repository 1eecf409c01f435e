#pragma once
// What a Fit remembers of its profile. Private to quant: fit.cpp fills it, fit_assemble.cpp reads
// it.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "quant/calibrated_transform.h"
#include "quant/codebook.h"
#include "quant/fit.h"

namespace kvplan::quant {

/// One layer, side and KV head.
struct HeadFit {
  CalibratedTransform transform;                         // calibrated only
  std::vector<float> mean;                               // [d] k: before rotary; 0 without centring
  std::vector<float> mean_rotated;                       // [d] k only
  std::vector<float> absmax;                             // [d]
  std::vector<double> fisher_diagonal, second_diagonal;  // [d] after rotary, not shrunk
  double rotated_cost = 0;                               // 1/2 tr(F) E|x|^2 / d, uncentred
  double coherent_excess = 0;  // rotated only: cost of dropping the vector on all tokens at once,
                               // beyond that of independent tokens
  std::vector<int> by_gain;    // channels by descending F_ii C_ii, ties to the lower one
  /// The `count` channels whose error costs most at equal bits, ascending.
  std::vector<int> outliers(int count) const;
};

/// What is stored of one layer, side and KV head and what that costs.
struct HeadChoice {
  HeadPlan plan;    // widths still in lambda order
  double cost = 0;  // nats per token
  bool fp16() const { return plan.widths.front() == kFp16Width; }
};

struct Fit::Impl {
  FitOptions options;
  ModelSpec model;
  int sink_tokens = 0;
  std::int64_t calibration_tokens = 0;
  std::vector<ProfileSource> sources;
  std::vector<std::vector<double>> inv_freq;         // [layer][rotary_dim/2]
  std::array<Codebook, kMaxCodebookBits + 1> books;  // by width; 0 unused
  std::vector<HeadFit> heads;                        // by head_index
  CostTable costs;

  Impl(const Profile& profile, const FitOptions& chosen);
  /// Choices of a rotated head: widths, each also with outlier channels if the options say so.
  std::vector<CostChoice> rotated_choices(const HeadFit& head) const;
  /// Fills heads and cost units of one head.
  void fit_head(const Profile& profile, int layer, Side side, int head);

  std::size_t head_index(int layer, Side side, int head) const {
    return static_cast<std::size_t>((layer * 2 + static_cast<int>(side)) * model.kv_heads + head);
  }
  bool calibrated() const { return options.codec == "calibrated"; }
  bool tcq() const { return options.code == "tcq"; }
  /// Coordinates per entry of HeadPlan::widths.
  int group_size() const { return calibrated() ? options.group_size : model.head_dim; }
  int groups() const { return model.head_dim / group_size(); }
  /// Of a width of 1..8: "lloyd_max" unless the options name another.
  std::string codebook_name(int width) const;
  /// Squared error of a code of `width` bits relative to the vector's energy, under the options'
  /// code, codebook and scale rule.
  double relative_error(int width) const;
  /// What a code of `width` bits takes off a vector's length on average: the part of its error that
  /// is alike on all tokens.
  double shrinkage(int width) const;
  /// Rotated code of one width over all channels but `outliers`, which are coded at 8 bits: nats
  /// per token.
  double rotated_code_cost(const HeadFit& head, int width, const std::vector<int>& outliers) const;

  /// Choices of all heads by head_index. ArgumentError: as Fit::assemble says.
  std::vector<HeadChoice> choices_of(const Allocation& allocation) const;
  std::vector<HeadChoice> choices_of(const std::vector<LayerWidths>& widths) const;
  PlanBundle build(const std::vector<HeadChoice>& choices, const PlanHeader& header) const;
  std::vector<LayerPlan> plan_layers(const std::vector<HeadChoice>& choices,
                                     double total_cost) const;
  PlanTensors plan_tensors(const std::vector<HeadChoice>& choices) const;
  /// Storage order, mixing and class-mean lambda of one head of a calibrated plan, widths in lambda
  /// order.
  void store_transform(int layer, Side side, int head, const std::vector<int>& widths,
                       SideTensors& into) const;
  std::int64_t static_bytes(const PlanBundle& bundle) const;
};

/// ArgumentError names the option and what it accepts.
void check_options(const FitOptions& options, const Profile& profile);
/// InputError unless everything that a fit reads has its size; `needs_windows`: the coherence sums
/// too.
void check_profile(const Profile& profile, bool needs_windows);

}  // namespace kvplan::quant
