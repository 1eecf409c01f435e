#pragma once
// Random rotations from a seed: Haar-distributed and (signed) Hadamard.

#include <cstdint>
#include <vector>

#include "schemas/plan.h"

namespace kvplan::quant {

/// Haar-distributed orthogonal d x d matrix, row-major: QR of a Gaussian matrix with the signs of
/// R's diagonal moved into Q (Mezzadri 2007, "How to generate random matrices from the classical
/// compact groups"). `key` a,b,c as in RandomStream.
std::vector<double> haar_rotation(int d, std::uint64_t seed, std::uint32_t layer,
                                  std::uint32_t head_side, std::uint32_t width, bool mixing);

/// Normalised Sylvester Hadamard matrix times `rounds` random diagonal sign matrices (kind
/// "signed_hadamard"), or without signs ("hadamard"). d must be a power of two: ArgumentError
/// otherwise.
std::vector<double> hadamard_rotation(int d, bool random_signs, int rounds, std::uint64_t seed,
                                      std::uint32_t layer, std::uint32_t head_side);

/// The d x d matrix of a plan's rotation for one layer, KV head and side (all 0 when scope is
/// "model"). Hadamard on a d that is no power of two takes Haar (quantization.md section 3); "none"
/// gives the identity.
std::vector<double> rotation_matrix(const RotationSpec& spec, int d, int layer, int head,
                                    Side side);

}  // namespace kvplan::quant
