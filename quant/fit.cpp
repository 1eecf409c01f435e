#include "quant/fit.h"

#include <algorithm>
#include <cmath>

#include "quant/fit_impl.h"
#include "quant/moments.h"
#include "quant/parallel_for.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

/// A variance below this share of E|x|^2 is rounding of the raw sums, not spread.
constexpr double kVarianceFloor = 1e-9;
/// Largest code of an 8-bit absmax code.
constexpr double kOutlierCodeMax = 127;

std::vector<double> diagonal(std::span<const double> matrix, std::size_t d) {
  std::vector<double> out(d);
  for (std::size_t i = 0; i < d; ++i) out[i] = matrix[i * d + i];
  return out;
}

double sum(std::span<const double> values) {
  double total = 0;
  for (const double value : values) total += value;
  return total;
}

CalibratedTransform shrunk_transform(HeadMoments moments, const FitOptions& options, int d,
                                     const std::string& field) {
  shrink_to_identity(moments.second, d, options.moment_shrinkage);
  shrink_to_identity(moments.fisher, d, options.fisher_shrinkage);
  try {
    return calibrated_transform(moments.second, moments.fisher, d);
  } catch (const ArgumentError& error) {
    throw InputError("profile", field, error.what());
  }
}

}  // namespace

FitOptions default_fit_options(const std::string& codec) {
  FitOptions options;
  options.codec = codec;
  if (codec == "rotated") {
    options.codebooks.clear();
    options.norm = "fp16";
    options.scale_rule = "norm_corrected";
    options.rotation.kind = "haar";
  }
  return options;
}

Fit::Impl::Impl(const Profile& profile, const FitOptions& chosen) : options(chosen) {
  check_options(options, profile);
  check_profile(profile, calibrated());
  model = profile.model;
  sink_tokens = profile.sink_tokens;
  calibration_tokens = profile.tokens;
  sources = profile.sources;
  for (const LayerProfile& layer : profile.layers) inv_freq.push_back(layer.inv_freq);
  for (int width = 1; width <= kMaxCodebookBits; ++width) {
    const std::string name = codebook_name(width);
    books[static_cast<std::size_t>(width)] =
        name == "lloyd_max_beta" ? lloyd_max_beta(width, model.head_dim) : codebook(name, width);
  }

  const std::size_t count = head_index(model.num_layers, Side::kKey, 0);
  heads.resize(count);
  costs.units.resize(count * static_cast<std::size_t>(groups()));
  costs.vector_bits = options.norm == "log8" ? 8 : 16;
  costs.fixed_bits = static_cast<std::int64_t>(count) * costs.vector_bits;
  costs.elements = elements_per_token(model);
  parallel_for(count, options.threads, [&](std::size_t i) {
    const auto index = static_cast<int>(i);
    fit_head(profile, index / model.kv_heads / 2,
             kSides[i / static_cast<std::size_t>(model.kv_heads) % 2], index % model.kv_heads);
  });
}

void Fit::Impl::fit_head(const Profile& profile, int layer, Side side, int head) {
  const LayerProfile& from = profile.layers[static_cast<std::size_t>(layer)];
  const SideSums& sums = from.side(side);
  const auto row = static_cast<std::size_t>(head);
  const auto d = static_cast<std::size_t>(model.head_dim);
  const auto n = static_cast<double>(profile.tokens);

  HeadMoments moments = head_moments(profile, layer, side, head, options.context, options.centre);
  HeadFit& fit = heads[head_index(layer, side, head)];
  fit.mean.assign(moments.mean.begin(), moments.mean.end());
  if (side == Side::kKey)
    for (const double total : from.k_rotated_sum.row(row))
      fit.mean_rotated.push_back(static_cast<float>(total / n));
  fit.absmax.assign(sums.absmax.row(row).begin(), sums.absmax.row(row).end());
  fit.fisher_diagonal = diagonal(moments.fisher, d);
  fit.second_diagonal = diagonal(moments.second, d);
  const double energy = sum(diagonal(sums.outer.row(row), d)) / n;
  fit.rotated_cost = sum(fit.fisher_diagonal) * energy / static_cast<double>(d) / 2;

  std::vector<double> coherent;
  if (calibrated()) {
    if (sum(fit.second_diagonal) <= kVarianceFloor * energy) moments.second.assign(d * d, 0);
    const std::vector<double> mean = moments.mean;
    fit.transform = shrunk_transform(std::move(moments), options, model.head_dim,
                                     "layers." + std::to_string(layer) + "." + side_name(side) +
                                         ", head " + std::to_string(head));
    coherent = coherent_drop_costs(profile, layer, side, head, mean, fit.transform);
  }
  for (int group = 0; group < groups(); ++group) {
    CostUnit& unit =
        costs.units[head_index(layer, side, head) * static_cast<std::size_t>(groups()) +
                    static_cast<std::size_t>(group)];
    unit = {.layer = layer,
            .side = side,
            .head = head,
            .group = group,
            .elements = group_size(),
            .choices = {}};
    const auto size = static_cast<std::size_t>(group_size());
    for (int width = 0; width <= options.max_width; ++width) {
      double cost = 0;
      if (calibrated()) {
        const std::size_t begin = static_cast<std::size_t>(group) * size;
        const std::span<const double> lambda(fit.transform.lambda);
        cost = sum(lambda.subspan(begin, size)) / 2 * relative_error(width);
        if (width == 0)
          cost = std::max(cost, sum(std::span<const double>(coherent).subspan(begin, size)));
      } else {
        cost = rotated_code_cost(fit, width, {});
      }
      unit.choices.push_back({width, std::int64_t{width} * group_size(), cost});
    }
  }
}

std::string Fit::Impl::codebook_name(int width) const {
  const auto named = options.codebooks.find(width);
  return named == options.codebooks.end() ? "lloyd_max" : named->second;
}

double Fit::Impl::relative_error(int width) const {
  if (width == 0) return 1;
  const double distortion = books[static_cast<std::size_t>(width)].distortion;
  // A centroid code c of a long vector y has |c|^2 = <y,c> = (1 - D) |y|^2; the scale rules stretch
  // it.
  if (options.scale_rule == "unbiased") return distortion / (1 - distortion);
  if (options.scale_rule == "norm_corrected") return 2 - 2 * std::sqrt(1 - distortion);
  return distortion;
}

double Fit::Impl::rotated_code_cost(const HeadFit& head, int width,
                                    const std::vector<int>& outliers) const {
  double step = 0;
  for (const int channel : outliers)
    step = std::max(step, head.absmax[static_cast<std::size_t>(channel)] / kOutlierCodeMax);
  double cost = 0, rest_fisher = 0, rest_energy = 0;
  for (std::size_t i = 0; i < head.fisher_diagonal.size(); ++i) {
    if (std::binary_search(outliers.begin(), outliers.end(), static_cast<int>(i))) {
      cost += step * step / 12 * head.fisher_diagonal[i] / 2;
    } else {
      rest_fisher += head.fisher_diagonal[i];
      rest_energy += head.second_diagonal[i];
    }
  }
  const auto rest = static_cast<double>(head.fisher_diagonal.size() - outliers.size());
  return cost + relative_error(width) * rest_fisher * std::max(rest_energy, 0.0) / rest / 2;
}

Fit::Fit(const Profile& profile, const FitOptions& options)
    : impl_(std::make_unique<Impl>(profile, options)) {}
Fit::~Fit() = default;
Fit::Fit(Fit&&) noexcept = default;
Fit& Fit::operator=(Fit&&) noexcept = default;

const CostTable& Fit::costs() const { return impl_->costs; }

}  // namespace kvplan::quant
