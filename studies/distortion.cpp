#include "studies/distortion.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "studies/vectors.h"

namespace kvplan::studies {

// Bisection without branches: 2^bits - 1 boundaries split evenly at every step.
int nearest_code(const quant::Codebook& book, float x) {
  int code = 0;
  for (int step = 1 << (book.bits - 1); step > 0; step /= 2)
    code += x > book.boundaries[static_cast<std::size_t>(code + step - 1)] ? step : 0;
  return code;
}

void CodebookErrors::add(const Array<float>& unit_vectors) {
  const auto d = static_cast<double>(unit_vectors.shape[1]);
  const auto to_coordinate = static_cast<float>(std::sqrt(d));
  for (std::size_t i = 0; i < static_cast<std::size_t>(unit_vectors.shape[0]); ++i) {
    double yy = 0, yc = 0, cc = 0;
    for (const float x : unit_vectors.row(i)) {
      const float y = to_coordinate * x;
      const double c = book_.levels[static_cast<std::size_t>(nearest_code(book_, y))];
      yy += double{y} * double{y};
      yc += double{y} * c;
      cc += c * c;
    }
    error_ += (yy - 2 * yc + cc) / d;
    norm_error_ += std::abs(std::sqrt(cc / yy) - 1);
    direction_ += 1 - yc / std::sqrt(yy * cc);
    const double biased = yc / cc, unbiased = yy / yc, norm_corrected = std::sqrt(yy / cc);
    scale_identity_ =
        std::max(scale_identity_, std::abs(square(norm_corrected) / (biased * unbiased) - 1));
  }
  count_ += unit_vectors.shape[0];
}

std::vector<EstimatorErrors> estimator_errors(const StudyContext& context, std::string_view id,
                                              const std::vector<std::string>& baselines) {
  constexpr int kDimension = 128, kQueries = 4;  // per vector
  constexpr double kCosine = .3;
  const std::int64_t draws = context.size(20, 4), vectors = context.size(1000, 250);
  const double weight = 1 / static_cast<double>(draws * vectors);
  std::vector<EstimatorErrors> errors(baselines.size());
  for (std::int64_t draw = 0; draw < draws; ++draw) {
    quant::RandomStream random = study_stream(context, id, static_cast<std::uint32_t>(draw));
    const Array<float> x = unit_vectors(vectors, kDimension, random);
    const Array<float> y = unit_vectors(kQueries * vectors, kDimension, random);
    for (std::size_t b = 0; b < baselines.size(); ++b) {
      const auto seed = context.seed + static_cast<std::uint64_t>(draw);
      const Array<float> x_hat = stored(*baseline_codec(baselines[b], kDimension, seed), x);
      EstimatorErrors& mean = errors[b];
      for (std::size_t i = 0; i < static_cast<std::size_t>(vectors); ++i) {
        mean.mse += weight * squared_distance(x.row(i), x_hat.row(i));
        const double gain = dot(x.row(i), x_hat.row(i));
        mean.gain += weight * gain;
        for (std::size_t j = kQueries * i; j < kQueries * (i + 1); ++j) {
          const double yx = dot(y.row(j), x.row(i)), yx_hat = dot(y.row(j), x_hat.row(i));
          mean.query += weight / kQueries * kDimension * square(yx - yx_hat);
          // y turned towards x: .3 x + sqrt(1 - .3^2) u, u the unit vector of y - <y,x> x.
          const double across = std::sqrt((1 - square(kCosine)) / (1 - square(yx)));
          mean.slope +=
              weight / kQueries * (kCosine * gain + across * (yx_hat - yx * gain)) / kCosine;
        }
      }
    }
  }
  return errors;
}

double index_entropy_bits(const quant::Codebook& book) {
  const auto below = [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); };
  double entropy = 0, lower = 0;
  for (std::size_t i = 0; i <= book.boundaries.size(); ++i) {
    const double upper = i < book.boundaries.size() ? below(book.boundaries[i]) : 1;
    entropy -= (upper - lower) * std::log2(upper - lower);
    lower = upper;
  }
  return entropy;
}

}  // namespace kvplan::studies
