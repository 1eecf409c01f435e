#include "quant/trellis.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "quant/codebook.h"
#include "quant/packing.h"
#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

std::vector<TrellisStep> steps_of(const std::vector<int>& widths) {
  std::vector<TrellisStep> steps;
  for (const int width : widths) steps.push_back({width, trellis_table(width).values.data(), 1});
  return steps;
}

/// Widths 4 3 2 1, a quarter of the coordinates each.
std::vector<int> mixed_widths(int size) {
  std::vector<int> widths;
  for (int i = 0; i < size; ++i) widths.push_back(4 - 4 * i / size);
  return widths;
}

std::vector<float> normal_values(std::size_t count, std::uint64_t seed) {
  RandomStream random(seed, StreamPurpose::kTest);
  std::vector<float> x(count);
  for (float& value : x) value = static_cast<float>(random.next_normal());
  return x;
}

std::vector<std::uint8_t> encode(const Trellis& trellis, std::span<const float> x) {
  std::vector<std::uint8_t> states(x.size());
  trellis.encode(x, states);
  return states;
}

double weighted_error(const Trellis& trellis, std::span<const float> x,
                      std::span<const std::uint8_t> states) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const TrellisStep& step = trellis.steps()[i];
    sum += double{step.weight} * std::pow(double{x[i]} - double{step.values[states[i]]}, 2);
  }
  return sum;
}

/// Least error of all code words whose last state is `joint`, state by state in double.
double least_error(const Trellis& trellis, std::span<const float> x, int joint) {
  std::vector<double> costs(kTrellisStates, std::numeric_limits<double>::infinity());
  costs[static_cast<std::size_t>(joint)] = 0;
  for (std::size_t i = x.size(); i-- > 0;) {
    const TrellisStep& step = trellis.steps()[i];
    std::vector<double> next(kTrellisStates, std::numeric_limits<double>::infinity());
    for (int s = 0; s < kTrellisStates; ++s)
      for (int code = 0; code < 1 << step.width; ++code) {
        const auto to = static_cast<std::size_t>((s << step.width | code) % kTrellisStates);
        const double error = double{x[i]} - double{step.values[to]};
        next[to] =
            std::min(next[to], costs[static_cast<std::size_t>(s)] + step.weight * error * error);
      }
    costs = next;
  }
  return costs[static_cast<std::size_t>(joint)];
}

struct Bound {
  int width;
  double distortion;  // quantization.md section 7; 1 bit: half way from Lloyd-Max to the
                      // rate-distortion bound
};
constexpr Bound kBounds[] = {{1, 0.31}, {2, 0.083}, {3, 0.0220}, {4, 0.0065}};

TEST(TrellisTable, MeetsItsBoundsAndIsWhatWasMeasured) {
  constexpr std::size_t kLength = 128, kVectors = 600;
  for (const auto& [width, bound] : kBounds) {
    SCOPED_TRACE(width);
    const TrellisTable& table = trellis_table(width);
    EXPECT_EQ(table.width, width);
    EXPECT_LT(table.distortion, bound);
    EXPECT_LT(table.distortion, 0.82 * codebook("lloyd_max", width).distortion);
    EXPECT_GT(table.distortion, std::exp2(-2 * width)) << "the rate-distortion bound";
    for (const float value : table.values) EXPECT_EQ(value, round_to_half(value));

    const Trellis trellis(steps_of(std::vector<int>(kLength, width)));
    double sum = 0, sum_squares = 0;
    for (std::size_t v = 0; v < kVectors; ++v) {
      const auto x = normal_values(kLength, v);
      const double error = weighted_error(trellis, x, encode(trellis, x)) / kLength;
      sum += error;
      sum_squares += error * error;
    }
    const double mean = sum / kVectors;
    const double standard_error = std::sqrt((sum_squares / kVectors - mean * mean) / kVectors);
    EXPECT_NEAR(mean, table.distortion, 4 * std::hypot(standard_error, table.distortion_error));
    EXPECT_LT(table.distortion_error, standard_error);
  }
}

TEST(TrellisTable, RefusesOtherWidths) {
  for (const int width : {-1, 0, 5}) {
    EXPECT_THROW(trellis_table(width), ArgumentError);
    EXPECT_THROW(trellis_distortion(width), ArgumentError);
  }
}

