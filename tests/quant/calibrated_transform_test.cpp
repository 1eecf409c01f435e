#include "quant/calibrated_transform.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "quant/linalg.h"
#include "quant/moments.h"
#include "schemas/error.h"
#include "tests/quant/synthetic_profile.h"

namespace kvplan::quant {
namespace {

using ::testing::Each;
using ::testing::Pointwise;
using testing::Vector;

MATCHER_P(IsNear, tolerance, "") {
  return std::abs(std::get<0>(arg) - std::get<1>(arg)) <= tolerance;
}

Vector product(const Vector& a, const Vector& b, int d) {
  Vector out(a.size());
  multiply(a, b, d, d, d, out);
  return out;
}

Vector diagonal_matrix(const Vector& values) {
  Vector out(values.size() * values.size(), 0);
  for (std::size_t i = 0; i < values.size(); ++i) out[i * values.size() + i] = values[i];
  return out;
}

Vector identity(int d) { return diagonal_matrix(Vector(static_cast<std::size_t>(d), 1)); }

/// G G^T / d + floor I.
Vector positive_matrix(int d, std::uint64_t seed, double floor) {
  RandomStream random(seed, StreamPurpose::kTest);
  const auto n = static_cast<std::size_t>(d);
  const Vector g = testing::normal_vector(random, n * n);
  Vector out(n * n);
  multiply_transposed(g, g, d, d, d, out);
  for (double& value : out) value /= d;
  for (std::size_t i = 0; i < n; ++i) out[i * n + i] += floor;
  return out;
}

TEST(Shrinkage, MovesTowardsTheIdentityOfTheSameTrace) {
  Vector x = {3, 1, 1, 5};
  shrink_to_identity(x, 2, 0.25);
  EXPECT_THAT(x, Pointwise(IsNear(1e-15), Vector{3.25, 0.75, 0.75, 4.75}));
}

class TransformTest : public ::testing::TestWithParam<int> {
 protected:
  int d() const { return GetParam(); }
  Vector second() const { return positive_matrix(d(), 1, 0.01); }
  Vector fisher() const { return positive_matrix(d(), 2, 0.02); }
};

INSTANTIATE_TEST_SUITE_P(Sizes, TransformTest, ::testing::Values(1, 2, 16, 80, 128));

TEST_P(TransformTest, WhitensAndDiagonalisesTheMetric) {
  const CalibratedTransform t = calibrated_transform(second(), fisher(), d());
  const Vector analysis_t = transposed(t.analysis, d(), d());
  const Vector synthesis_t = transposed(t.synthesis, d(), d());
  EXPECT_THAT(product(t.analysis, t.synthesis, d()), Pointwise(IsNear(1e-10), identity(d())));
  EXPECT_THAT(product(product(t.analysis, second(), d()), analysis_t, d()),
              Pointwise(IsNear(1e-9), identity(d())));
  EXPECT_THAT(product(product(synthesis_t, fisher(), d()), t.synthesis, d()),
              Pointwise(IsNear(1e-10), diagonal_matrix(t.lambda)));
  EXPECT_TRUE(std::is_sorted(t.lambda.rbegin(), t.lambda.rend()));
}

TEST_P(TransformTest, LambdaAddsUpToTheTraceOfFC) {
  const CalibratedTransform t = calibrated_transform(second(), fisher(), d());
  const Vector fc = product(fisher(), second(), d());
  double trace = 0, sum = 0;
  for (std::size_t i = 0; i < t.lambda.size(); ++i) {
    trace += fc[i * t.lambda.size() + i];
    sum += t.lambda[i];
  }
  EXPECT_NEAR(sum, trace, 1e-11 * trace);
}

TEST_P(TransformTest, LambdaDoesNotDependOnTheUnitOfTheChannels) {
  // x -> B x turns C into B C B^T and F into B^-T F B^-1; here B scales every channel.
  const auto n = static_cast<std::size_t>(d());
  Vector second_scaled = second(), fisher_scaled = fisher();
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      const double scale =
          (1 + 0.3 * static_cast<double>(i % 5)) * (1 + 0.3 * static_cast<double>(j % 5));
      second_scaled[i * n + j] *= scale;
      fisher_scaled[i * n + j] /= scale;
    }
  }
  const Vector lambda = calibrated_transform(second(), fisher(), d()).lambda;
  EXPECT_THAT(calibrated_transform(second_scaled, fisher_scaled, d()).lambda,
              Pointwise(IsNear(1e-11 * lambda[0]), lambda));
}

