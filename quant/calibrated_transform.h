#pragma once
// The transform of the calibrated codec: coordinates of unit variance in which errors cost lambda
// (quantization.md section 4). Private to quant.

#include <span>
#include <vector>

#include "schemas/profile.h"

namespace kvplan::quant {

/// Of one head and side; coordinates in descending lambda.
struct CalibratedTransform {
  std::vector<double> analysis;   // [d,d] A = Lambda^-1/2 U^T F^1/2
  std::vector<double> synthesis;  // [d,d] A^-1 = F^-1/2 U Lambda^1/2
  std::vector<double> lambda;     // [d] eigenvalues of F^1/2 C F^1/2
};

/// X <- (1-rho) X + rho tr(X)/d I, in place. X [d,d].
void shrink_to_identity(std::span<double> x, int d, double rho);

/// From C and F, both [d,d] and shrunk already: A C A^T = I and A^-T F A^-1 = Lambda. A trace of 0
/// (or one that rounding left below 0) gives A = I, lambda = 0. ArgumentError when C or F has an
/// eigenvalue <= 0 otherwise.
CalibratedTransform calibrated_transform(std::span<const double> second,
                                         std::span<const double> fisher, int d);

/// Cost of leaving out each coordinate on all tokens together, nats per token: 1/2 E_s[((A^-T X_s
/// A^T)_ii)^2 / T_s] over the coherent windows s of T_s tokens (sinks not counted). `mean`: what x
/// is centred on.
std::vector<double> coherent_drop_costs(const Profile& profile, int layer, Side side, int head,
                                        std::span<const double> mean,
                                        const CalibratedTransform& transform);

/// Nats per token of leaving out a whole vector's deviation from its mean, all tokens together:
/// 1/2 E_s[(tr X_s)^2] / T.
double coherent_drop_cost(const Profile& profile, int layer, Side side, int head,
                          std::span<const double> mean);

}  // namespace kvplan::quant
