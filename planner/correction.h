#pragma once
// Predicted to measured KL: the planner's second-order estimate is proportional to the truth while
// errors are small and falls behind where they are not.

#include <span>

namespace kvplan::planner {

/// One validated plan.
struct CorrectionPoint {
  double predicted = 0;       // nats per token, positive
  double measured = 0;        // nats per token
  double standard_error = 0;  // of measured
};

/// measured = scale * predicted * (1 + curvature * predicted); the identity without points.
struct CorrectionCurve {
  double scale = 1;
  double curvature = 0;          // per nat, never negative
  int points = 0;                // that it was fitted to
  double largest_predicted = 0;  // beyond it the curve extrapolates

  double measured(double predicted) const {
    return scale * predicted * (1 + curvature * predicted);
  }
  /// The predicted KL at which the curve reaches `measured` >= 0.
  double predicted(double measured) const;
};

/// Weighted least squares of measured/predicted on predicted; a point's spread is its standard
/// error and 2 % of its ratio, as second-order estimates are no better than that. Fewer than two
/// different predictions, or a slope below 0, give curvature 0. ArgumentError: a figure that is
/// not positive and finite (standard errors: >= 0).
CorrectionCurve fit_correction(std::span<const CorrectionPoint> points);

}  // namespace kvplan::planner
