#pragma once
// The linear packed form: codes of 1..8 bits, lowest bit first, little endian; fp16 values.

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvplan::quant {

/// Appends bit fields to a zeroed byte buffer. Bit i of the stream is bit i%8 of byte i/8.
class BitWriter {
 public:
  explicit BitWriter(std::span<std::byte> bytes) : bytes_(bytes) {}
  /// Low `bits` (0..16) of value.
  void put(std::uint32_t value, int bits);
  std::size_t bit_position() const { return position_; }
  void align_to_byte() { position_ = (position_ + 7) / 8 * 8; }

 private:
  std::span<std::byte> bytes_;
  std::size_t position_ = 0;
};

class BitReader {
 public:
  explicit BitReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  std::uint32_t get(int bits);
  void align_to_byte() { position_ = (position_ + 7) / 8 * 8; }

 private:
  std::span<const std::byte> bytes_;
  std::size_t position_ = 0;
};

/// IEEE binary16 and bfloat16, round to nearest even; overflow goes to infinity.
std::uint16_t to_half(float x);
float from_half(std::uint16_t h);
std::uint16_t to_bfloat16(float x);
float from_bfloat16(std::uint16_t h);
/// x rounded to fp16 and back.
float round_to_half(float x);

}  // namespace kvplan::quant
