#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>

#include "quant/codec.h"
#include "quant/fit_impl.h"
#include "quant/linalg.h"
#include "quant/parallel_for.h"
#include "quant/rotation.h"
#include "quant/trellis.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kOutlierWidth = 8;
constexpr int kOutlierMultiple = 8;
constexpr std::size_t kHalfBytes = 2, kFloatBytes = 4, kChannelBytes = 4;

std::string place(int layer, Side side) {
  return "layer " + std::to_string(layer) + ", side " + side_name(side);
}

void check_outliers(const std::vector<std::vector<int>>& outliers, const ModelSpec& model,
                    const std::string& where) {
  if (outliers.empty()) return;
  if (outliers.size() != static_cast<std::size_t>(model.kv_heads))
    throw ArgumentError("outliers of " + where + ": expected one list for each of " +
                        std::to_string(model.kv_heads) + " KV heads or none, found " +
                        std::to_string(outliers.size()));
  for (const std::vector<int>& channels : outliers) {
    if (channels.size() % kOutlierMultiple != 0 || std::ssize(channels) >= model.head_dim)
      throw ArgumentError(
          "outliers of " + where + ": expected a multiple of 8 channels, fewer than head_dim = " +
          std::to_string(model.head_dim) + ", found " + std::to_string(channels.size()));
    const auto descent =
        std::adjacent_find(channels.begin(), channels.end(), std::greater_equal<>());
    if (descent != channels.end() ||
        (!channels.empty() && (channels.front() < 0 || channels.back() >= model.head_dim)))
      throw ArgumentError("outliers of " + where + ": expected ascending channels of 0.." +
                          std::to_string(model.head_dim - 1));
  }
}

/// Mean bits per coordinate without scales.
double payload_bits(const HeadPlan& head, int head_dim) {
  const auto outliers = static_cast<double>(head.outliers.size());
  const double width = std::accumulate(head.widths.begin(), head.widths.end(), 0.0) /
                       static_cast<double>(head.widths.size());
  return (kOutlierWidth * outliers + width * (head_dim - outliers)) / head_dim;
}

/// Groups by descending width; equal widths stay in lambda order.
std::vector<std::size_t> storage_order(const std::vector<int>& widths) {
  std::vector<std::size_t> order(widths.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return widths[a] > widths[b]; });
  return order;
}

/// The given rows of a [*,d] matrix, turned by the orthogonal Q [m,m] unless that is empty.
std::vector<double> mixed_rows(const std::vector<double>& matrix, int d,
                               const std::vector<int>& rows, const std::vector<double>& q) {
  std::vector<double> picked;
  picked.reserve(rows.size() * static_cast<std::size_t>(d));
  for (const int row : rows) {
    const auto begin = matrix.begin() + std::ptrdiff_t{row} * d;
    picked.insert(picked.end(), begin, begin + d);
  }
  if (q.empty()) return picked;
  const auto m = static_cast<int>(rows.size());
  std::vector<double> turned(picked.size());
  multiply(q, picked, m, m, d, turned);
  return turned;
}

/// Bytes of the dense rotations that a rotated plan applies, each distinct one counted once.
/// Hadamard transforms are computed, unless the size is no power of two.
std::size_t rotation_bytes(const Plan& plan) {
  if (plan.rotation.kind == "none") return 0;
  const bool hadamard = plan.rotation.kind != "haar";
  std::set<std::size_t> shared_sizes;
  std::size_t elements = 0;
  for (const LayerPlan& layer : plan.layers) {
    for (const Side side : kSides) {
      if (plan.rotation.sides.find(side_name(side)) == std::string::npos) continue;
      for (const HeadPlan& head : layer.side(side).heads) {
        const std::size_t size =
            static_cast<std::size_t>(plan.model.head_dim) - head.outliers.size();
        if (head.widths.front() == kFp16Width || (hadamard && std::has_single_bit(size))) continue;
        if (plan.rotation.scope == "head" || shared_sizes.insert(size).second)
          elements += size * size;
      }
    }
  }
  return elements * kHalfBytes;
}

}  // namespace

PlanBundle Fit::assemble(const Allocation& allocation, const PlanHeader& header) const {
  return impl_->build(impl_->choices_of(allocation), header);
}

