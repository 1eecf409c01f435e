#include "quant/fit.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "quant/byte_levels.h"
#include "quant/fit_impl.h"
#include "quant/moments.h"
#include "quant/parallel_for.h"
#include "quant/trellis.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

/// A variance below this share of E|x|^2 is rounding of the raw sums, not spread.
constexpr double kVarianceFloor = 1e-9;
/// Largest code of an 8-bit absmax code.
constexpr double kOutlierCodeMax = 127;
constexpr int kOutlierBits = 8, kOutlierScaleBits = 16;

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
  check_profile(profile, calibrated() || options.coherent_drop);
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
  fit.by_gain.resize(d);
  std::iota(fit.by_gain.begin(), fit.by_gain.end(), 0);
  const auto gain = [&fit](int channel) {
    const auto i = static_cast<std::size_t>(channel);
    return fit.fisher_diagonal[i] * fit.second_diagonal[i];
  };
  std::stable_sort(fit.by_gain.begin(), fit.by_gain.end(),
                   [&](int a, int b) { return gain(a) > gain(b); });
  const double energy = sum(diagonal(sums.outer.row(row), d)) / n;
  fit.rotated_cost = sum(fit.fisher_diagonal) * energy / static_cast<double>(d) / 2;

  std::vector<double> coherent;
  if (!calibrated() && options.coherent_drop) {
    double independent = 0;  // 1/2 tr(F C)
    for (std::size_t i = 0; i < d * d; ++i)
      independent += moments.fisher[i] * moments.second[i] / 2;
    fit.coherent_excess =
        std::max(0.0, coherent_drop_cost(profile, layer, side, head, moments.mean) - independent);
  }
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
    if (!calibrated()) {
      unit.choices = rotated_choices(fit);
      continue;
    }
    const auto size = static_cast<std::size_t>(group_size());
    const std::size_t begin = static_cast<std::size_t>(group) * size;
    const double lambda_sum =
        sum(std::span<const double>(fit.transform.lambda).subspan(begin, size));
    for (int width = 0; width <= options.max_width; ++width) {
      double cost = lambda_sum / 2 * relative_error(width);
      if (width == 0 && options.coherent_drop)
        cost = std::max(cost, sum(std::span<const double>(coherent).subspan(begin, size)));
      unit.choices.push_back({width, std::int64_t{width} * group_size(), cost});
    }
  }
}

std::vector<int> HeadFit::outliers(int count) const {
  std::vector<int> channels(by_gain.begin(), by_gain.begin() + count);
  std::sort(channels.begin(), channels.end());
  return channels;
}

std::vector<CostChoice> Fit::Impl::rotated_choices(const HeadFit& head) const {
  std::vector<CostChoice> choices;
  for (int width = 0; width <= options.max_width; ++width) {
    choices.push_back(
        {width, std::int64_t{width} * model.head_dim, rotated_code_cost(head, width, {})});
    for (const int count : options.outlier_counts) {
      const std::int64_t bits = std::int64_t{width} * (model.head_dim - count) +
                                std::int64_t{kOutlierBits} * count + kOutlierScaleBits;
      choices.push_back({width, bits, rotated_code_cost(head, width, head.outliers(count)), count});
    }
  }
  std::stable_sort(choices.begin(), choices.end(),
                   [](const auto& a, const auto& b) { return a.size_bits < b.size_bits; });
  return choices;
}

std::string Fit::Impl::codebook_name(int width) const {
  const auto named = options.codebooks.find(width);
  if (named != options.codebooks.end()) return named->second;
  // What the runtime multiplies as bytes (quant/byte_levels.h).
  if (width >= 3 && width <= kMaxByteWidth) return "lloyd_max_byte";
  return width == 8 ? "uniform" : "lloyd_max";
}

double Fit::Impl::relative_error(int width) const {
  if (width == 0) return 1;
  const double distortion = tcq() && width <= kMaxTrellisWidth
                                ? trellis_distortion(width)
                                : books[static_cast<std::size_t>(width)].distortion;
  // A centroid code c of a long vector y has |c|^2 = <y,c> = (1 - D) |y|^2; the scale rules stretch
  // it.
  if (options.scale_rule == "unbiased") return distortion / (1 - distortion);
  if (options.scale_rule == "norm_corrected") return 2 - 2 * std::sqrt(1 - distortion);
  return distortion;
}

// A centroid code has <y,c> = (1 - D) |y|^2.
double Fit::Impl::shrinkage(int width) const {
  if (width == 0) return 1;
  const double distortion = books[static_cast<std::size_t>(width)].distortion;
  if (options.scale_rule == "unbiased") return 0;
  return options.scale_rule == "norm_corrected" ? 1 - std::sqrt(1 - distortion) : distortion;
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
  const double energy = sum(head.second_diagonal), shrunk = shrinkage(width);
  if (energy > 0)
    cost += shrunk * shrunk * head.coherent_excess * std::max(rest_energy, 0.0) / energy;
  return cost + relative_error(width) * rest_fisher * std::max(rest_energy, 0.0) / rest / 2;
}

Fit::Fit(const Profile& profile, const FitOptions& options)
    : impl_(std::make_unique<Impl>(profile, options)) {}
Fit::~Fit() = default;
Fit::Fit(Fit&&) noexcept = default;
Fit& Fit::operator=(Fit&&) noexcept = default;

const CostTable& Fit::costs() const { return impl_->costs; }

}  // namespace kvplan::quant
