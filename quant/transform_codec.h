#pragma once
// The codec of calibrated and rotated plans: a linear transform per head, one norm per vector,
// scalar or trellis codes (docs/formats/packing.md). The spec says all that a reader or writer of
// those bytes needs, so the paged cache and the CUDA runtime are built from it too.

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "quant/codec.h"
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

/// The spec of one layer and side of a plan whose codec is calibrated (scalar or trellis codes),
/// rotated (scalar codes) or fp16. InputError, naming the field, for everything that only other
/// codecs can express: polar codes, sketches, norms of blocks, norm fp16_std, outlier channels
/// other than absmax at 8 bits, KIVI, integers and block formats.
TransformCodecSpec transform_spec(const PlanBundle& bundle, int layer, Side side);

std::unique_ptr<Codec> make_transform_codec(TransformCodecSpec spec);

/// Norm format log8: meaning 2^(q/32) of q = -128..127 at index q + 128, and the boundaries
/// 2^((q + 1/2)/32) between neighbours; a norm on a boundary takes the lower q.
std::span<const float, 256> log8_values();
std::span<const double, 255> log8_boundaries();

}  // namespace kvplan::quant
