#include "quant/packing.h"

#include <algorithm>
#include <bit>
#include <string>

#include "schemas/error.h"

namespace kvplan::quant {
namespace {

void require_room(std::size_t size_bytes, std::size_t position, int bits, int max_bits) {
  if (bits < 0 || bits > max_bits)
    throw ArgumentError("a bit field has 0 to " + std::to_string(max_bits) + " bits, got " +
                        std::to_string(bits));
  if (position + static_cast<std::size_t>(bits) > 8 * size_bytes)
    throw ArgumentError("a field of " + std::to_string(bits) + " bits at bit " +
                        std::to_string(position) + " passes the end of a buffer of " +
                        std::to_string(size_bytes) + " bytes");
}

}  // namespace

void BitWriter::put(std::uint64_t value, int bits) {
  require_room(bytes_.size(), position_, bits, 64);
  while (bits > 0) {
    const int offset = static_cast<int>(position_ % 8);
    const int part = std::min(8 - offset, bits);
    const auto field = static_cast<unsigned>(value & ((1u << part) - 1));
    bytes_[position_ / 8] |= static_cast<std::byte>(field << offset);
    value >>= part;
    bits -= part;
    position_ += static_cast<std::size_t>(part);
  }
}

std::uint64_t BitReader::get(int bits) {
  require_room(bytes_.size(), position_, bits, 64);
  std::uint64_t value = 0;
  for (int done = 0; done < bits;) {
    const int offset = static_cast<int>(position_ % 8);
    const int part = std::min(8 - offset, bits - done);
    const auto byte = std::to_integer<std::uint64_t>(bytes_[position_ / 8]);
    value |= (byte >> offset & ((1u << part) - 1)) << done;
    done += part;
    position_ += static_cast<std::size_t>(part);
  }
  return value;
}

std::uint16_t to_half(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);
  const auto rounded = std::bit_cast<std::uint32_t>(round_to_half(std::bit_cast<float>(magnitude)));
  if (rounded == 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7c00);
  if (rounded >= 0x38800000)  // 2^-14, the smallest normal
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000) >> 13));
  return static_cast<std::uint16_t>(
      sign | static_cast<std::uint32_t>(std::bit_cast<float>(rounded) * 0x1p24f));
}

float from_half(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16;
  const std::uint32_t exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const std::uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | biased << 23 | fraction << 13);
}

std::uint16_t to_bfloat16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(std::uint16_t h) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(h) << 16);
}

}  // namespace kvplan::quant
