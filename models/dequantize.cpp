#include "models/dequantize.h"

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>

#include "schemas/error.h"

// Block layouts: ggml/src/ggml-common.h of llama.cpp. Every product and sum is rounded to float32
// on its own, as there.
namespace kvplan::models {
namespace {

using Bytes = const std::uint8_t*;

std::uint32_t load16(Bytes p) { return static_cast<std::uint32_t>(p[0] | p[1] << 8); }

/// fp16 to float without branches or calls, so that the loops around it vectorise. 2^112 rebiases
/// the exponent (127 - 15) and makes subnormals normal.
float load_half(Bytes p) {
  const std::uint32_t half = load16(p);
  const std::uint32_t magnitude = half & 0x7fff;
  const std::uint32_t scaled =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  const std::uint32_t special = magnitude << 13 | 0x7f800000;  // Inf, NaN with its payload
  return std::bit_cast<float>((half & 0x8000) << 16 | (magnitude < 0x7c00 ? scaled : special));
}

float load_bf16(Bytes p) { return std::bit_cast<float>(load16(p) << 16); }

float load_f32(Bytes p) {
  float value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

/// 16 bytes of nibbles: the low ones are elements 0..15, the high ones 16..31; `value(nibble, i)`
/// of element i.
template <class Value>
void nibbles(Bytes packed, float* out, Value value) {
  for (int i = 0; i < 16; ++i) out[i] = value(packed[i] & 15, i);
  for (int i = 0; i < 16; ++i) out[16 + i] = value(packed[i] >> 4, 16 + i);
}

/// fp16 scale, 16 bytes of nibbles.
void decode_q4_0(Bytes block, float* out) {
  const float d = load_half(block);
  nibbles(block + 2, out, [d](int q, int) { return d * static_cast<float>(q - 8); });
}

/// fp16 scale and minimum, nibbles.
void decode_q4_1(Bytes block, float* out) {
  const float d = load_half(block), m = load_half(block + 2);
  nibbles(block + 4, out, [d, m](int q, int) { return d * static_cast<float>(q) + m; });
}

/// Bit i of a little-endian 32-bit mask, as the fifth bit of a code.
int fifth_bit(std::uint32_t mask, int i) { return static_cast<int>(mask >> i & 1) << 4; }

/// fp16 scale, 32 fifth bits, nibbles.
void decode_q5_0(Bytes block, float* out) {
  const float d = load_half(block);
  const std::uint32_t high = load16(block + 2) | load16(block + 4) << 16;
  nibbles(block + 6, out, [d, high](int q, int i) {
    return d * static_cast<float>((q | fifth_bit(high, i)) - 16);
  });
}

/// fp16 scale and minimum, 32 fifth bits, nibbles.
void decode_q5_1(Bytes block, float* out) {
  const float d = load_half(block), m = load_half(block + 2);
  const std::uint32_t high = load16(block + 4) | load16(block + 6) << 16;
  nibbles(block + 8, out, [d, m, high](int q, int i) {
    return d * static_cast<float>(q | fifth_bit(high, i)) + m;
  });
}

/// fp16 scale, 32 signed bytes.
void decode_q8_0(Bytes block, float* out) {
  const float d = load_half(block);
  for (int i = 0; i < 32; ++i)
    out[i] = static_cast<float>(static_cast<std::int8_t>(block[2 + i])) * d;
}

/// fp16 scale, nibbles that index a non-linear table.
void decode_iq4_nl(Bytes block, float* out) {
  static constexpr std::array<float, 16> kLevels = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                    1,    13,   25,  38,  53,  69,  89,  113};
  const float d = load_half(block);
  nibbles(block + 2, out, [d](int q, int) { return d * kLevels[static_cast<std::size_t>(q)]; });
}

/// 16 bytes (4-bit scale, 4-bit minimum) of 16 elements each, 64 bytes of 2-bit codes, fp16 scale
/// of scales and of minima. Codes: byte g*32 + l holds elements g*128 + s*32 + l at bits 2s.
void decode_q2_k(Bytes block, float* out) {
  const Bytes scales = block, codes = block + 16;
  const float d = load_half(block + 80), d_min = load_half(block + 82);
  for (int i = 0; i < 16; ++i) {
    const float scale = d * static_cast<float>(scales[i] & 15);
    const float minimum = d_min * static_cast<float>(scales[i] >> 4);
    const Bytes part = codes + i / 8 * 32 + i % 2 * 16;
    const int shift = i / 2 % 4 * 2;
    for (int l = 0; l < 16; ++l) {
      out[i * 16 + l] = scale * static_cast<float>(part[l] >> shift & 3) - minimum;
    }
  }
}

/// 32 bytes of third bits (bit i/2 of byte l; a clear bit subtracts 4), 64 bytes of 2-bit codes as
/// in Q2_K, 16 signed 6-bit scales in 12 bytes, fp16 scale of scales.
void decode_q3_k(Bytes block, float* out) {
  const Bytes high = block, codes = block + 32, scales = block + 96;
  const float d = load_half(block + 108);
  for (int i = 0; i < 16; ++i) {
    const int low_bits = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
    const int high_bits = scales[8 + i % 4] >> i / 4 * 2 & 3;
    const float scale = d * static_cast<float>((low_bits | high_bits << 4) - 32);
    const Bytes part = codes + i / 8 * 32 + i % 2 * 16;
    const Bytes high_part = high + i % 2 * 16;
    const int shift = i / 2 % 4 * 2;
    for (int l = 0; l < 16; ++l) {
      const int q = (part[l] >> shift & 3) - (high_part[l] >> i / 2 & 1 ? 0 : 4);
      out[i * 16 + l] = scale * static_cast<float>(q);
    }
  }
}

struct ScaleMin {
  int scale, minimum;
};

/// The i-th of eight 6-bit scales and minima in 12 bytes (Q4_K, Q5_K): bytes 0..3 and 4..7 hold the
/// first four, bytes 8..11 the low four bits of the others, whose top bits lie in bits 6 and 7 of
/// bytes 0..7.
ScaleMin scale_min(Bytes packed, int i) {
  if (i < 4) return {packed[i] & 63, packed[4 + i] & 63};
  const int j = i - 4;
  return {(packed[8 + j] & 15) | (packed[j] >> 2 & 48),
          packed[8 + j] >> 4 | (packed[4 + j] >> 2 & 48)};
}

/// fp16 scale of scales and of minima, 12 bytes of scales, 128 bytes of nibbles: byte g*32 + l
/// holds elements g*64 + s*32 + l at bits 4s.
void decode_q4_k(Bytes block, float* out) {
  const float d = load_half(block), d_min = load_half(block + 2);
  for (int i = 0; i < 8; ++i) {
    const auto [scale, minimum] = scale_min(block + 4, i);
    const float dl = d * static_cast<float>(scale), ml = d_min * static_cast<float>(minimum);
    const Bytes part = block + 16 + i / 2 * 32;
    const int shift = i % 2 * 4;
    for (int l = 0; l < 32; ++l)
      out[i * 32 + l] = dl * static_cast<float>(part[l] >> shift & 15) - ml;
  }
}

/// As Q4_K with 32 bytes of fifth bits (bit i of byte l) before the nibbles.
void decode_q5_k(Bytes block, float* out) {
  const float d = load_half(block), d_min = load_half(block + 2);
  const Bytes high = block + 16;
  for (int i = 0; i < 8; ++i) {
    const auto [scale, minimum] = scale_min(block + 4, i);
    const float dl = d * static_cast<float>(scale), ml = d_min * static_cast<float>(minimum);
    const Bytes part = block + 48 + i / 2 * 32;
    const int shift = i % 2 * 4;
    for (int l = 0; l < 32; ++l) {
      const int q = (part[l] >> shift & 15) | (high[l] >> i & 1) << 4;
      out[i * 32 + l] = dl * static_cast<float>(q) - ml;
    }
  }
}

/// 128 bytes of low nibbles (byte g*64 + m: elements g*128 + s*64 + m at bits 4s), 64 bytes of high
/// bit pairs (byte g*32 + l: elements g*128 + t*32 + l at bits 2t), 16 signed 8-bit scales, fp16
/// scale of scales.
void decode_q6_k(Bytes block, float* out) {
  const Bytes low = block, high = block + 128, scales = block + 192;
  const float d = load_half(block + 208);
  for (int i = 0; i < 16; ++i) {
    const float scale = d * static_cast<float>(static_cast<std::int8_t>(scales[i]));
    const Bytes low_part = low + i / 8 * 64 + i % 4 * 16;
    const Bytes high_part = high + i / 8 * 32 + i % 2 * 16;
    const int low_shift = i / 4 % 2 * 4, high_shift = i / 2 % 4 * 2;
    for (int l = 0; l < 16; ++l) {
      const int q = (low_part[l] >> low_shift & 15) | (high_part[l] >> high_shift & 3) << 4;
      out[i * 16 + l] = scale * static_cast<float>(q - 32);
    }
  }
}

template <std::size_t BlockBytes, std::size_t Elements, class Decode>
void each_block(Bytes data, std::span<float> out, Decode decode) {
  for (std::size_t i = 0; i < out.size() / Elements; ++i) {
    decode(data + i * BlockBytes, out.data() + i * Elements);
  }
}

}  // namespace

void dequantize(GgmlType type, std::span<const std::byte> data, std::span<float> out) {
  const auto block = ggml_block(static_cast<std::uint32_t>(type));
  const auto elements = block ? static_cast<std::size_t>(block->elements) : 1;
  if (!block || out.size() % elements != 0 ||
      data.size() != out.size() / elements * static_cast<std::size_t>(block->bytes)) {
    throw ArgumentError("cannot convert " + std::to_string(data.size()) + " bytes of " +
                        (block ? block->name : "an unknown type") + " to " +
                        std::to_string(out.size()) + " floats");
  }
  const auto* p = reinterpret_cast<Bytes>(data.data());
  switch (type) {
    case GgmlType::kF32:
      return each_block<4, 1>(p, out, [](Bytes b, float* o) { *o = load_f32(b); });
    case GgmlType::kF16:
      return each_block<2, 1>(p, out, [](Bytes b, float* o) { *o = load_half(b); });
    case GgmlType::kBF16:
      return each_block<2, 1>(p, out, [](Bytes b, float* o) { *o = load_bf16(b); });
    case GgmlType::kQ4_0:
      return each_block<18, 32>(p, out, decode_q4_0);
    case GgmlType::kQ4_1:
      return each_block<20, 32>(p, out, decode_q4_1);
    case GgmlType::kQ5_0:
      return each_block<22, 32>(p, out, decode_q5_0);
    case GgmlType::kQ5_1:
      return each_block<24, 32>(p, out, decode_q5_1);
    case GgmlType::kQ8_0:
      return each_block<34, 32>(p, out, decode_q8_0);
    case GgmlType::kQ2_K:
      return each_block<84, 256>(p, out, decode_q2_k);
    case GgmlType::kQ3_K:
      return each_block<110, 256>(p, out, decode_q3_k);
    case GgmlType::kQ4_K:
      return each_block<144, 256>(p, out, decode_q4_k);
    case GgmlType::kQ5_K:
      return each_block<176, 256>(p, out, decode_q5_k);
    case GgmlType::kQ6_K:
      return each_block<210, 256>(p, out, decode_q6_k);
    case GgmlType::kIQ4_NL:
      return each_block<18, 32>(p, out, decode_iq4_nl);
  }
}

std::size_t first_non_finite(std::span<const float> values) {
  const auto is_special = [](float v) {
    return (std::bit_cast<std::uint32_t>(v) & 0x7f800000) == 0x7f800000;
  };
  bool any = false;  // one pass without exits vectorises; the search runs only on bad data
  for (const float v : values) any |= is_special(v);
  if (!any) return values.size();
  std::size_t i = 0;
  while (!is_special(values[i])) ++i;
  return i;
}

}  // namespace kvplan::models
