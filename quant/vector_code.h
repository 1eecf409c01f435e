#pragma once
// Codes of single vectors as whole bytes: scalar after a rotation, polar pairs, absmax integers,
// small floats, a sign sketch. vector_codec.h makes codecs of them. Private to quant.

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "quant/codebook.h"
#include "quant/transform_codec.h"

namespace kvplan::quant {

/// Rows of one vector each, `stride` bytes apart.
template <class Byte>
struct PackedRows {
  Byte* first = nullptr;
  std::size_t stride = 0;
  Byte* row(std::size_t i) const { return first + i * stride; }
  PackedRows skip(std::size_t bytes) const { return {first + bytes, stride}; }
};

/// Immutable, thread-safe. Vectors are [count, size()] row-major.
class VectorCode {
 public:
  explicit VectorCode(std::size_t size) : size_(size) {}
  virtual ~VectorCode() = default;
  std::size_t size() const { return size_; }
  /// Of one vector.
  virtual std::size_t bytes() const = 0;
  /// The bytes written to are 0 before.
  virtual void encode(std::span<const float> x, PackedRows<std::byte> to) const = 0;
  virtual void decode(PackedRows<const std::byte> from, std::span<float> x) const = 0;

 private:
  std::size_t size_;
};

/// Scalar codes of the coordinates of Pi x. Each block of `norm_block` coordinates has an fp16 norm
/// and, if `with_deviation`, the fp16 standard deviation (about the mean) of its coordinates over
/// that norm, which they are divided by. Layout: norms with their deviations, then the codes.
struct ScalarCodeSpec {
  std::size_t size = 0;
  std::vector<float> rotation;  // Pi [size, size]
  Codebook book;                // of width 0: the one level 0
  ScaleRule scale_rule = ScaleRule::kOne;
  std::size_t norm_block = 0;  // divides size
  bool with_deviation = false;
};
std::unique_ptr<VectorCode> make_scalar_code(ScalarCodeSpec spec);

/// Pairs of neighbouring coordinates of Pi x: fp16 radii, then the numbers of the angles' bins,
/// bin k = [k, k+1) 2 pi / 2^bits, read at the bin's centre or lower edge. `size` is even.
/// Source: PolarQuant (Han et al. 2025); the edge is how a published demonstration decodes.
std::unique_ptr<VectorCode> make_polar_code(std::size_t size, std::vector<float> rotation, int bits,
                                            bool centre);

/// Groups of an fp16 scale = absmax / (2^(bits-1) - 1) and codes of `bits` two's complement bits,
/// each group on a byte boundary; the last group takes what is left. 2..8 bits.
std::unique_ptr<VectorCode> make_absmax_code(std::size_t size, int bits, std::size_t group);

/// Values x / scale as "fp8_e4m3" or "fp8_e5m2" (OCP FP8), or in blocks with a scale of their own,
/// "mxfp4" (OCP MX) or "nvfp4" (e4m3 block scale). `scale` is static and positive; mxfp4 has none.
std::unique_ptr<VectorCode> make_float_code(const std::string& format, std::size_t size,
                                            float scale);

/// What a static scale divides the largest magnitude by, so that it just fits.
float largest_float(const std::string& format);

/// Signs of S r and the fp16 norm of r, read as sqrt(pi/2)/rows |r| S^T sign(S r), which is an
/// unbiased estimate of r for Gaussian rows. Layout: norm, then the signs, 1 for S r < 0.
/// rows_matrix: S [rows, size]. Source: Zandieh et al., QJL (2024).
std::unique_ptr<VectorCode> make_sign_sketch(std::size_t size, std::vector<float> rows_matrix);

}  // namespace kvplan::quant
