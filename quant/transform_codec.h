#pragma once
// The codec of calibrated and rotated plans: a linear transform per head, one norm per vector,
// scalar or
// trellis codes. Private to quant.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "quant/codec_checks.h"
#include "quant/rotary_mean.h"

namespace kvplan::quant {

enum class ScaleRule { kOne, kNormCorrected, kBiased, kUnbiased };
enum class NormFormat { kLog8, kFp16 };

/// Consecutive coordinates with codes of one width.
struct CodeRun {
  int begin = 0, end = 0;
  int width = 0;
  std::vector<float> levels;      // [2^width] ascending; of a trellis [256] by state
  std::vector<float> boundaries;  // [2^width - 1]; of a trellis none
  bool trellis() const { return boundaries.empty(); }
};

/// How one KV head is stored. c coded coordinates from n transformed channels.
struct HeadTransform {
  bool fp16 = false;             // plain fp16 rows; nothing below is used
  std::vector<int> channels;     // [n] of the vector that go through the transform, ascending
  std::vector<int> outliers;     // the others: 8 bits with an fp16 scale of their own
  std::vector<float> analysis;   // [c,n], rows in storage order
  std::vector<float> synthesis;  // [n,c]
  std::vector<double> weight;    // [c] of the scale rule
  std::vector<CodeRun> runs;     // cover 0..c; those of the trellis are the last
  int coded() const { return runs.empty() ? 0 : runs.back().end; }
  int transformed() const { return static_cast<int>(channels.size()); }
};

struct TransformCodecSpec {
  HeadGeometry geometry;
  std::vector<HeadTransform> heads;
  std::optional<RotaryMean> mean;  // subtracted before, added after
  ScaleRule scale_rule = ScaleRule::kUnbiased;
  NormFormat norm = NormFormat::kLog8;
};

std::unique_ptr<Codec> make_transform_codec(TransformCodecSpec spec);

/// The options that both families read from a plan. InputError for unknown names.
ScaleRule parse_scale_rule(const Plan& plan);
NormFormat parse_norm(const Plan& plan);
/// The mean of a side if the plan centres; InputError when its tensors are missing or have other
/// shapes.
std::optional<RotaryMean> side_mean(const PlanBundle& bundle, int layer, Side side);
/// All widths of a head kFp16Width; InputError when only some are, or one is outside 0..8.
bool is_fp16_head(const HeadPlan& head, const std::string& pointer);

}  // namespace kvplan::quant
