// The device's numbers of the 8-bit norm are those of the codec.

#include "kernels/log_norm.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "quant/transform_codec.h"

namespace kvplan::kernels {
namespace {

TEST(LogNorm, EqualsTheCodecsTables) {
  for (int q = -128; q < 128; ++q) {
    EXPECT_EQ(log8_value(q), quant::log8_values()[static_cast<std::size_t>(q + 128)]) << q;
    if (q == 127) continue;
    const double boundary = quant::log8_boundaries()[static_cast<std::size_t>(q + 128)];
    EXPECT_EQ(log8_of(boundary), q);
    EXPECT_EQ(log8_of(std::nextafter(boundary, 100.0)), q + 1);
  }
  EXPECT_EQ(log8_of(0), -128);
  EXPECT_EQ(log8_of(1e300), 127);
}

}  // namespace
}  // namespace kvplan::kernels
