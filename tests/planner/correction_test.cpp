#include "planner/correction.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "schemas/error.h"

namespace kvplan::planner {
namespace {

TEST(Correction, IsTheIdentityWithoutPoints) {
  const CorrectionCurve curve = fit_correction({});
  EXPECT_EQ(curve.measured(.25), .25);
  EXPECT_EQ(curve.predicted(.25), .25);
}

TEST(Correction, RecoversScaleAndCurvature) {
  std::vector<CorrectionPoint> points;
  for (const double p : {.005, .02, .08, .16}) points.push_back({p, 1.1 * p * (1 + 2 * p), p / 50});
  const CorrectionCurve curve = fit_correction(points);
  EXPECT_NEAR(curve.scale, 1.1, 1e-9);
  EXPECT_NEAR(curve.curvature, 2, 1e-8);
  EXPECT_EQ(curve.points, 4);
  EXPECT_EQ(curve.largest_predicted, .16);
  for (const double m : {0.0, .01, .3}) EXPECT_NEAR(curve.measured(curve.predicted(m)), m, 1e-12);
}

TEST(Correction, OnePointGivesAScale) {
  const CorrectionPoint one[] = {{.1, .13, .01}};
  const CorrectionCurve curve = fit_correction(one);
  EXPECT_NEAR(curve.scale, 1.3, 1e-12);
  EXPECT_EQ(curve.curvature, 0);
}

TEST(Correction, NeverBendsDown) {
  const CorrectionPoint points[] = {{.01, .015, 0}, {.1, .1, 0}};
  const CorrectionCurve curve = fit_correction(points);
  EXPECT_EQ(curve.curvature, 0);
  EXPECT_GT(curve.scale, 1);
}

TEST(Correction, NoisyPointsCountLess) {
  const CorrectionPoint points[] = {{.01, .011, .0001}, {.01, .02, .02}};
  EXPECT_NEAR(fit_correction(points).scale, 1.1, .01);
}

TEST(Correction, RefusesImpossibleFigures) {
  for (const CorrectionPoint bad :
       {CorrectionPoint{0, 1, 0}, CorrectionPoint{1, -1, 0}, CorrectionPoint{1, 1, -1},
        CorrectionPoint{1, std::numeric_limits<double>::infinity(), 0}}) {
    EXPECT_THROW(fit_correction({&bad, 1}), ArgumentError);
  }
}

}  // namespace
}  // namespace kvplan::planner