TEST(Trellis, StatesAreEightBitsInARowOfACircle) {
  for (const int size : {32, 33, 64, 100}) {
    const std::vector<int> widths = mixed_widths(size);
    const Trellis trellis(steps_of(widths));
    const auto states = encode(trellis, normal_values(static_cast<std::size_t>(size), 1));
    for (std::size_t i = 0; i < states.size(); ++i) {
      const int before = states[(i + 1) % states.size()];
      EXPECT_EQ(states[i] >> widths[i], before & (0xff >> widths[i])) << i << " of " << size;
    }
  }
}

TEST(Trellis, FindsTheBestWordOfItsJointAndNearlyTheBestOfAll) {
  constexpr std::size_t kLength = 32;
  for (const std::vector<int>& widths :
       {mixed_widths(kLength), std::vector<int>(kLength, 1), std::vector<int>(kLength, 3)}) {
    auto steps = steps_of(widths);
    for (std::size_t i = 0; i < kLength; ++i) steps[i].weight = i < 16 ? 1.0f : 0.25f;
    const Trellis trellis(steps);
    double found = 0, best = 0;
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      const auto x = normal_values(kLength, seed);
      const auto states = encode(trellis, x);
      const double error = weighted_error(trellis, x, states);
      EXPECT_NEAR(error, least_error(trellis, x, states[0]), 1e-5 * error);
      found += error;
      double least = error;
      for (int joint = 0; joint < kTrellisStates; joint += seed == 0 ? 1 : 16)
        least = std::min(least, least_error(trellis, x, joint));
      best += least;
    }
    EXPECT_LE(found, 1.1 * best) << widths.front() << " bits first";
  }
}

TEST(Trellis, SpendsErrorWhereTheWeightIsSmall) {
  constexpr std::size_t kLength = 64;
  const Trellis even(steps_of(std::vector<int>(kLength, 2)));
  auto steps = even.steps();
  for (std::size_t i = 0; i < kLength / 2; ++i) steps[2 * i].weight = 0.01f;
  const Trellis odd(steps);
  double even_error = 0, odd_error = 0;  // of the odd coordinates
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const auto x = normal_values(kLength, seed);
    const auto even_states = encode(even, x), odd_states = encode(odd, x);
    for (std::size_t i = 1; i < kLength; i += 2) {
      even_error += std::pow(x[i] - steps[i].values[even_states[i]], 2);
      odd_error += std::pow(x[i] - steps[i].values[odd_states[i]], 2);
    }
  }
  EXPECT_LT(odd_error, 0.7 * even_error);
}

TEST(Trellis, WithoutWeightsAnyWordWillDoAndTiesGoToTheLowerState) {
  auto steps = steps_of(std::vector<int>(40, 2));
  for (TrellisStep& step : steps) step.weight = 0;
  EXPECT_EQ(encode(Trellis(steps), normal_values(40, 1)), std::vector<std::uint8_t>(40, 0));
}

TEST(Trellis, UsedFromThirtyTwoCoordinatesOn) {
  EXPECT_TRUE(uses_trellis(std::vector<int>{6, 4, 3, 0}, 16));
  EXPECT_FALSE(uses_trellis(std::vector<int>{6, 5, 3, 0}, 16));
  EXPECT_TRUE(uses_trellis(std::vector<int>{5, 4, 3, 2, 1, 0, 0, 0}, 8));
  EXPECT_FALSE(uses_trellis(std::vector<int>{5, 4, 3, 2, 0, 0, 0, 0}, 8));
  EXPECT_FALSE(uses_trellis(std::vector<int>{16, 16}, 32));
}

TEST(Trellis, RefusesWhatIsNone) {
  EXPECT_THROW(Trellis(steps_of(std::vector<int>(31, 2))), ArgumentError);
  auto steps = steps_of(std::vector<int>(32, 2));
  steps[7].width = 5;
  EXPECT_THROW(Trellis{steps}, ArgumentError);
  steps[7].width = 0;
  EXPECT_THROW(Trellis{steps}, ArgumentError);
  const Trellis trellis(steps_of(std::vector<int>(32, 2)));
  std::vector<std::uint8_t> states(32);
  EXPECT_THROW(trellis.encode(normal_values(31, 1), states), ArgumentError);
  states.pop_back();
  EXPECT_THROW(trellis.encode(normal_values(32, 1), states), ArgumentError);
}

}  // namespace
}  // namespace kvplan::quant
