#include "quant/rotation.h"

#include <bit>
#include <cmath>
#include <string>

#include "quant/linalg.h"
#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

// Modified Gram-Schmidt on the columns of a row-major d x d matrix. The diagonal of R is positive
// by construction.
KVPLAN_VECTOR_CLONES void orthonormalise_columns(double* a, int d, double* projection) {
  for (int i = 0; i < d; ++i) {
    double square = 0;
    for (int row = 0; row < d; ++row) square += a[row * d + i] * a[row * d + i];
    const double norm = std::sqrt(square);
    for (int j = i + 1; j < d; ++j) projection[j] = 0;
    for (int row = 0; row < d; ++row) {
      const double q = a[row * d + i] /= norm;
      for (int j = i + 1; j < d; ++j) projection[j] += q * a[row * d + j];
    }
    for (int row = 0; row < d; ++row) {
      const double q = a[row * d + i];
      for (int j = i + 1; j < d; ++j) a[row * d + j] -= q * projection[j];
    }
  }
}

void require_dimension(int d) {
  if (d < 1)
    throw ArgumentError("a rotation needs a dimension of at least 1, got " + std::to_string(d));
}

}  // namespace

std::uint32_t head_side_key(int head, Side side) {
  return 2 * static_cast<std::uint32_t>(head) + static_cast<std::uint32_t>(side);
}

std::vector<double> haar_matrix(int d, RandomStream& random) {
  require_dimension(d);
  std::vector<double> q(static_cast<std::size_t>(d) * static_cast<std::size_t>(d));
  for (double& x : q) x = random.next_normal();
  // A second pass removes the departure from orthogonality that an ill-conditioned draw leaves
  // after the first.
  std::vector<double> projection(static_cast<std::size_t>(d));
  for (int pass = 0; pass < 2; ++pass) orthonormalise_columns(q.data(), d, projection.data());
  return q;
}

std::vector<double> haar_rotation(int d, std::uint64_t seed, std::uint32_t layer,
                                  std::uint32_t head_side, std::uint32_t width, bool mixing) {
  RandomStream random(seed, mixing ? StreamPurpose::kMixing : StreamPurpose::kRotation, layer,
                      head_side, width);
  return haar_matrix(d, random);
}

std::vector<double> hadamard_rotation(int d, bool random_signs, int rounds, std::uint64_t seed,
                                      std::uint32_t layer, std::uint32_t head_side) {
  require_dimension(d);
  if (!std::has_single_bit(static_cast<unsigned>(d)))
    throw ArgumentError("a Hadamard rotation needs a power of two as dimension, got " +
                        std::to_string(d) + "; use a Haar rotation instead");
  if (rounds < 1)
    throw ArgumentError("a Hadamard rotation needs at least 1 round, got " +
                        std::to_string(rounds));
  const auto size = static_cast<std::size_t>(d);
  std::vector<double> matrix(size * size);
  for (std::size_t i = 0; i < size; ++i) matrix[i * size + i] = 1;
  RandomStream random(seed, StreamPurpose::kRotation, layer, head_side);
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  // Without signs a second round would undo the first.
  for (int round = 0; round < (random_signs ? rounds : 1); ++round) {
    for (std::size_t row = 0; random_signs && row < size; ++row)
      if (random.next_u32() >> 31)
        for (std::size_t col = 0; col < size; ++col) matrix[row * size + col] *= -1;
    for (std::size_t half = 1; half < size; half *= 2)
      for (std::size_t row = 0; row < size; ++row)
        if ((row & half) == 0)
          for (std::size_t col = 0; col < size; ++col) {
            double& upper = matrix[row * size + col];
            double& lower = matrix[(row + half) * size + col];
            const double sum = upper + lower;
            lower = upper - lower;
            upper = sum;
          }
    for (double& x : matrix) x *= scale;
  }
  return matrix;
}

std::vector<double> rotation_matrix(const RotationSpec& spec, int d, int layer, int head,
                                    Side side) {
  require_dimension(d);
  const bool shared = spec.scope == "model";
  if (!shared && spec.scope != "head")
    throw ArgumentError("unknown rotation scope \"" + spec.scope + "\"; expected model or head");
  const auto layer_key = shared ? 0u : static_cast<std::uint32_t>(layer);
  const auto head_key = shared ? 0u : head_side_key(head, side);
  if (spec.kind == "none" || spec.sides.find(side_name(side)) == std::string::npos) {
    std::vector<double> identity(static_cast<std::size_t>(d) * static_cast<std::size_t>(d));
    for (int i = 0; i < d; ++i) identity[i * d + i] = 1;
    return identity;
  }
  const bool hadamard = spec.kind == "hadamard" || spec.kind == "signed_hadamard";
  if (!hadamard && spec.kind != "haar")
    throw ArgumentError("unknown rotation kind \"" + spec.kind +
                        "\"; expected none, hadamard, signed_hadamard or haar");
  if (hadamard && std::has_single_bit(static_cast<unsigned>(d)))
    return hadamard_rotation(d, spec.kind == "signed_hadamard", spec.rounds, spec.seed, layer_key,
                             head_key);
  return haar_rotation(d, spec.seed, layer_key, head_key, 0, false);
}

std::vector<double> sketch_matrix(const RotatedVariant& variant, const RotationSpec& spec, int d,
                                  int layer, int head, Side side) {
  require_dimension(d);
  const bool shared = spec.scope == "model";
  RandomStream random(spec.seed, StreamPurpose::kSketch,
                      shared ? 0u : static_cast<std::uint32_t>(layer),
                      shared ? 0u : head_side_key(head, side));
  const std::size_t size =
      static_cast<std::size_t>(variant.sketch_rows) * static_cast<std::size_t>(d);
  std::vector<double> rows;
  rows.reserve(size);
  while (rows.size() < size) {
    if (variant.sketch == "gaussian") {
      rows.push_back(random.next_normal());
    } else if (variant.sketch == "rademacher") {
      rows.push_back(random.next_u32() >> 31 ? -1 : 1);
    } else if (variant.sketch == "orthogonal") {
      const double length = std::sqrt(static_cast<double>(d));
      for (const double value : haar_matrix(d, random)) rows.push_back(length * value);
    } else {
      throw ArgumentError("unknown sketch \"" + variant.sketch +
                          "\"; expected gaussian, rademacher or orthogonal");
    }
  }
  rows.resize(size);
  return rows;
}

}  // namespace kvplan::quant
