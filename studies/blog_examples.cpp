#include "studies/blog_examples.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "quant/rotation.h"
#include "studies/absmax.h"
#include "studies/rank_correlation.h"
#include "studies/sources.h"
#include "studies/vectors.h"

namespace kvplan::studies {
namespace {

constexpr double kFourBitSteps = 7;  // its formula: levels = 2^(bits - 1) - 1

// B4

/// out [rows,d] = x [rows,d] R^T, given R^T.
void rotate_rows(const Array<float>& x, const std::vector<float>& rotation_columns,
                 Array<float>& out) {
  const auto rows = static_cast<std::size_t>(x.shape[0]), d = static_cast<std::size_t>(x.shape[1]);
  std::ranges::fill(out.data, 0.f);
  // Four rows share each load of the rotation.
  constexpr std::size_t kTile = 4;
  for (std::size_t row = 0; row < rows; row += kTile) {
    const float* in = x.data.data() + row * d;
    float* __restrict y = out.data.data() + row * d;
    for (std::size_t c = 0; c < d; ++c) {
      const float* column = rotation_columns.data() + c * d;
      const float a = in[c], b = in[d + c], e = in[2 * d + c], f = in[3 * d + c];
      for (std::size_t j = 0; j < d; ++j) {
        y[j] += a * column[j];
        y[d + j] += b * column[j];
        y[2 * d + j] += e * column[j];
        y[3 * d + j] += f * column[j];
      }
    }
  }
}

/// The first rows of a large matrix and the absmax of all of it.
struct Sampled {
  explicit Sampled(int d) : d_(d) {}
  void add(const Array<float>& block, std::size_t rows) {
    largest = std::max(largest, absmax(block.data));
    const std::size_t missing = rows * static_cast<std::size_t>(d_) - sample.size();
    const std::size_t taken = std::min(missing, block.data.size());
    sample.insert(sample.end(), block.data.begin(),
                  block.data.begin() + static_cast<std::ptrdiff_t>(taken));
  }
  std::span<const float> row(std::size_t i) const {
    const auto d = static_cast<std::size_t>(d_);
    return std::span(sample).subspan(i * d, d);
  }
  double largest = 0;
  std::vector<float> sample;

