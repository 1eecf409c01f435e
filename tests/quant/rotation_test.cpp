#include "quant/rotation.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "quant/linalg.h"
#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

double departure_from_orthogonality(const std::vector<double>& q, int d) {
  std::vector<double> gram(q.size());
  multiply_transposed(q, q, d, d, d, gram);
  double worst = 0;
  for (int i = 0; i < d; ++i)
    for (int j = 0; j < d; ++j)
      worst = std::max(worst, std::abs(gram[static_cast<std::size_t>(i * d + j)] - (i == j)));
  return worst;
}

std::uint64_t fnv1a(const std::vector<double>& values) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const double value : values) {
    const auto bits = std::bit_cast<std::uint64_t>(value);
    for (int i = 0; i < 8; ++i) hash = (hash ^ (bits >> (8 * i) & 255)) * 0x100000001b3;
  }
  return hash;
}

TEST(HaarRotation, IsOrthogonalAtEverySize) {
  for (const int d : {1, 2, 7, 16, 64, 80, 128})
    EXPECT_LT(departure_from_orthogonality(haar_rotation(d, 3, 0, 0, 0, false), d), 1e-14) << d;
}

TEST(HaarRotation,
     HasGoldenBits) {  // recorded from this implementation; a platform difference shows here
  EXPECT_EQ(fnv1a(haar_rotation(8, 7, 3, 5, 2, true)), 0x4c308f2e4fe72c2aull);
}

TEST(HaarRotation, DependsOnEveryPartOfTheKey) {
  const auto base = haar_rotation(4, 1, 1, 1, 1, true);
  EXPECT_EQ(base, haar_rotation(4, 1, 1, 1, 1, true));
  EXPECT_NE(base, haar_rotation(4, 2, 1, 1, 1, true));
  EXPECT_NE(base, haar_rotation(4, 1, 2, 1, 1, true));
  EXPECT_NE(base, haar_rotation(4, 1, 1, 2, 1, true));
  EXPECT_NE(base, haar_rotation(4, 1, 1, 1, 2, true));
  EXPECT_NE(base, haar_rotation(4, 1, 1, 1, 1, false));
}

// A Haar matrix has E q = 0 and E q^2 = 1/d in every entry; QR without the sign fix has E q_00 far
// from 0.
TEST(HaarRotation, EntriesHaveTheMomentsOfTheHaarMeasure) {
  constexpr int kMatrices = 4000, d = 3;
  std::vector<double> mean(d * d), square(d * d);
  for (std::uint64_t seed = 0; seed < kMatrices; ++seed) {
    const auto q = haar_rotation(d, seed, 0, 0, 0, false);
    for (std::size_t i = 0; i < q.size(); ++i) {
      mean[i] += q[i] / kMatrices;
      square[i] += q[i] * q[i] / kMatrices;
    }
  }
  for (std::size_t i = 0; i < mean.size(); ++i) {
    EXPECT_NEAR(mean[i], 0, 0.04) << i;
    EXPECT_NEAR(square[i], 1.0 / d, 0.025) << i;
  }
}

TEST(HadamardRotation, IsOrthogonalWithEntriesOfOneMagnitude) {
  const auto h = hadamard_rotation(16, true, 1, 5, 0, 0);
  EXPECT_LT(departure_from_orthogonality(h, 16), 1e-14);
  for (const double x : h) EXPECT_DOUBLE_EQ(std::abs(x), 0.25);
  EXPECT_LT(departure_from_orthogonality(hadamard_rotation(64, true, 3, 5, 0, 0), 64), 1e-14);
  const double r = 1 / std::sqrt(2.0);
  EXPECT_EQ(hadamard_rotation(2, false, 1, 0, 0, 0), (std::vector{r, r, r, -r}));
}

TEST(HadamardRotation, RefusesOtherSizes) {
  EXPECT_THROW(hadamard_rotation(80, true, 1, 0, 0, 0), ArgumentError);
  EXPECT_THROW(hadamard_rotation(0, true, 1, 0, 0, 0), ArgumentError);
  EXPECT_THROW(hadamard_rotation(8, true, 0, 0, 0, 0), ArgumentError);
}

TEST(RotationMatrix, FollowsScopeSidesAndKind) {
  RotationSpec spec{.kind = "haar", .scope = "model", .seed = 9};
  EXPECT_EQ(rotation_matrix(spec, 8, 0, 0, Side::kKey),
            rotation_matrix(spec, 8, 3, 2, Side::kValue));
  spec.scope = "head";
  EXPECT_NE(rotation_matrix(spec, 8, 0, 0, Side::kKey),
            rotation_matrix(spec, 8, 0, 0, Side::kValue));
  EXPECT_NE(rotation_matrix(spec, 8, 0, 0, Side::kKey), rotation_matrix(spec, 8, 0, 1, Side::kKey));
  spec.sides = "k";
  EXPECT_EQ(rotation_matrix(spec, 2, 0, 0, Side::kValue), (std::vector<double>{1, 0, 0, 1}));
  spec.kind = "signed_hadamard";
  EXPECT_EQ(rotation_matrix(spec, 80, 0, 0, Side::kKey),
            rotation_matrix({.kind = "haar", .scope = "head", .seed = 9}, 80, 0, 0, Side::kKey));
  spec.kind = "fourier";
  EXPECT_THROW(rotation_matrix(spec, 8, 0, 0, Side::kKey), ArgumentError);
}

TEST(Linalg, ProductsSumInAscendingOrderAtOddSizes) {
  RandomStream random(4, StreamPurpose::kTest);
  for (const auto& [n, k, m] :
       {std::array{1, 1, 1}, {5, 7, 3}, {4, 16, 8}, {9, 33, 37}, {3, 0, 2}}) {
    std::vector<float> a(static_cast<std::size_t>(n * k)), b(static_cast<std::size_t>(k * m));
    for (float& x : a) x = static_cast<float>(random.next_normal());
    for (float& x : b) x = static_cast<float>(random.next_normal());
    std::vector<float> out(static_cast<std::size_t>(n * m)), expected(out.size());
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < m; ++j)
        for (int p = 0; p < k; ++p)
          expected[static_cast<std::size_t>(i * m + j)] +=
              a[static_cast<std::size_t>(i * k + p)] * b[static_cast<std::size_t>(p * m + j)];
    multiply(a, b, n, k, m, out);
    EXPECT_EQ(out, expected) << n << " " << k << " " << m;
  }
  std::vector<float> small(3);
  EXPECT_THROW(multiply(small, small, 2, 2, 2, small), InternalError);
}

TEST(Linalg, EigenvectorsAreSortedAndSigned) {
  const std::vector<double> a = {2, -1, -1, 2};  // eigenvalues 3 along (1,-1), 1 along (1,1)
  std::vector<double> values, vectors;
  symmetric_eigen(a, 2, values, vectors);
  EXPECT_NEAR(values[0], 3, 1e-15);
  EXPECT_NEAR(values[1], 1, 1e-15);
  for (std::size_t column = 0; column < 2; ++column)
    EXPECT_GT(std::abs(vectors[column]) >= std::abs(vectors[2 + column]) ? vectors[column]
                                                                         : vectors[2 + column],
              0);
  EXPECT_NEAR(vectors[0] * vectors[2], -0.5, 1e-15);
}

}  // namespace
}  // namespace kvplan::quant
