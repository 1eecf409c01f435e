#include "quant/calibrated_transform.h"

#include <cmath>
#include <string>

#include "quant/linalg.h"
#include "quant/moments.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

double trace(std::span<const double> x, std::size_t d) {
  double sum = 0;
  for (std::size_t i = 0; i < d; ++i) sum += x[i * d + i];
  return sum;
}

std::vector<double> product(std::span<const double> a, std::span<const double> b, int d) {
  std::vector<double> out(a.size());
  multiply(a, b, d, d, d, out);
  return out;
}

/// U diag(e^{1/2}) U^T, or with e^{-1/2}: (U e^{1/4}) (U e^{1/4})^T is symmetric to the bit.
std::vector<double> symmetric_power(std::span<const double> values, std::span<const double> vectors,
                                    int d, bool inverse) {
  std::vector<double> scaled(vectors.begin(), vectors.end());
  const auto n = static_cast<std::size_t>(d);
  for (std::size_t j = 0; j < n; ++j) {
    const double fourth_root = std::sqrt(std::sqrt(values[j]));
    const double factor = inverse ? 1 / fourth_root : fourth_root;
    for (std::size_t i = 0; i < n; ++i) scaled[i * n + j] *= factor;
  }
  std::vector<double> out(scaled.size());
  multiply_transposed(scaled, scaled, d, d, d, out);
  return out;
}

CalibratedTransform identity_transform(std::size_t d) {
  CalibratedTransform t;
  t.analysis.assign(d * d, 0);
  for (std::size_t i = 0; i < d; ++i) t.analysis[i * d + i] = 1;
  t.synthesis = t.analysis;
  t.lambda.assign(d, 0);
  return t;
}

void require_positive(double smallest, const char* name) {
  if (smallest > 0) return;
  throw ArgumentError(std::string(name) +
                      " is expected to be positive definite, found an eigenvalue of " +
                      std::to_string(smallest) + "; raise its shrinkage or profile more tokens");
}

}  // namespace

void shrink_to_identity(std::span<double> x, int d, double rho) {
  const auto n = static_cast<std::size_t>(d);
  const double share = rho * trace(x, n) / d;
  for (double& value : x) value *= 1 - rho;
  for (std::size_t i = 0; i < n; ++i) x[i * n + i] += share;
}

CalibratedTransform calibrated_transform(std::span<const double> second,
                                         std::span<const double> fisher, int d) {
  const auto n = static_cast<std::size_t>(d);
  if (!(trace(second, n) > 0) || !(trace(fisher, n) > 0)) return identity_transform(n);

  std::vector<double> values, vectors;
  symmetric_eigen(fisher, d, values, vectors);
  require_positive(values.back(), "the Fisher matrix F");
  const std::vector<double> root = symmetric_power(values, vectors, d, false);
  const std::vector<double> inverse_root = symmetric_power(values, vectors, d, true);

  CalibratedTransform t;
  symmetric_eigen(product(product(root, second, d), root, d), d, t.lambda, vectors);
  require_positive(t.lambda.back(), "the second moment C");
  t.analysis = product(transposed(vectors, d, d), root, d);
  t.synthesis = product(inverse_root, vectors, d);
  for (std::size_t i = 0; i < n; ++i) {
    const double deviation = std::sqrt(t.lambda[i]);
    for (std::size_t j = 0; j < n; ++j) {
      t.analysis[i * n + j] /= deviation;
      t.synthesis[j * n + i] *= deviation;
    }
  }
  return t;
}

std::vector<double> coherent_drop_costs(const Profile& profile, int layer, Side side, int head,
                                        std::span<const double> mean,
                                        const CalibratedTransform& transform) {
  const LayerProfile& from = profile.layers.at(static_cast<std::size_t>(layer));
  const int d = from.head_dim;
  const auto n = static_cast<std::size_t>(d);
  const auto windows = static_cast<std::size_t>(from.side(side).cross.shape.at(0));
  const std::vector<double> synthesis_transposed = transposed(transform.synthesis, d, d);
  std::vector<double> costs(n, 0), left(n * n);
  for (std::size_t s = 0; s < windows; ++s) {
    const auto cross = centred_cross(profile, layer, side, head, static_cast<int>(s), mean);
    multiply(synthesis_transposed, cross, d, d, d, left);
    const auto tokens = static_cast<double>(profile.windows[s].tokens - profile.sink_tokens);
    for (std::size_t i = 0; i < n; ++i) {
      double dropped = 0;
      for (std::size_t j = 0; j < n; ++j)
        dropped += left[i * n + j] * transform.analysis[i * n + j];
      costs[i] += dropped * dropped / tokens / (2 * static_cast<double>(windows));
    }
  }
  return costs;
}

double coherent_drop_cost(const Profile& profile, int layer, Side side, int head,
                          std::span<const double> mean) {
  const LayerProfile& from = profile.layers.at(static_cast<std::size_t>(layer));
  const auto n = static_cast<std::size_t>(from.head_dim);
  const auto windows = static_cast<std::size_t>(from.side(side).cross.shape.at(0));
  double cost = 0;
  for (std::size_t s = 0; s < windows; ++s) {
    const auto cross = centred_cross(profile, layer, side, head, static_cast<int>(s), mean);
    double dropped = 0;
    for (std::size_t i = 0; i < n; ++i) dropped += cross[i * n + i];
    const auto tokens = static_cast<double>(profile.windows[s].tokens - profile.sink_tokens);
    cost += dropped * dropped / tokens / (2 * static_cast<double>(windows));
  }
  return cost;
}

}  // namespace kvplan::quant