struct DegenerateCase {
  const char* name;
  Vector second, fisher;
};

class DegenerateTest : public ::testing::TestWithParam<DegenerateCase> {};

TEST_P(DegenerateTest, GivesTheIdentityWithLambdaZero) {
  const CalibratedTransform t = calibrated_transform(GetParam().second, GetParam().fisher, 2);
  EXPECT_EQ(t.analysis, identity(2));
  EXPECT_EQ(t.synthesis, identity(2));
  EXPECT_THAT(t.lambda, Each(0.0));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, DegenerateTest,
    ::testing::Values(DegenerateCase{"NoFisher", {2, 1, 1, 2}, {0, 0, 0, 0}},
                      DegenerateCase{"NoSpread", {0, 0, 0, 0}, {2, 1, 1, 2}},
                      DegenerateCase{"RoundedBelowZero", {-1e-16, 0, 0, 0}, {2, 1, 1, 2}}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Transform, RefusesIndefiniteMatrices) {
  const Vector fine = {2, 1, 1, 2}, indefinite = {1, 3, 3, 1};
  EXPECT_THROW(calibrated_transform(indefinite, fine, 2), ArgumentError);
  EXPECT_THROW(calibrated_transform(fine, indefinite, 2), ArgumentError);
}

class DropCostTest : public ::testing::TestWithParam<Side> {};

INSTANTIATE_TEST_SUITE_P(Sides, DropCostTest, ::testing::Values(Side::kKey, Side::kValue),
                         [](const auto& info) { return std::string(side_name(info.param)); });

/// Straight from the definition: 1/2 E_s[(sum_t h'_ti y_ti)^2 / T_s] with h' = A^-T h, y = A (x -
/// m).
TEST_P(DropCostTest, EqualsTheSumOverTokens) {
  testing::SyntheticSpec spec;
  spec.head_dim = 16;
  spec.rotary_dim = 12;
  const int layer = 1, head = 0, d = spec.head_dim;
  const Profile profile = testing::synthetic_profile(spec);
  const HeadMoments moments = head_moments(profile, layer, GetParam(), head, 64);
  const CalibratedTransform t = calibrated_transform(moments.second, moments.fisher, d);

  const Vector inv_freq = GetParam() == Side::kKey ? testing::frequencies(12) : Vector{};
  const Vector synthesis_t = transposed(t.synthesis, d, d);
  std::vector<Vector> sums(static_cast<std::size_t>(spec.windows), Vector(16, 0));
  for (const auto& token : testing::draw_tokens(spec, layer, GetParam(), head)) {
    Vector x = testing::rotated(token.x, inv_freq, token.position), y(16), h(16);
    const Vector m = testing::rotated(moments.mean, inv_freq, token.position);
    for (std::size_t i = 0; i < 16; ++i) x[i] -= m[i];
    multiply(t.analysis, x, d, d, 1, y);
    multiply(synthesis_t, token.h, d, d, 1, h);
    for (std::size_t i = 0; i < 16; ++i)
      sums[static_cast<std::size_t>(token.window)][i] += h[i] * y[i];
  }
  Vector expected(16, 0);
  for (const Vector& sum : sums)
    for (std::size_t i = 0; i < 16; ++i)
      expected[i] += sum[i] * sum[i] / (spec.window - spec.sink_tokens) / (2 * spec.windows);
  const Vector costs = coherent_drop_costs(profile, layer, GetParam(), head, moments.mean, t);
  for (std::size_t i = 0; i < 16; ++i)
    EXPECT_NEAR(costs[i], expected[i], 1e-4 * expected[i] + 1e-6) << "coordinate " << i;
}

}  // namespace
}  // namespace kvplan::quant
