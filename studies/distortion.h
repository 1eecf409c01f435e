#pragma once
// What a code does to unit vectors: mean squared error, norm and direction, inner products.

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "quant/codebook.h"
#include "schemas/types.h"
#include "studies/study.h"

namespace kvplan::studies {

/// Index of the nearest level.
int nearest_code(const quant::Codebook& book, float x);

/// Errors of a codebook on unit vectors without a scale rule (S = 1), in exact arithmetic: c takes
/// the levels nearest to sqrt(d) x, x_hat = c / sqrt(d). A vector that is uniform on the sphere
/// needs no rotation.
class CodebookErrors {
 public:
  explicit CodebookErrors(quant::Codebook book) : book_(std::move(book)) {}
  void add(const Array<float>& unit_vectors);
  double distortion() const { return error_ / count(); }           // E|x - x_hat|^2
  double norm_error() const { return norm_error_ / count(); }      // E||x_hat| - 1|
  double direction_error() const { return direction_ / count(); }  // E(1 - cos(x, x_hat))
  double scale_identity() const { return scale_identity_; }        // max|S_nc^2/(S_b S_u) - 1|

 private:
  double count() const { return static_cast<double>(count_); }
  quant::Codebook book_;
  std::int64_t count_ = 0;
  double error_ = 0, norm_error_ = 0, direction_ = 0, scale_identity_ = 0;
};

/// A baseline as an estimator of inner products at d=128, over several draws of its rotation and
/// sketch.
struct EstimatorErrors {
  double mse = 0;    // E|x - x_hat|^2
  double query = 0;  // d E<y, x - x_hat>^2, y unit and independent of x
  double slope = 0;  // E<y, x_hat> / <y, x> for unit y with <y, x> = .3
  double gain = 0;   // E<x, x_hat>: 1 without bias
};
/// Of each baseline, on the same vectors and queries.
std::vector<EstimatorErrors> estimator_errors(const StudyContext& context, std::string_view id,
                                              const std::vector<std::string>& baselines);

/// Bits of the index of a Gaussian Lloyd-Max code under an ideal entropy code.
double index_entropy_bits(const quant::Codebook& book);

}  // namespace kvplan::studies
