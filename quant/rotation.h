#pragma once
// Random matrices from a seed: rotations (Haar-distributed, Hadamard) and the rows of sign
// sketches.

#include <cstdint>
#include <vector>

#include "quant/random.h"
#include "schemas/plan.h"

namespace kvplan::quant {

/// Haar-distributed orthogonal d x d matrix, row-major, from the stream's next d*d normals: QR of a
/// Gaussian matrix with the signs of R's diagonal moved into Q (Mezzadri 2007, "How to generate
/// random matrices from the classical compact groups").
std::vector<double> haar_matrix(int d, RandomStream& random);

/// The same from the stream (seed, rotation or mixing, layer, head_side, width).
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

/// One number for a KV head and side, in the addresses of random streams.
std::uint32_t head_side_key(int head, Side side);

/// Rows S [sketch_rows, d] of a plan's sign sketch, row-major, E|row|^2 = d, of the rotation's seed
/// and scope: normals, signs, or independent Haar matrices times sqrt(d), the last one cut.
std::vector<double> sketch_matrix(const RotatedVariant& variant, const RotationSpec& spec, int d,
                                  int layer, int head, Side side);

}  // namespace kvplan::quant