PlanBundle Fit::assemble(const std::vector<LayerWidths>& widths, const PlanHeader& header) const {
  return impl_->build(impl_->choices_of(widths), header);
}

std::vector<HeadChoice> Fit::Impl::choices_of(const Allocation& allocation) const {
  if (allocation.choice.size() != costs.units.size())
    throw ArgumentError("allocation: expected " + std::to_string(costs.units.size()) +
                        " choices, one per unit of the cost table, found " +
                        std::to_string(allocation.choice.size()));
  std::vector<HeadChoice> choices(heads.size());
  for (std::size_t u = 0; u < costs.units.size(); ++u) {
    const CostUnit& unit = costs.units[u];
    const int chosen = allocation.choice[u];
    if (chosen < -1 || chosen >= std::ssize(unit.choices))
      throw ArgumentError("allocation: expected a choice of -1 (fp16).." +
                          std::to_string(std::ssize(unit.choices) - 1) + " for unit " +
                          std::to_string(u) + ", found " + std::to_string(chosen));
    HeadChoice& head = choices[head_index(unit.layer, unit.side, unit.head)];
    if (chosen == -1) {
      head.plan.widths.push_back(kFp16Width);
    } else {
      head.plan.widths.push_back(unit.choices[static_cast<std::size_t>(chosen)].width);
      head.cost += unit.choices[static_cast<std::size_t>(chosen)].cost;
      head.plan.outliers = heads[head_index(unit.layer, unit.side, unit.head)].outliers(
          unit.choices[static_cast<std::size_t>(chosen)].outliers);
    }
    const HeadChoice& first = choices[head_index(unit.layer, unit.side, 0)];
    if (first.fp16() != (chosen == -1))
      throw ArgumentError("allocation: " + place(unit.layer, unit.side) +
                          " mixes fp16 with other widths; fp16 must hold for all its units");
  }
  return choices;
}

std::vector<HeadChoice> Fit::Impl::choices_of(const std::vector<LayerWidths>& widths) const {
  if (widths.size() != static_cast<std::size_t>(model.num_layers))
    throw ArgumentError("widths: expected one entry for each of " +
                        std::to_string(model.num_layers) + " layers, found " +
                        std::to_string(widths.size()));
  const int largest = calibrated() ? options.max_width : kMaxCodebookBits;
  const auto per_head = static_cast<std::size_t>(groups());
  std::vector<HeadChoice> choices(heads.size());
  for (int layer = 0; layer < model.num_layers; ++layer) {
    const LayerWidths& given = widths[static_cast<std::size_t>(layer)];
    for (const Side side : kSides) {
      const int width = side == Side::kKey ? given.k : given.v;
      const auto& outliers = side == Side::kKey ? given.outliers_k : given.outliers_v;
      if ((width < 0 || width > largest) && width != kFp16Width)
        throw ArgumentError("width of " + place(layer, side) + ": expected 0.." +
                            std::to_string(largest) + " or 16 (fp16), found " +
                            std::to_string(width));
      if (!outliers.empty() && (calibrated() || width == kFp16Width))
        throw ArgumentError("outliers of " + place(layer, side) +
                            ": only rotated codes have outlier channels");
      check_outliers(outliers, model, place(layer, side));
      for (int h = 0; h < model.kv_heads; ++h) {
        const std::size_t index = head_index(layer, side, h);
        HeadChoice& choice = choices[index];
        choice.plan.widths.assign(per_head, width);
        if (!outliers.empty()) choice.plan.outliers = outliers[static_cast<std::size_t>(h)];
        if (width == kFp16Width) continue;
        if (!calibrated()) {
          choice.cost = rotated_code_cost(heads[index], width, choice.plan.outliers);
          continue;
        }
        for (std::size_t g = 0; g < per_head; ++g)
          choice.cost +=
              costs.units[index * per_head + g].choices[static_cast<std::size_t>(width)].cost;
      }
    }
  }
  return choices;
}

