// Rotated codecs (TurboQuant, QJL, PolarQuant and their relatives): y = Pi x / n and one codebook,
// with the options of Plan::variant. Source: Zandieh et al., "TurboQuant: Online Vector
// Quantization with Near-optimal Distortion Rate" (2025).

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "quant/codebook.h"
#include "quant/rotation.h"
#include "quant/transform_spec.h"
#include "quant/vector_codec.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kMaxBits = 8;
constexpr int kAbsmaxBits = 8;        // of the outlier channels that transform codecs store
constexpr int kSmallestBetaSize = 8;  // dimension of a Beta codebook

/// What one layer and side of a rotated plan is made from; rotations and books are made once.
class RotatedSide {
 public:
  RotatedSide(const PlanBundle& bundle, int layer, Side side)
      : plan_(bundle.plan),
        heads_(side_plan(bundle, layer, side).heads),
        layer_(layer),
        side_(side) {
    for (std::size_t h = 0; h < heads_.size(); ++h) check_head(h);
  }

  const Plan& plan() const { return plan_; }
  const std::vector<HeadPlan>& heads() const { return heads_; }
  bool fp16(std::size_t head) const { return heads_[head].widths.front() == kFp16Width; }
  int width(std::size_t head) const { return heads_[head].widths.front(); }
  bool polar() const { return plan_.code != "scalar"; }
  bool sketched() const {
    return plan_.variant.sketch != "none" &&
           plan_.variant.sketch_sides.find(side_name(side_)) != std::string::npos;
  }

  /// The first field that TransformCodec cannot express, or none.
  std::optional<std::string> beyond_transform() const {
    const auto all_fp16 = [](const HeadPlan& head) { return head.widths.front() == kFp16Width; };
    if (std::ranges::all_of(heads_, all_fp16)) return std::nullopt;
    const RotatedVariant& variant = plan_.variant;
    if (polar()) return "/code";
    if (sketched()) return "/variant/sketch";
    if (variant.norm_block != 0) return "/variant/norm_block";
    if (plan_.norm == "fp16_std") return "/norm";
    if (std::ranges::all_of(heads_, [](const HeadPlan& head) { return head.outliers.empty(); }))
      return std::nullopt;
    if (variant.outlier_code != "absmax") return "/variant/outlier_code";
    if (variant.outlier_bits != kAbsmaxBits) return "/variant/outlier_bits";
    return std::nullopt;
  }

  /// Channels of a head that are no outliers, ascending.
  std::vector<int> rest(std::size_t head) const {
    std::vector<int> channels;
    for (int channel = 0; channel < plan_.model.head_dim; ++channel)
      if (!std::ranges::binary_search(heads_[head].outliers, channel)) channels.push_back(channel);
    return channels;
  }

  /// Pi of `size` channels, row-major.
  const std::vector<float>& rotation(std::size_t head, std::size_t size) {
    const std::size_t index = plan_.rotation.scope == "model" ? 0 : head;
    auto found = rotations_.find({index, size});
    if (found == rotations_.end()) {
      const std::vector<double> matrix = rotation_matrix(plan_.rotation, static_cast<int>(size),
                                                         layer_, static_cast<int>(index), side_);
      found = rotations_
                  .emplace(std::pair(index, size), std::vector<float>(matrix.begin(), matrix.end()))
                  .first;
    }
    return found->second;
  }

  /// The book of `bits` that the plan names for `width`; of the Beta density of `size` channels if
  /// it names none.
  const Codebook& book(int width, int bits, std::size_t size) {
    auto found = books_.find({width, bits, size});
    if (found == books_.end())
      found = books_.emplace(std::tuple(width, bits, size), make_book(width, bits, size)).first;
    return found->second;
  }

  std::shared_ptr<const VectorCode> sketch(std::size_t head) {
    const std::size_t index = plan_.rotation.scope == "model" ? 0 : head;
    std::shared_ptr<const VectorCode>& found = sketches_[index];
    if (!found) {
      const int d = plan_.model.head_dim;
      const std::vector<double> rows =
          sketch_matrix(plan_.variant, plan_.rotation, d, layer_, static_cast<int>(index), side_);
      found = make_sign_sketch(static_cast<std::size_t>(d), {rows.begin(), rows.end()});
    }
    return found;
  }

