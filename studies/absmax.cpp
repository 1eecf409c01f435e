#include "studies/absmax.h"

#include <algorithm>
#include <cmath>

namespace kvplan::studies {

double absmax(std::span<const float> x) {
  float largest = 0;
  for (const float value : x) largest = std::max(largest, std::abs(value));
  return largest;
}

double absmax_level(double x, double largest, double steps) {
  return largest > 0 ? largest / steps * std::round(steps * x / largest) : 0;
}

std::vector<float> absmax_round_trip(std::span<const float> x, double steps) {
  const double largest = absmax(x);
  std::vector<float> x_hat;
  x_hat.reserve(x.size());
  for (const float value : x)
    x_hat.push_back(static_cast<float>(absmax_level(value, largest, steps)));
  return x_hat;
}

}  // namespace kvplan::studies