PlanBundle Fit::Impl::build(const std::vector<HeadChoice>& choices,
                            const PlanHeader& header) const {
  PlanBundle bundle;
  Plan& plan = bundle.plan;
  plan.model = model;
  plan.context = options.context;
  plan.sink_tokens = sink_tokens;
  plan.page_tokens = header.page_tokens;
  plan.seed = options.seed;
  plan.budget = header.budget;
  plan.policy = header.policy;
  plan.codec = options.codec;
  plan.code = options.code;
  plan.group_size = group_size();
  plan.scale_rule = options.scale_rule;
  plan.norm = options.norm;
  plan.centre = options.centre;
  plan.rotation = options.rotation;
  for (const HeadChoice& choice : choices) plan.predicted_kl += choice.cost;
  plan.layers = plan_layers(choices, plan.predicted_kl);
  plan.front = header.front;
  plan.provenance = {header.profile_sha256, header.program, calibration_tokens, sources};

  bundle.tensors = plan_tensors(choices);
  for (const HeadChoice& choice : choices) {
    const bool trellis = tcq() && uses_trellis(choice.plan.widths, group_size());
    for (const int width : choice.plan.widths) {
      if (width == 0 || width == kFp16Width) continue;
      plan.codebooks[width] = codebook_name(width);
      if (trellis && width <= kMaxTrellisWidth) {
        const auto& values = trellis_table(width).values;
        bundle.tensors.trellis[width].assign(values.begin(), values.end());
      } else {
        bundle.tensors.levels[width] = books[static_cast<std::size_t>(width)].levels;
      }
    }
  }
  plan.effective_bits = measured_effective_bits(bundle);
  const auto bits = std::llround(plan.effective_bits * static_cast<double>(costs.elements));
  plan.bytes_per_token = (bits + 7) / 8;
  plan.static_bytes = static_bytes(bundle);
  return bundle;
}

std::vector<LayerPlan> Fit::Impl::plan_layers(const std::vector<HeadChoice>& choices,
                                              double total_cost) const {
  std::vector<LayerPlan> layers;
  for (int l = 0; l < model.num_layers; ++l) {
    LayerPlan layer;
    layer.index = l;
    layer.kind = layer_kind(model, l);
    double cost = 0;
    for (const Side side : kSides) {
      double rotated_cost = 0;
      for (int h = 0; h < model.kv_heads; ++h) {
        const std::size_t index = head_index(l, side, h);
        cost += choices[index].cost;
        rotated_cost += heads[index].rotated_cost;
        HeadPlan head = choices[index].plan;
        std::sort(head.widths.begin(), head.widths.end(), std::greater<>());
        layer.side(side).bits += payload_bits(head, model.head_dim) / model.kv_heads;
        layer.side(side).heads.push_back(std::move(head));
      }
      (side == Side::kKey ? layer.rotated_cost_k : layer.rotated_cost_v) = rotated_cost;
    }
    layer.predicted_kl_share = total_cost > 0 ? cost / total_cost : 0;
    layers.push_back(std::move(layer));
  }
  return layers;
}

PlanTensors Fit::Impl::plan_tensors(const std::vector<HeadChoice>& choices) const {
  const std::int64_t kv_heads = model.kv_heads, d = model.head_dim;
  PlanTensors tensors;
  tensors.layers.resize(static_cast<std::size_t>(model.num_layers));
  for (int l = 0; l < model.num_layers; ++l) {
    LayerTensors& layer = tensors.layers[static_cast<std::size_t>(l)];
    layer.inv_freq = inv_freq[static_cast<std::size_t>(l)];
    for (const Side side : kSides) {
      SideTensors& own = layer.side(side);
      own.absmax = Array<float>({kv_heads});
      for (int h = 0; h < model.kv_heads; ++h)
        own.absmax.data[static_cast<std::size_t>(h)] =
            std::ranges::max(heads[head_index(l, side, h)].absmax);
      if (calibrated() && !choices[head_index(l, side, 0)].fp16()) {
        own.analysis = Array<float>({kv_heads, d, d});
        own.synthesis = Array<float>({kv_heads, d, d});
        own.lambda = Array<float>({kv_heads, d});
      }
      if (!options.centre) continue;
      own.mean = Array<float>({kv_heads, d});
      if (side == Side::kKey) own.mean_rotated = Array<float>({kv_heads, d});
      for (int h = 0; h < model.kv_heads; ++h) {
        const HeadFit& head = heads[head_index(l, side, h)];
        std::ranges::copy(head.mean, own.mean.row(static_cast<std::size_t>(h)).begin());
        if (side == Side::kKey)
          std::ranges::copy(head.mean_rotated,
                            own.mean_rotated.row(static_cast<std::size_t>(h)).begin());
      }
    }
  }
  if (calibrated()) {
    parallel_for(heads.size(), options.threads, [&](std::size_t i) {
      if (choices[i].fp16()) return;
      const auto index = static_cast<int>(i);
      const int layer = index / model.kv_heads / 2, head = index % model.kv_heads;
      const Side side = kSides[static_cast<std::size_t>(index / model.kv_heads % 2)];
      store_transform(layer, side, head, choices[i].plan.widths,
                      tensors.layers[static_cast<std::size_t>(layer)].side(side));
    });
  }
  return tensors;
}

