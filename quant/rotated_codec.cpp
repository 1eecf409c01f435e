// Rotated codecs (TurboQuant and its relatives): y = Pi x / n, one codebook, optional outlier
// channels. Source: Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal
// Distortion Rate" (2025).

#include <algorithm>
#include <map>
#include <string>

#include "quant/codebook.h"
#include "quant/rotation.h"
#include "quant/transform_codec.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

// The book of the Beta density at the exact dimension unless the plan names another.
Codebook rotated_codebook(const Plan& plan, int width, int dimension) {
  const auto name = plan.codebooks.find(width);
  if (name == plan.codebooks.end() || name->second == "lloyd_max_beta")
    return lloyd_max_beta(width, dimension);
  return codebook(name->second, width);
}

void require_outliers(const std::vector<int>& outliers, int d, const std::string& pointer) {
  const bool ascending = std::adjacent_find(outliers.begin(), outliers.end(),
                                            std::greater_equal<>()) == outliers.end();
  if (!ascending || outliers.size() >= static_cast<std::size_t>(d) ||
      (!outliers.empty() && (outliers.front() < 0 || outliers.back() >= d)))
    throw InputError("plan.json", pointer + "/outliers",
                     "expected fewer than " + std::to_string(d) + " ascending channels below " +
                         std::to_string(d));
}

}  // namespace

std::unique_ptr<Codec> make_rotated_codec(const PlanBundle& bundle, int layer, Side side) {
  const SidePlan& plan = side_plan(bundle, layer, side);
  const int d = bundle.plan.model.head_dim;
  const bool shared = bundle.plan.rotation.scope == "model";
  TransformCodecSpec spec;
  spec.geometry = {bundle.plan.model.kv_heads, d};
  spec.scale_rule = parse_scale_rule(bundle.plan);
  spec.norm = parse_norm(bundle.plan);
  spec.mean = side_mean(bundle, layer, side);
  std::map<std::pair<int, int>, std::vector<double>>
      rotations;                                  // by (head, 0 if shared; dimension)
  std::map<std::pair<int, int>, Codebook> books;  // by (width, dimension)
  for (std::size_t h = 0; h < plan.heads.size(); ++h) {
    const std::string pointer = side_pointer(layer, side) + "/heads/" + std::to_string(h);
    const HeadPlan& head_plan = plan.heads[h];
    HeadTransform& head = spec.heads.emplace_back();
    head.fp16 = is_fp16_head(head_plan, pointer);
    if (head.fp16) continue;
    const int width = head_plan.widths.front();
    if (std::any_of(head_plan.widths.begin(), head_plan.widths.end(),
                    [width](int other) { return other != width; }))
      throw InputError("plan.json", pointer + "/widths",
                       "a rotated head has one width; expected equal widths");
    require_outliers(head_plan.outliers, d, pointer);
    head.outliers = head_plan.outliers;
    for (int channel = 0; channel < d; ++channel)
      if (!std::binary_search(head.outliers.begin(), head.outliers.end(), channel))
        head.channels.push_back(channel);
    if (width == 0) continue;

    const int n = head.transformed(), index = shared ? 0 : static_cast<int>(h);
    auto rotation = rotations.find({index, n});
    if (rotation == rotations.end())
      rotation = rotations
                     .emplace(std::pair(index, n),
                              rotation_matrix(bundle.plan.rotation, n, layer, index, side))
                     .first;
    auto book = books.find({width, n});
    if (book == books.end())
      book = books.emplace(std::pair(width, n), rotated_codebook(bundle.plan, width, n)).first;
    head.analysis.assign(rotation->second.begin(), rotation->second.end());
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j)
        head.synthesis.push_back(head.analysis[static_cast<std::size_t>(j * n + i)]);
    head.weight.assign(static_cast<std::size_t>(n), 1.0);
    head.runs.push_back({0, n, width, book->second.levels, book->second.boundaries});
  }
  return make_transform_codec(std::move(spec));
}

}  // namespace kvplan::quant