  [[noreturn]] void refuse(const char* field, const std::string& message) const {
    throw InputError("plan.json", field, message);
  }

 private:
  void check_head(std::size_t h) const {
    const HeadPlan& head = heads_[h];
    const int d = plan_.model.head_dim;
    const std::string pointer = side_pointer(layer_, side_) + "/heads/" + std::to_string(h);
    is_fp16_head(head, pointer);
    if (std::ranges::count(head.widths, head.widths.front()) != std::ssize(head.widths))
      throw InputError("plan.json", pointer + "/widths",
                       "a rotated head has one width; expected equal widths");
    const std::vector<int>& outliers = head.outliers;
    const bool ascending =
        std::ranges::adjacent_find(outliers, std::greater_equal<>()) == outliers.end();
    if (!ascending || outliers.size() >= static_cast<std::size_t>(d) ||
        (!outliers.empty() && (outliers.front() < 0 || outliers.back() >= d)))
      throw InputError("plan.json", pointer + "/outliers",
                       "expected fewer than " + std::to_string(d) + " ascending channels below " +
                           std::to_string(d));
  }

  Codebook make_book(int width, int bits, std::size_t size) const {
    if (bits == 0) return {.bits = 0, .levels = {0}, .boundaries = {}, .distortion = 1};
    const auto name = plan_.codebooks.find(width);
    if (name != plan_.codebooks.end() && name->second != "lloyd_max_beta")
      return codebook(name->second, bits);
    if (size < kSmallestBetaSize)
      refuse("/codebooks", "lloyd_max_beta needs at least 8 coordinates with one norm, found " +
                               std::to_string(size) + "; name lloyd_max instead");
    return lloyd_max_beta(bits, static_cast<int>(size));
  }

  const Plan& plan_;
  const std::vector<HeadPlan>& heads_;
  int layer_;
  Side side_;
  std::map<std::pair<std::size_t, std::size_t>, std::vector<float>> rotations_;  // (head, size)
  std::map<std::tuple<int, int, std::size_t>, Codebook> books_;  // (width, bits, size)
  std::map<std::size_t, std::shared_ptr<const VectorCode>> sketches_;
};

std::vector<HeadTransform> transform_heads(RotatedSide& side) {
  std::vector<HeadTransform> heads(side.heads().size());
  for (std::size_t h = 0; h < heads.size(); ++h) {
    HeadTransform& head = heads[h];
    head.fp16 = side.fp16(h);
    if (head.fp16) continue;
    head.outliers = side.heads()[h].outliers;
    head.channels = side.rest(h);
    const int width = side.width(h);
    if (width == 0) continue;
    const std::size_t n = head.channels.size();
    const Codebook& book = side.book(width, width, n);
    head.analysis = side.rotation(h, n);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j) head.synthesis.push_back(head.analysis[j * n + i]);
    head.weight.assign(n, 1.0);
    head.runs.push_back({0, static_cast<int>(n), width, book.levels, book.boundaries});
  }
  return heads;
}

/// Rotation, norm and book of its own over `channels`.
CodedChannels rotated_instance(RotatedSide& side, std::size_t head, std::vector<int> channels,
                               int width) {
  const Plan& plan = side.plan();
  const std::size_t n = channels.size();
  const std::vector<float>& rotation = side.rotation(head, n);
  if (side.polar()) {
    if (n % 2 != 0 || width < 1)
      side.refuse("/code", "polar codes need a width and an even number of channels, found width " +
                               std::to_string(width) + " and " + std::to_string(n) + " channels");
    return {std::move(channels), make_polar_code(n, rotation, width, plan.code == "polar")};
  }
  const auto block =
      plan.variant.norm_block == 0 ? n : static_cast<std::size_t>(plan.variant.norm_block);
  if (n % block != 0)
    side.refuse("/variant/norm_block", "expected a divisor of the " + std::to_string(n) +
                                           " channels of a rotation, found " +
                                           std::to_string(block));
  const int bits = width - (side.sketched() ? 1 : 0);
  return {std::move(channels), make_scalar_code({.size = n,
                                                 .rotation = rotation,
                                                 .book = side.book(width, bits, block),
                                                 .scale_rule = parse_scale_rule(plan),
                                                 .norm_block = block,
                                                 .with_deviation = plan.norm == "fp16_std"})};
}

