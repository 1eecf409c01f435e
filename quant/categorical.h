#pragma once
// Draws from a discrete distribution, for which a rounding error of a probability is harmless.

#include <cstddef>
#include <span>

#include "quant/random.h"

namespace kvplan::quant {

/// Index i with probability weights[i] / sum of weights (not negative, any scale), as the race of
/// exponential clocks: E_i / weights[i] is smallest, with E_i ~ Exp(1) of (stream's address, i)
/// alone. So a relative error e of a weight changes the outcome with probability about e, where
/// inverting the distribution function would move every later step. Blocks of indices draw
/// their smallest E first and go on to the next one only while it can still win (order statistics:
/// Renyi, 1953). NaN counts as 0; index 0 when no weight is positive.
std::size_t draw_categorical(std::span<const float> weights, const RandomStream& stream);

}  // namespace kvplan::quant
