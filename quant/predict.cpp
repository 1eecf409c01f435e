#include "quant/predict.h"

#include <algorithm>
#include <cmath>

#include "quant/codec.h"
#include "quant/fit_impl.h"
#include "quant/linalg.h"
#include "quant/packing.h"
#include "quant/parallel_for.h"
#include "quant/portable_math.h"
#include "quant/random.h"
#include "quant/rotation.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr int kRun = 32;  // consecutive tokens, a whole group of codecs that share scales over them

/// One head as drawn from: x = mean + factor z; keys before rotary.
struct HeadModel {
  std::vector<double> mean;    // [d]
  std::vector<double> factor;  // [d,d], factor factor^T = C
  std::vector<double> fisher;  // [d,d]
};

HeadModel head_model(const Profile& profile, const SideSums& sums, int d, std::size_t head) {
  const auto n = static_cast<std::size_t>(d);
  const auto tokens = static_cast<double>(profile.tokens);
  const auto fisher_tokens = static_cast<double>(profile.fisher_tokens);
  HeadModel model;
  for (const double total : sums.sum.row(head)) model.mean.push_back(total / tokens);
  for (const double total : sums.fisher.row(head)) model.fisher.push_back(total / fisher_tokens);
  const auto outer = sums.outer.row(head);
  std::vector<double> second(n * n), values;
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < n; ++j)
      second[i * n + j] = outer[i * n + j] / tokens - model.mean[i] * model.mean[j];
  symmetric_eigen(second, d, values, model.factor);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < n; ++j)
      model.factor[i * n + j] *= std::sqrt(std::max(values[j], 0.0));
  return model;
}

/// Turns rows [kRun, d] at positions first, first + 1, ... by R_t, or back.
void turn(std::span<double> rows, std::size_t d, std::span<const double> inv_freq,
          std::int64_t first, bool back) {
  const std::size_t half = inv_freq.size();
  for (std::size_t t = 0; t * d < rows.size(); ++t)
    for (std::size_t j = 0; j < half; ++j) {
      const double angle = inv_freq[j] * static_cast<double>(first + static_cast<std::int64_t>(t));
      const double c = portable_cos(angle), s = back ? -portable_sin(angle) : portable_sin(angle);
      double &a = rows[t * d + j], &b = rows[t * d + j + half];
      const double turned = c * a - s * b;
      b = s * a + c * b;
      a = turned;
    }
}

class SideSimulation {
 public:
  SideSimulation(const PlanBundle& bundle, const Profile& profile, int layer, Side side,
                 const SimulationOptions& options)
      : codec_(make_codec(bundle, layer, side)),
        d_(static_cast<std::size_t>(profile.model.head_dim)),
        heads_(static_cast<std::size_t>(profile.model.kv_heads)),
        first_(profile.sink_tokens),
        starts_(std::max<std::int64_t>(bundle.plan.context - profile.sink_tokens - kRun + 1, 1)),
        positions_(options.seed, StreamPurpose::kSimulation, static_cast<std::uint32_t>(layer),
                   head_side_key(0, side), 1) {
    const LayerProfile& from = profile.layers[static_cast<std::size_t>(layer)];
    if (side == Side::kKey) inv_freq_ = from.inv_freq;
    for (std::size_t h = 0; h < heads_; ++h) {
      models_.push_back(head_model(profile, from.side(side), profile.model.head_dim, h));
      draws_.emplace_back(options.seed, StreamPurpose::kSimulation,
                          static_cast<std::uint32_t>(layer),
                          head_side_key(static_cast<int>(h), side));
    }
  }

  /// Sum of 1/2 e^T F e over the tokens and heads of one run.
  double run() {
    const std::int64_t first = first_ + positions_.next_below(static_cast<std::uint32_t>(starts_));
    const KvShape shape{kRun, static_cast<int>(heads_), static_cast<int>(d_)};
    std::vector<float> x(static_cast<std::size_t>(shape.elements())), x_hat(x.size());
    for (std::size_t h = 0; h < heads_; ++h) draw(h, first, x);
    round_trip(*codec_, shape, first, x, x_hat);
    double cost = 0;
    for (std::size_t h = 0; h < heads_; ++h) cost += cost_of_head(h, first, x, x_hat);
    return cost;
  }