void Fit::Impl::store_transform(int layer, Side side, int head, const std::vector<int>& widths,
                                SideTensors& into) const {
  const CalibratedTransform& from = heads[head_index(layer, side, head)].transform;
  const int d = model.head_dim;
  const auto n = static_cast<std::size_t>(d);
  const std::vector<double> synthesis_rows = transposed(from.synthesis, d, d);
  const auto analysis = into.analysis.row(static_cast<std::size_t>(head));
  const auto synthesis = into.synthesis.row(static_cast<std::size_t>(head));
  const auto lambda = into.lambda.row(static_cast<std::size_t>(head));
  const std::vector<std::size_t> order = storage_order(widths);

  std::size_t stored = 0;  // coordinates
  for (auto group = order.begin(); group != order.end();) {
    const int width = widths[*group];
    std::vector<int> coordinates;  // of this width class
    double lambda_sum = 0;
    for (; group != order.end() && widths[*group] == width; ++group) {
      for (int i = 0; i < options.group_size; ++i) {
        coordinates.push_back(static_cast<int>(*group) * options.group_size + i);
        lambda_sum += from.lambda[static_cast<std::size_t>(coordinates.back())];
      }
    }
    const auto m = static_cast<int>(coordinates.size());
    const std::vector<double> q =
        width == 0 || !options.mixing
            ? std::vector<double>{}
            : haar_rotation(m, options.seed, static_cast<std::uint32_t>(layer),
                            static_cast<std::uint32_t>(head * 2 + static_cast<int>(side)),
                            static_cast<std::uint32_t>(width), true);
    const std::vector<double> a = mixed_rows(from.analysis, d, coordinates, q);
    const std::vector<double> s = mixed_rows(synthesis_rows, d, coordinates, q);
    for (std::size_t i = 0; i < coordinates.size(); ++i, ++stored) {
      lambda[stored] = static_cast<float>(lambda_sum / m);
      for (std::size_t j = 0; j < n; ++j) {
        analysis[stored * n + j] = static_cast<float>(a[i * n + j]);
        synthesis[j * n + stored] = static_cast<float>(s[i * n + j]);
      }
    }
  }
}

std::int64_t Fit::Impl::static_bytes(const PlanBundle& bundle) const {
  std::size_t bytes = calibrated() ? 0 : rotation_bytes(bundle.plan);
  for (const auto& [width, levels] : bundle.tensors.levels) bytes += levels.size() * kFloatBytes;
  for (const auto& [width, values] : bundle.tensors.trellis) bytes += values.size() * kHalfBytes;
  for (std::size_t l = 0; l < bundle.plan.layers.size(); ++l) {
    for (const Side side : kSides) {
      const std::vector<HeadPlan>& stored = bundle.plan.layers[l].side(side).heads;
      if (stored.front().widths.front() == kFp16Width) continue;
      const SideTensors& own = bundle.tensors.layers[l].side(side);
      bytes += (own.analysis.data.size() + own.synthesis.data.size()) * kHalfBytes;
      bytes += own.mean.data.size() * kFloatBytes;
      for (const HeadPlan& head : stored) bytes += head.outliers.size() * kChannelBytes;
    }
  }
  return static_cast<std::int64_t>(bytes);
}

}  // namespace kvplan::quant
