#pragma once
// The plan: how every vector of the cache is stored, and the tensors that the codec needs
// (docs/formats/plan.md).

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "schemas/types.h"

namespace kvplan {

inline constexpr int kFp16Width = 16;  // a width that means "stored as fp16, no norm"

struct HeadPlan {
  std::vector<int> widths;    // bits per coordinate, one per group in storage order (descending);
                              // 0..8, or all kFp16Width
  std::vector<int> outliers;  // channels kept at 8 bits absmax with an own fp16 scale (rotated
                              // codecs), ascending
  bool operator==(const HeadPlan&) const = default;
};

struct SidePlan {
  double bits = 0;              // mean payload width over the heads
  std::vector<HeadPlan> heads;  // one per KV head
  std::string codec = {};       // published name of this side's own codec (docs/baselines.md), in
                                // plans that follow a serving stack; empty: Plan::codec
  bool operator==(const SidePlan&) const = default;
};

struct LayerPlan {
  int index = 0;
  std::string kind = "full";
  double predicted_kl_share = 0;  // of Plan::predicted_kl
  std::optional<double> rotated_cost_k,
      rotated_cost_v;  // 1/2 sum_heads tr(F) E|x|^2 / d, uncentred; null for imports
  SidePlan k, v;
  SidePlan& side(Side s) { return s == Side::kKey ? k : v; }
  const SidePlan& side(Side s) const { return s == Side::kKey ? k : v; }
  bool operator==(const LayerPlan&) const = default;
};

struct RotationSpec {
  std::string kind = "none";  // none | hadamard | signed_hadamard | haar
  int rounds = 1;
  std::string scope = "model";  // model: one for all; head: one per layer, KV head and side
  std::uint64_t seed = 0;
  std::string sides = "kv";
  bool operator==(const RotationSpec&) const = default;
};

/// Options of published rotated codecs beyond rotation, codebook and scale rule
/// (docs/formats/plan.md); the defaults use none of them.
struct RotatedVariant {
  std::string sketch = "none";  // none | gaussian | rademacher | orthogonal: rows of a sign sketch
                                // of the residual, as in TurboQuant Prod and QJL
  int sketch_rows = 0;          // m; 0 without a sketch
  std::string sketch_sides = "k";       // k | v | kv
  std::string outlier_code = "absmax";  // absmax: integers with an own fp16 scale; rotated: a
                                        // second instance with its own rotation, norm and codebook
  int outlier_bits = 8;                 // of outlier channels
  int norm_block = 0;                   // coordinates per stored norm; 0: the whole vector
  bool operator==(const RotatedVariant&) const = default;
};

struct BudgetSpec {
  std::string kind =
      "bits";  // bits | bytes_per_token | gib | max_kl | none (policies that fix their widths)
  double value = 0;
  bool operator==(const BudgetSpec&) const = default;
};

struct FrontPoint {
  double effective_bits = 0;
  double predicted_kl = 0;
  bool operator==(const FrontPoint&) const = default;
};

/// A candidate that `plan --seeds` or `plan --try` measured on folds of calibration windows.
struct PlanTrial {
  std::string name;                                       // "seed 3", "code=tcq"
  double kl = 0, worst_fold_kl = 0, perplexity_rise = 0;  // on the windows that chose
  double held_out_kl = 0, held_out_perplexity_rise = 0;   // on calibration windows that did not
  bool chosen = false;
  bool operator==(const PlanTrial&) const = default;
};

/// Where an imported plan comes from; policy is then "import:FORMAT".
struct PlanOrigin {
  std::string file_sha256;
  std::string tool;  // "KVTuner", "ModelOpt"
  bool operator==(const PlanOrigin&) const = default;
};

struct PlanProvenance {
  std::string profile_sha256;  // empty for baselines that need no profile
  std::string program;
  std::int64_t calibration_tokens = 0;  // after the sinks
  std::vector<ProfileSource> sources;   // calibration texts; validation must not touch their parts
  bool operator==(const PlanProvenance&) const = default;
};

struct Plan {
  ModelSpec model;
  std::int64_t context = 0;  // declared context length in tokens
  int sink_tokens = 4;
  int page_tokens = 64;
  int window = 0;
  std::uint64_t seed = 0;
  BudgetSpec budget;
  double effective_bits = 0;             // everything stored per packed token / elements
  double effective_bits_at_context = 0;  // also charges fp16 sinks and the open page
  std::int64_t bytes_per_token = 0;      // of a packed token, all layers, rounded up
  std::int64_t static_bytes = 0;         // transforms, means, codebooks on the device
  std::string policy = "fisher";
  std::string codec =
      "calibrated";             // calibrated | rotated | kivi | int | q8_0 | q4_0 | q4_1 | q5_0
                                // | q5_1 | iq4_nl | fp8_e4m3 | fp8_e5m2 | nvfp4 | mxfp4 | fp16
  std::string code = "scalar";  // scalar | tcq (calibrated) | polar | polar_edge (rotated)
  std::map<int, std::string> codebooks;  // width -> lloyd_max | uniform; widths in use only
  int group_size = 16;                   // coordinates per entry of HeadPlan::widths
  std::string scale_rule = "unbiased";   // one | norm_corrected | biased | unbiased
  std::string norm = "log8";             // log8 | fp16 | fp16_std (rotated: and the empirical
                                         // standard deviation of the rotated coordinates)
  bool centre = true;
  RotationSpec rotation;
  RotatedVariant variant;   // rotated codecs
  double predicted_kl = 0;  // nats per token; null in the file for imports
  std::vector<LayerPlan> layers;
  std::vector<FrontPoint> front;
  std::vector<PlanTrial> trials;  // empty when nothing was measured
  PlanProvenance provenance;
  std::optional<PlanOrigin> origin;  // imports only
};

struct SideTensors {
  Array<float> analysis;      // [Hk,d,d] A, rows in storage order, mixing folded in
  Array<float> synthesis;     // [Hk,d,d] A^-1, columns in storage order
  Array<float> lambda;        // [Hk,d] class means, storage order
  Array<float> mean;          // [Hk,d] k: before rotary
  Array<float> mean_rotated;  // [Hk,d] k only: mean after rotary over the calibration positions
  Array<float> absmax;        // [Hk] after rotary, sinks included
};

struct LayerTensors {
  SideTensors k, v;
  std::vector<double> inv_freq;  // [rotary_dim/2]
  SideTensors& side(Side s) { return s == Side::kKey ? k : v; }
  const SideTensors& side(Side s) const { return s == Side::kKey ? k : v; }
};

struct PlanTensors {
  std::vector<LayerTensors> layers;  // empty for plans that need none (block formats)
  std::map<int, std::vector<float>>
      levels;  // width -> 2^width ascending levels for N(0,1) coordinates
  std::map<int, std::vector<float>>
      trellis;  // code tcq: width 1..4 -> 256 values by state, each exact in fp16 (lut.{b})
};

/// A plan with its tensors, ready for quant::make_codec.
struct PlanBundle {
  Plan plan;
  PlanTensors tensors;
  std::string sha256;  // of plan.json; empty for a bundle built in memory
};

/// Writes plan.json and plan.safetensors into a new folder. Throws EnvironmentError if the folder
/// exists (unless `force`) or cannot be written. Deterministic: equal bundles give equal bytes.
/// Sets nothing in `bundle`.
void write_plan(const PlanBundle& bundle, const std::filesystem::path& folder, bool force = false);

/// `path`: the folder or its plan.json. Unknown fields, wrong types, impossible widths, bad
/// SHA-256: InputError with the JSON pointer.
PlanBundle read_plan(const std::filesystem::path& path);

/// The JSON text of plan.json for a bundle (tensors serialised to name their SHA-256); what
/// write_plan writes.
std::string plan_json(const PlanBundle& bundle);

/// Throws InputError naming the first field in which a plan's or profile's model differs from the
/// one at hand (exit code 3). `allow_other_weights` waives kv_weights_sha256 (and container) alone.
void require_same_model(const ModelSpec& expected, const ModelSpec& found, const std::string& file,
                        bool allow_other_weights = false);

}  // namespace kvplan
