#include "quant/categorical.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace kvplan::quant {
namespace {

RandomStream stream(std::uint32_t draw) { return {7, StreamPurpose::kTest, draw}; }

/// Falling weights over several blocks, the last of them not full; a few are zero.
std::vector<float> zipf(std::size_t count) {
  std::vector<float> weights;
  for (std::size_t i = 0; i < count; ++i)
    weights.push_back(
        i % 7 == 3 ? 0.0f
                   : static_cast<float>(std::pow(1.0 + static_cast<double>(i * 31 % count), -1.1)));
  return weights;
}

TEST(Categorical, DrawsInProportionToTheWeights) {
  constexpr std::uint32_t kDraws = 40000;
  for (const std::size_t count : {1u, 3u, 64u, 65u, 300u}) {
    SCOPED_TRACE(count);
    const std::vector<float> weights = zipf(count);
    double total = 0;
    for (const float w : weights) total += w;
    std::vector<int> seen(count);
    for (std::uint32_t i = 0; i < kDraws; ++i) ++seen[draw_categorical(weights, stream(i))];
    double chi_squared = 0;
    int cells = -1;
    for (std::size_t i = 0; i < count; ++i) {
      const double expected = kDraws * weights[i] / total;
      if (expected == 0) {
        EXPECT_EQ(seen[i], 0) << i;
        continue;
      }
      chi_squared += (seen[i] - expected) * (seen[i] - expected) / expected;
      ++cells;
    }
    EXPECT_LT(chi_squared, cells + 5 * std::sqrt(2.0 * cells) + 1e-9);
  }
}

TEST(Categorical, IgnoresTheScaleOfTheWeights) {
  std::vector<float> weights = zipf(1000), larger = weights;
  for (float& w : larger) w *= 1024;
  for (std::uint32_t i = 0; i < 200; ++i)
    EXPECT_EQ(draw_categorical(weights, stream(i)), draw_categorical(larger, stream(i)));
}

TEST(Categorical, ASmallErrorOfTheWeightsSeldomChangesADraw) {
  constexpr std::uint32_t kDraws = 20000;
  constexpr double kError = 1e-3;
  const std::vector<float> weights = zipf(5000);
  std::vector<float> other = weights;
  for (std::size_t i = 0; i < other.size(); ++i)
    other[i] *= static_cast<float>(1 + (i % 2 == 0 ? kError : -kError));
  int changed = 0;
  for (std::uint32_t i = 0; i < kDraws; ++i)
    changed += draw_categorical(weights, stream(i)) != draw_categorical(other, stream(i));
  EXPECT_GT(changed, 0);  // by inverting the distribution function it would be near kDraws
  EXPECT_LT(changed, 3 * kError * kDraws);
}

TEST(Categorical, AnswersWithoutAPositiveWeight) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(draw_categorical({}, stream(0)), 0u);
  EXPECT_EQ(draw_categorical(std::vector<float>(100), stream(0)), 0u);
  EXPECT_EQ(draw_categorical(std::vector<float>(100, nan), stream(0)), 0u);
  std::vector<float> one(100, nan);
  one[77] = 1e-30f;
  EXPECT_EQ(draw_categorical(one, stream(0)), 77u);
}

TEST(Categorical,
     HasGoldenDraws) {  // recorded from this implementation; a platform difference shows
  const std::vector<float> weights = zipf(2000);
  std::vector<std::size_t> drawn;
  for (std::uint32_t i = 0; i < 6; ++i) drawn.push_back(draw_categorical(weights, stream(i)));
  EXPECT_EQ(drawn, (std::vector<std::size_t>{130, 1742, 1933, 1742, 1107, 1484}));
}

}  // namespace
}  // namespace kvplan::quant