 private:
  int d_;
};

/// Distances of all pairs among `count` rows from `first` on.
std::vector<double> pair_distances(const Sampled& x, std::size_t first, std::size_t count) {
  std::vector<double> distances;
  for (std::size_t i = first; i < first + count; ++i)
    for (std::size_t j = first; j < i; ++j)
      distances.push_back(std::sqrt(squared_distance(x.row(i), x.row(j))));
  return distances;
}

void run_distance_correlation(const StudyContext& context, StudyResult& result) {
  constexpr int kDim = 512, kOutliers = 8;
  constexpr double kSteps = 3.5;
  constexpr float kOutlierScale = 20;
  constexpr std::int64_t kBlock = 64;
  constexpr std::size_t kSample = 100;
  const auto rows = context.size(32768, 2048);
  const auto seeds = static_cast<std::uint32_t>(context.size(8, 2));
  // Plain, plain rotated, with outlier channels, those rotated.
  constexpr std::size_t kKinds = 4;
  std::array<double, kKinds> same{};
  double resampled = 0, resampled_squares = 0;
  for (std::uint32_t seed = 0; seed < seeds; ++seed) {
    auto random = study_stream(context, "B4", seed);
    const std::vector<double> rotation =
        quant::haar_rotation(kDim, context.seed, seed, 0, 0, false);
    std::vector<float> columns(rotation.size());
    for (std::size_t i = 0; i < kDim; ++i)
      for (std::size_t j = 0; j < kDim; ++j)
        columns[j * kDim + i] = static_cast<float>(rotation[i * kDim + j]);
    std::vector<Sampled> kinds(kKinds, Sampled(kDim));
    Array<float> outliers({kBlock, kDim}), turned({kBlock, kDim});
    for (std::int64_t first = 0; first < rows; first += kBlock) {
      Array<float> x = gaussian_vectors(kBlock, kDim, random);
      rotate_rows(x, columns, turned);
      kinds[0].add(x, 2 * kSample);
      kinds[1].add(turned, 2 * kSample);
      // R (x + 19 x_outlier) = R x + 19 R x_outlier.
      for (std::size_t i = 0; i < static_cast<std::size_t>(kBlock); ++i)
        for (std::size_t c = 0; c < kOutliers; ++c) {
          const float extra = (kOutlierScale - 1) * x.row(i)[c];
          for (std::size_t j = 0; j < kDim; ++j) turned.row(i)[j] += extra * columns[c * kDim + j];
        }
      scale_channels(x, kOutliers, kOutlierScale);
      kinds[2].add(x, 2 * kSample);
      kinds[3].add(turned, 2 * kSample);
    }
    for (std::size_t kind = 0; kind < kKinds; ++kind) {
      Sampled rounded = kinds[kind];
      for (float& value : rounded.sample)
        value = static_cast<float>(absmax_level(value, rounded.largest, kSteps));
      const std::vector<double> before = pair_distances(kinds[kind], 0, kSample);
      same[kind] += correlation(before, pair_distances(rounded, 0, kSample)) / seeds;
      if (kind < 2) {
        const double other = correlation(before, pair_distances(rounded, kSample, kSample));
        resampled += other / (2 * seeds);
        resampled_squares += square(other) / (2 * seeds);
      }
    }
  }
  result.near(Role::kClaim, "without rotation, same sample", same[0], .85, .02);
  result.near(Role::kClaim, "with rotation, same sample", same[1], .99, .01);
  result.near(Role::kReference, "as printed, every call with its own sample", resampled, 0, .05);
  result.near(Role::kReference, "as printed, root mean square over the seeds",
              std::sqrt(resampled_squares), .04, .03);
  result.near(Role::kReference, "without rotation, same sample, N(0,1)", same[0], .82, .03);
  result.near(Role::kReference, "with rotation, same sample, N(0,1)", same[1], .83, .03);
  result.near(Role::kReference, "without rotation, 8 channels x20", same[2], .86, .03);
  result.near(Role::kReference, "with rotation, 8 channels x20", same[3], .967, .02);
}

// B5

void run_dead_zone(const StudyContext&, StudyResult& result) {
  constexpr double kRange = 10, kResolution = 1e-4;
  const auto dead_zone = [](double steps) {
    double x = 0;
    while (absmax_level(x + kResolution, kRange, steps) == 0) x += kResolution;
    return x;
  };
  result.near(Role::kClaim, "largest |x| that its formula rounds to 0, range +-10",
              dead_zone(kFourBitSteps), 1.5, .05);
  result.near(Role::kReference, "7 steps each side, as its code has it", dead_zone(kFourBitSteps),
              kRange / kFourBitSteps / 2, 2e-4);
  result.near(Role::kReference, "7 levels in all", dead_zone(3), kRange / 3 / 2, 2e-4);
}

// B6

void run_rounded_probabilities(const StudyContext&, StudyResult& result) {
  constexpr std::array<double, 5> kProbabilities = {.7, .2, .05, .03, .02};
  constexpr std::array<double, 5> kPrinted = {.71, .28, 0, 0, 0};
  // .05 lies on the boundary: either neighbour is right.
  constexpr std::array<double, 5> kLow = {.7, .2, 0, 0, 0}, kHigh = {.7, .2, .1, 0, 0};
  constexpr double kRounding = 1e-9;
  StudyTable table{"One absmax for the row", {"probability", "printed", "its formula"}, {}};
  for (std::size_t i = 0; i < kProbabilities.size(); ++i) {
    const double rounded = absmax_level(kProbabilities[i], .7, kFourBitSteps);
    const std::string name = "probability " + figure(kProbabilities[i]);
    result.near(Role::kClaim, name + " as printed", rounded, kPrinted[i], .005);
    result.between(Role::kReference, name + " by its formula", rounded, kLow[i] - kRounding,
                   kHigh[i] + kRounding);
    table.rows.push_back({figure(kProbabilities[i]), figure(kPrinted[i]), figure(rounded)});
  }
  result.table(std::move(table));
}

// B7

void run_rotated_example(const StudyContext& context, StudyResult& result) {
  constexpr std::size_t kDim = 5;
  constexpr std::array<double, kDim> kVector = {.01, .02, 4.5, 3.2, .001};
  constexpr double kPrintedNorm = 2.09;  // of the vector that is printed as the rotated one
  constexpr double kPrintedError = .05;
  const auto draws = static_cast<std::uint32_t>(context.size(20000, 500));
  std::array<double, kDim> squares{};
  double norm = 0;
  for (std::uint32_t draw = 0; draw < draws; ++draw) {
    const auto rotation =
        quant::haar_rotation(static_cast<int>(kDim), context.seed, draw, 0, 0, false);
    std::array<double, kDim> y{};
    double largest = 0;
    for (std::size_t i = 0; i < kDim; ++i) {
      for (std::size_t j = 0; j < kDim; ++j) y[i] += rotation[i * kDim + j] * kVector[j];
      largest = std::max(largest, std::abs(y[i]));
      norm += square(y[i]) / draws;
    }
    for (std::size_t j = 0; j < kDim; ++j) {
      double x = 0;
      for (std::size_t i = 0; i < kDim; ++i)
        x += rotation[i * kDim + j] * absmax_level(y[i], largest, kFourBitSteps);
      squares[j] += square(x - kVector[j]) / draws;
    }
  }
  result.near(Role::kClaim, "norm after a rotation, as printed", std::sqrt(norm), kPrintedNorm,
              .05);
  const auto [least, most] = std::ranges::minmax(squares);
  result.at_most(Role::kClaim, "largest rms error of a coordinate after rotating back",
                 std::sqrt(most), kPrintedError);
  result.near(Role::kReference, "norm of the vector", std::sqrt(norm), 5.52, .005);
  result.near(Role::kReference, "smallest rms error of a coordinate", std::sqrt(least), .13, .005);
  result.near(Role::kReference, "largest rms error of a coordinate", std::sqrt(most), .16, .005);
}

}  // namespace

std::vector<Study> blog_examples() {
  return {
      {{.id = "B4",
        .title = "Distance correlation with and without rotation",
        .claim = "Naive 4-bit rounding keeps 85 % of the correlation between distances, rounding "
                 "after a random rotation 99 %; the data are N(0,1).",
        .source = kSourceBenchmarksBlog,
        .explanation =
            "As printed, each call of its function draws its own hundred vectors, so that the "
            "correlation is near 0 whatever the code. On one sample rotation changes nothing, as "
            "N(0,1) data look the same in any orthonormal basis. With outlier channels, which the "
            "example lacks, rotation does help.",
        .expected = Verdict::kRefuted},
       run_distance_correlation},
      {{.id = "B5",
        .title = "Values that naive rounding sets to zero",
        .claim = "With values in -10 .. 10 and 7 levels, everything between -1.5 and 1.5 becomes "
                 "0.",
        .source = kSourceBenchmarksBlog,
        .explanation =
            "Its formula has 7 steps on each side of 0 (15 levels), and half a step is .714. With "
            "7 levels in all it would be 1.67. Neither gives 1.5.",
        .expected = Verdict::kRefuted},
       run_dead_zone},
      {{.id = "B6",
        .title = "Attention probabilities after 4-bit rounding",
        .claim = "Attention .7 .2 .05 .03 .02 becomes .71 .28 0 0 0 after INT4.",
        .source = kSourceBenchmarksBlog,
        .explanation =
            "Its own formula gives .7 .2 and 0 or .1, 0, 0, and the printed row is not even on "
            "its grid. A cache codec never rounds probabilities: it rounds keys and values, and "
            "the softmax of inexact logits stays positive.",
        .expected = Verdict::kRefuted},
       run_rounded_probabilities},
      {{.id = "B7",
        .title = "The rotated five-vector",
        .claim = "[.01 .02 4.5 3.2 .001] is rotated to a printed vector, rounded to 4 bits and "
                 "returns within .05 of itself.",
        .source = kSourceBenchmarksBlog,
        .explanation =
            "A rotation keeps the norm: 5.52 here, 2.09 for the printed vector, so it is none. "
            "After a true rotation the error of 4-bit absmax is .13 to .16 on each coordinate, "
            "the small ones too.",
        .expected = Verdict::kRefuted},
       run_rotated_example},
  };
}

}  // namespace kvplan::studies
