#pragma once
// The 8-bit norm 2^(q/32), q = -128..127: the numbers of quant::log8_values and log8_boundaries.

#include <cmath>

#include "kernels/ptx.cuh"

namespace kvplan::kernels {

/// 2^((i + 1/2)/32), i = 0..31.
KVPLAN_DEVICE double log8_fraction(int i) {
  static constexpr double kFractions[32] = {
      0x1.02c9a3e778061p+0, 0x1.0874518759bc8p+0, 0x1.0e3ec32d3d1a2p+0, 0x1.1429aaea92dep+0,
      0x1.1a35beb6fcb75p+0, 0x1.2063b88628cd6p+0, 0x1.26b4565e27cddp+0, 0x1.2d285a6e4030bp+0,
      0x1.33c08b26416ffp+0, 0x1.3a7db34e59ff7p+0, 0x1.4160a21f72e2ap+0, 0x1.486a2b5c13cdp+0,
      0x1.4f9b2769d2ca7p+0, 0x1.56f4736b527dap+0, 0x1.5e76f15ad2148p+0, 0x1.6623882552224p+0,
      0x1.6dfb23c651a2fp+0, 0x1.75feb564267c8p+0, 0x1.7e2f336cf4e62p+0, 0x1.868d99b4492ecp+0,
      0x1.8f1ae99157736p+0, 0x1.97d829fde4e5p+0,  0x1.a0c667b5de565p+0, 0x1.a9e6b5579fdbfp+0,
      0x1.b33a2b84f15fbp+0, 0x1.bcc1e904bc1d2p+0, 0x1.c67f12e57d14bp+0, 0x1.d072d4a07897cp+0,
      0x1.da9e603db3286p+0, 0x1.e502ee78b3ff6p+0, 0x1.efa1bee615a28p+0, 0x1.fa7c1819e90d8p+0};
  return kFractions[i];
}

/// 2^(q/32).
KVPLAN_DEVICE float log8_value(int q) {
  static constexpr float kFractions[32] = {
      0x1p+0f,        0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f,
      0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9ep+0f,  0x1.306fep+0f,  0x1.371a74p+0f,
      0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f,
      0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f,
      0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f,
      0x1.b7f77p+0f,  0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
      0x1.ea4afap+0f, 0x1.f50766p+0f};
  return std::ldexp(kFractions[q & 31], q >> 5);
}

/// The q nearest to 32 log2(norm), on a boundary the lower, within -128..127.
KVPLAN_DEVICE int log8_of(double norm) {
  constexpr double kSmallest = 0x1p-5, kLargest = 0x1p4;  // q outside
  if (!(norm > kSmallest)) return -128;
  if (norm > kLargest) return 127;
  int exponent = 0;
  const double mantissa = 2 * std::frexp(norm, &exponent);
  // How many of the fractions are below the mantissa: within 1 of its logarithm, rounded.
  int below = static_cast<int>(32 * std::log2(static_cast<float>(mantissa)) + 0.5f);
  if (below > 0 && !(log8_fraction(below - 1) < mantissa))
    --below;
  else if (below < 32 && log8_fraction(below) < mantissa)
    ++below;
  const int q = 32 * (exponent - 1) + below;
  return q < -128 ? -128 : q > 127 ? 127 : q;
}

}  // namespace kvplan::kernels
