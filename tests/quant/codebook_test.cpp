#include "quant/codebook.h"

#include <gtest/gtest.h>

#include <cmath>

#include "schemas/error.h"

namespace kvplan::quant {
namespace {

// Max, "Quantizing for Minimum Distortion" (1960), table I, continued by numerical integration to 8
// bits.
TEST(LloydMaxGaussian, MeetsTheTabulatedDistortions) {
  const double expected[] = {.363380, .117482, .034548, .009501,
                             .002505, .000644, .000163, .0000412};
  for (int bits = 1; bits <= kMaxCodebookBits; ++bits) {
    const double tolerance = bits < 6 ? 1e-3 : 4e-3;  // of the digits given
    EXPECT_NEAR(lloyd_max_gaussian(bits).distortion / expected[bits - 1], 1, tolerance) << bits;
  }
  EXPECT_NEAR(lloyd_max_gaussian(1).distortion, 1 - 2 / M_PI, 1e-14);
}

TEST(LloydMaxGaussian, MeetsTheTabulatedLevels) {
  const std::vector<std::vector<double>> positive = {
      {.7979},
      {.4528, 1.5104},
      {.2451, .7560, 1.3439, 2.1520},
      {.1284, .3881, .6568, .9423, 1.2562, 1.6181, 2.0690, 2.7326}};
  for (int bits = 1; bits <= 4; ++bits) {
    const auto& expected = positive[static_cast<std::size_t>(bits - 1)];
    const Codebook book = lloyd_max_gaussian(bits);
    for (std::size_t i = 0; i < expected.size(); ++i)
      EXPECT_NEAR(book.levels[expected.size() + i], expected[i], 1.1e-4) << bits << " " << i;
  }
}

TEST(LloydMaxBeta, MeetsTheDistortionsOfFiniteDimensions) {
  const std::vector<std::pair<int, std::vector<double>>> rows = {
      {64, {.358387, .114526, .033391, .009132}},
      {128, {.360889, .116000, .033966, .009315}},
      {1536, {.363173, .117358, .034499, .009485}}};
  for (const auto& [d, expected] : rows)
    for (int bits = 1; bits <= 4; ++bits)
      EXPECT_NEAR(lloyd_max_beta(bits, d).distortion / expected[static_cast<std::size_t>(bits - 1)],
                  1, 1e-3)
          << d << " " << bits;
}

TEST(UniformGaussian, HasTheStepOfLeastError) {
  const Codebook book = uniform_gaussian(2);
  EXPECT_NEAR(book.levels[2], .49785, 3e-5);
  EXPECT_NEAR(book.levels[3], 1.49355, 3e-5);
  EXPECT_NEAR(book.distortion, .1188, 1e-4);  // Max (1960), table II
  EXPECT_FLOAT_EQ(uniform_gaussian(1).levels[1], lloyd_max_gaussian(1).levels[1]);
  EXPECT_NEAR(uniform_gaussian(3).distortion, .03744, 1e-5);
}

TEST(Codebook, IsAscendingSymmetricAndCentredBetweenBoundaries) {
  for (const auto* name : {"lloyd_max", "uniform"})
    for (int bits = 1; bits <= kMaxCodebookBits; ++bits) {
      SCOPED_TRACE(std::string(name) + " " + std::to_string(bits));
      const Codebook& book = codebook(name, bits);
      ASSERT_EQ(book.levels.size(), std::size_t{1} << bits);
      ASSERT_EQ(book.boundaries.size() + 1, book.levels.size());
      for (std::size_t i = 0; i < book.levels.size(); ++i)
        EXPECT_EQ(book.levels[i], -book.levels[book.levels.size() - 1 - i]);
      for (std::size_t i = 0; i < book.boundaries.size(); ++i) {
        EXPECT_LT(book.levels[i], book.boundaries[i]);
        EXPECT_LT(book.boundaries[i], book.levels[i + 1]);
      }
      EXPECT_EQ(book.boundaries[book.boundaries.size() / 2], 0);
    }
}

TEST(Codebook, ErrorFallsWithBits) {
  for (int bits = 1; bits <= kMaxCodebookBits; ++bits) {
    EXPECT_LT(unbiased_distortion("lloyd_max", bits), unbiased_distortion("lloyd_max", bits - 1));
    EXPECT_GE(codebook("uniform", bits).distortion, codebook("lloyd_max", bits).distortion - 1e-12);
  }
  EXPECT_EQ(unbiased_distortion("lloyd_max", 0), 1);
  EXPECT_NEAR(unbiased_distortion("lloyd_max", 1), .36338 / .63662, 1e-5);
}

TEST(Codebook, RefusesOtherNamesAndWidths) {
  EXPECT_THROW(codebook("nf4", 4), ArgumentError);
  EXPECT_THROW(codebook("lloyd_max", 0), ArgumentError);
  EXPECT_THROW(codebook("uniform", 9), ArgumentError);
  EXPECT_THROW(lloyd_max_beta(2, 2), ArgumentError);
}

}  // namespace
}  // namespace kvplan::quant
