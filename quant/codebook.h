#pragma once
// Scalar codebooks for unit-variance coordinates: Lloyd-Max for the Gaussian and for a rotated unit
// vector, uniform.

#include <span>
#include <string>
#include <vector>

namespace kvplan::quant {

inline constexpr int kMaxCodebookBits = 8;

struct Codebook {
  int bits = 0;
  std::vector<float> levels;      // 2^bits, ascending, symmetric about 0
  std::vector<float> boundaries;  // 2^bits - 1 midpoints; x on a boundary takes the lower index
  double distortion = 1;  // E (X - level)^2 for X of the density it was made for, unit variance
};

/// The decision boundaries that belong to ascending levels.
std::vector<float> midpoints(std::span<const float> levels);

/// Lloyd-Max codebook of N(0,1) for 1..8 bits (Max 1960; Lloyd 1982), converged to 1e-12. Portable
/// to the bit.
Codebook lloyd_max_gaussian(int bits);
/// Lloyd-Max codebook of sqrt(d) times a coordinate of a uniform unit vector in R^d: density ~ (1 -
/// x^2/d)^((d-3)/2). d >= 8.
Codebook lloyd_max_beta(int bits, int d);
/// Uniform levels with the step of least MSE on N(0,1) (2 bits: +-.49785, +-1.49355).
Codebook uniform_gaussian(int bits);
/// "lloyd_max", "lloyd_max_byte" (the same on a grid of bytes, quant/byte_levels.h) or "uniform"
/// (plan.json `codebooks`). Cached; thread-safe. ArgumentError for another name or width.
const Codebook& codebook(const std::string& name, int bits);

/// D_u(b) = D/(1-D), D_u(0) = 1: relative error of a width under the unbiased scale
/// (quantization.md section 4).
double unbiased_distortion(const std::string& name, int bits);

}  // namespace kvplan::quant
