#include "planner/correction.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "schemas/error.h"

namespace kvplan::planner {
namespace {

constexpr double kModelSpread = 0.02;

void check(const CorrectionPoint& point) {
  const auto positive = [](double x) { return std::isfinite(x) && x > 0; };
  if (!positive(point.predicted) || !positive(point.measured) ||
      !std::isfinite(point.standard_error) || point.standard_error < 0)
    throw ArgumentError("correction point: predicted " + std::to_string(point.predicted) +
                        ", measured " + std::to_string(point.measured) + ", standard error " +
                        std::to_string(point.standard_error) +
                        "; expected positive finite figures and an error of at least 0");
}

}  // namespace

double CorrectionCurve::predicted(double measured) const {
  const double linear = measured / scale;
  // The root of curvature p^2 + p - linear, written so that curvature 0 is no special case.
  return 2 * linear / (1 + std::sqrt(1 + 4 * curvature * linear));
}

CorrectionCurve fit_correction(std::span<const CorrectionPoint> points) {
  double w = 0, wx = 0, wy = 0, wxx = 0, wxy = 0;
  CorrectionCurve curve;
  for (const CorrectionPoint& point : points) {
    check(point);
    const double x = point.predicted, ratio = point.measured / point.predicted;
    const double spread = std::hypot(point.standard_error / x, kModelSpread * ratio);
    const double weight = 1 / (spread * spread);
    w += weight;
    wx += weight * x;
    wy += weight * ratio;
    wxx += weight * x * x;
    wxy += weight * x * ratio;
    curve.largest_predicted = std::max(curve.largest_predicted, x);
    ++curve.points;
  }
  if (curve.points == 0) return curve;
  const double spread_x = w * wxx - wx * wx;
  const double slope = spread_x > 1e-12 * w * wxx ? (w * wxy - wx * wy) / spread_x : 0;
  const double intercept = (wy - slope * wx) / w;
  if (slope > 0 && intercept > 0) {
    curve.scale = intercept;
    curve.curvature = slope / intercept;
  } else {
    curve.scale = wy / w;
  }
  return curve;
}

}  // namespace kvplan::planner