VectorHead vector_head(RotatedSide& side, std::size_t h) {
  const RotatedVariant& variant = side.plan().variant;
  const int width = side.width(h), outlier_bits = variant.outlier_bits;
  if (side.sketched() && width == 0)
    side.refuse("/variant/sketch", "a sketch takes one bit of the width; expected widths above 0");
  VectorHead head;
  if (side.sketched()) head.sketch = side.sketch(h);
  // One bit with a sketch is the sketch alone: nothing is coded before it.
  if (!side.sketched() || width > 1)
    head.parts.push_back(rotated_instance(side, h, side.rest(h), width));
  const std::vector<int>& outliers = side.heads()[h].outliers;
  if (outliers.empty()) return head;
  if (variant.outlier_code == "rotated")
    head.parts.push_back(rotated_instance(side, h, outliers, outlier_bits));
  else
    head.parts.push_back(
        {outliers, make_absmax_code(outliers.size(), outlier_bits, outliers.size())});
  return head;
}

std::unique_ptr<Codec> make_variant_codec(RotatedSide& side, VectorCodecSpec spec) {
  const Plan& plan = side.plan();
  const RotatedVariant& variant = plan.variant;
  if (plan.norm != "fp16" && plan.norm != "fp16_std")
    side.refuse("/norm", "this rotated plan needs norm fp16 or fp16_std, found " + plan.norm);
  if (side.polar() && (side.sketched() || variant.norm_block != 0 || plan.norm != "fp16" ||
                       plan.scale_rule != "one"))
    side.refuse("/code",
                "polar codes store radii in place of norms: expected no sketch, norm_block 0, norm "
                "fp16 and scale_rule one");
  const bool absmax = variant.outlier_code == "absmax";
  if ((!absmax && variant.outlier_code != "rotated") || variant.outlier_bits < (absmax ? 2 : 1) ||
      variant.outlier_bits > kMaxBits)
    side.refuse("/variant",
                "expected outlier_code absmax with 2 to 8 outlier_bits or rotated with "
                "1 to 8, found " +
                    variant.outlier_code + " with " + std::to_string(variant.outlier_bits));
  if (variant.norm_block < 0 || (side.sketched() && variant.sketch_rows < 1))
    side.refuse("/variant", "expected a norm_block of at least 0 and at least one row of a sketch");
  for (std::size_t h = 0; h < side.heads().size(); ++h) {
    if (side.fp16(h)) side.refuse("/variant", "expected fp16 for all heads of a side or for none");
    spec.heads.push_back(vector_head(side, h));
  }
  return make_vector_codec(std::move(spec));
}

TransformCodecSpec plain_spec(RotatedSide& side, std::optional<RotaryMean> mean) {
  const Plan& plan = side.plan();
  TransformCodecSpec spec;
  spec.geometry = {plan.model.kv_heads, plan.model.head_dim};
  spec.heads = transform_heads(side);
  spec.mean = std::move(mean);
  spec.scale_rule = parse_scale_rule(plan);
  if (plan.norm != "fp16_std") spec.norm = parse_norm(plan);  // else all are fp16 rows
  return spec;
}

}  // namespace

TransformCodecSpec rotated_spec(const PlanBundle& bundle, int layer, Side side) {
  RotatedSide rotated(bundle, layer, side);
  if (const auto field = rotated.beyond_transform())
    rotated.refuse(
        field->c_str(),
        "the CUDA runtime and the paged cache hold rotated plans with scalar codes, one "
        "fp16 or log8 norm per vector, no sketch, and absmax outlier channels at 8 bits");
  return plain_spec(rotated, side_mean(bundle, layer, side));
}

std::unique_ptr<Codec> make_rotated_codec(const PlanBundle& bundle, int layer, Side side) {
  RotatedSide rotated(bundle, layer, side);
  parse_scale_rule(bundle.plan);  // so that an unknown name is refused also where it has no use
  std::optional<RotaryMean> mean = side_mean(bundle, layer, side);
  if (!rotated.beyond_transform())
    return make_transform_codec(plain_spec(rotated, std::move(mean)));
  const HeadGeometry geometry{bundle.plan.model.kv_heads, bundle.plan.model.head_dim};
  return make_variant_codec(rotated, {geometry, {}, std::move(mean)});
}

}  // namespace kvplan::quant
