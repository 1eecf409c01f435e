#pragma once
// The integer code of demonstrations and weight scans: one scale for a whole tensor, set by its
// largest value.

#include <span>
#include <vector>

namespace kvplan::studies {

double absmax(std::span<const float> x);

/// largest / steps * round(steps * x / largest), halves away from zero; 2 * steps + 1 levels.
double absmax_level(double x, double largest, double steps);

/// Every value of a tensor with the tensor's own absmax.
std::vector<float> absmax_round_trip(std::span<const float> x, double steps);

}  // namespace kvplan::studies