 private:
  std::size_t index(std::size_t token, std::size_t head, std::size_t channel) const {
    return (token * heads_ + head) * d_ + channel;
  }

  void draw(std::size_t head, std::int64_t first, std::span<float> x) {
    const HeadModel& model = models_[head];
    std::vector<double> z(kRun * d_), rows(z.size());
    for (double& value : z) value = draws_[head].next_normal();
    multiply_transposed(z, model.factor, kRun, static_cast<int>(d_), static_cast<int>(d_), rows);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] += model.mean[i % d_];
    turn(rows, d_, inv_freq_, first, false);
    // Beyond fp16 there are no cached values; a normal tail may reach there.
    for (std::size_t t = 0; t < kRun; ++t)
      for (std::size_t i = 0; i < d_; ++i)
        x[index(t, head, i)] =
            static_cast<float>(std::clamp(rows[t * d_ + i], -double{kHalfMax}, double{kHalfMax}));
  }

  double cost_of_head(std::size_t head, std::int64_t first, std::span<const float> x,
                      std::span<const float> x_hat) const {
    std::vector<double> error(kRun * d_), weighted(error.size());
    for (std::size_t t = 0; t < kRun; ++t)
      for (std::size_t i = 0; i < d_; ++i)
        error[t * d_ + i] = double{x_hat[index(t, head, i)]} - x[index(t, head, i)];
    turn(error, d_, inv_freq_, first, true);
    multiply(error, models_[head].fisher, kRun, static_cast<int>(d_), static_cast<int>(d_),
             std::span(weighted));
    double sum = 0;
    for (std::size_t i = 0; i < error.size(); ++i) sum += error[i] * weighted[i];
    return sum / 2;
  }

  std::unique_ptr<Codec> codec_;
  std::size_t d_, heads_;
  std::int64_t first_, starts_;
  std::vector<double> inv_freq_;  // empty for values
  std::vector<HeadModel> models_;
  std::vector<RandomStream> draws_;  // by head
  RandomStream positions_;
};

}  // namespace

SimulatedCost simulate_cost(const PlanBundle& bundle, const Profile& profile,
                            const SimulationOptions& options) {
  const ModelSpec &planned = bundle.plan.model, &profiled = profile.model;
  if (planned.num_layers != profiled.num_layers || planned.kv_heads != profiled.kv_heads ||
      planned.head_dim != profiled.head_dim)
    throw ArgumentError(
        "a prediction needs a profile of the plan's model: the plan has " +
        std::to_string(planned.num_layers) + " layers, " + std::to_string(planned.kv_heads) +
        " KV heads of " + std::to_string(planned.head_dim) + ", the profile " +
        std::to_string(profiled.num_layers) + ", " + std::to_string(profiled.kv_heads) + " of " +
        std::to_string(profiled.head_dim));
  if (options.tokens < 1)
    throw ArgumentError("a prediction needs at least 1 drawn token, got " +
                        std::to_string(options.tokens));
  check_profile(profile, false);
  const std::int64_t runs = (options.tokens + kRun - 1) / kRun;
  SimulatedCost cost;
  cost.sides.resize(profile.layers.size());
  parallel_for(2 * profile.layers.size(), options.threads, [&](std::size_t i) {
    SideSimulation simulation(bundle, profile, static_cast<int>(i / 2), kSides[i % 2], options);
    double sum = 0;
    for (std::int64_t run = 0; run < runs; ++run) sum += simulation.run();
    cost.sides[i / 2][i % 2] = sum / static_cast<double>(runs * kRun);
  });
  for (const std::array<double, 2>& layer : cost.sides) cost.kl += layer[0] + layer[1];
  return cost;
}

void set_prediction(const SimulatedCost& cost, Plan& plan) {
  plan.predicted_kl = cost.kl;
  for (std::size_t l = 0; l < plan.layers.size(); ++l)
    plan.layers[l].predicted_kl_share =
        cost.kl > 0 ? (cost.sides[l][0] + cost.sides[l][1]) / cost.kl : 0;
}

}  // namespace kvplan::quant
