#pragma once
// The linear packed form: bit fields, lowest bit first, little endian; fp16 values.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvplan::quant {

/// Writes bit fields into a zeroed byte buffer. Bit i of the stream is bit i%8 of byte i/8.
class BitWriter {
 public:
  explicit BitWriter(std::span<std::byte> bytes) : bytes_(bytes) {}
  /// Low `bits` (0..64) of value. ArgumentError past the end of the buffer.
  void put(std::uint64_t value, int bits);
  std::size_t bit_position() const { return position_; }
  void align_to_byte() { position_ = (position_ + 7) / 8 * 8; }

 private:
  std::span<std::byte> bytes_;
  std::size_t position_ = 0;
};

class BitReader {
 public:
  explicit BitReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  /// The next `bits` (0..64). ArgumentError past the end of the buffer.
  std::uint64_t get(int bits);
  std::size_t bit_position() const { return position_; }
  void align_to_byte() { position_ = (position_ + 7) / 8 * 8; }

 private:
  std::span<const std::byte> bytes_;
  std::size_t position_ = 0;
};

inline constexpr float kHalfMax = 65504;

/// IEEE binary16 and bfloat16, round to nearest even; overflow goes to infinity, NaN stays NaN.
std::uint16_t to_half(float x);
float from_half(std::uint16_t h);
std::uint16_t to_bfloat16(float x);
float from_bfloat16(std::uint16_t h);

/// x rounded to fp16 and back. Inline and free of branches, so that loops over it vectorise.
inline float round_to_half(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits & 0x80000000, magnitude = bits ^ sign;
  // Normal halves keep 10 fraction bits; below 2^-14, adding 1/2 leaves multiples of 2^-24.
  const std::uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1)) & ~std::uint32_t{0x1fff};
  const auto small = std::bit_cast<std::uint32_t>((std::bit_cast<float>(magnitude) + 0.5f) - 0.5f);
  const std::uint32_t finite = magnitude < 0x38800000 ? small : normal;
  const std::uint32_t bounded = finite > 0x477fe000 ? 0x7f800000 : finite;
  return std::bit_cast<float>(sign | (magnitude > 0x7f800000 ? magnitude : bounded));
}

}  // namespace kvplan::quant
