// The block formats of ggml, to the byte, over a token's whole row of kv_heads x head_dim values.
// Source: ggml/src/ggml-quants.c of llama.cpp, the functions quantize_row_*_ref, which its KV cache
// uses. Blocks are of 32 values; nibble i of the low halves is value i, of the high halves value
// i + 16.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "quant/codec_checks.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr std::size_t kBlock = 32;  // values per fp16 scale
constexpr std::size_t kHalfBlock = kBlock / 2;

float inverse_or_zero(float scale) { return scale != 0 ? 1 / scale : 0; }

/// The value of largest magnitude, the first of equals, with its sign.
float largest_value(const float* x) {
  float largest = 0;
  for (std::size_t i = 0; i < kBlock; ++i)
    if (std::abs(x[i]) > std::abs(largest)) largest = x[i];
  return largest;
}

using Codes = std::array<std::uint8_t, kBlock>;

void store_nibbles(const Codes& codes, std::byte* to) {
  for (std::size_t i = 0; i < kHalfBlock; ++i)
    to[i] = static_cast<std::byte>((codes[i] & 15) | (codes[i + kHalfBlock] & 15) << 4);
}

Codes load_nibbles(const std::byte* from) {
  Codes codes{};
  for (std::size_t i = 0; i < kHalfBlock; ++i) {
    codes[i] = std::to_integer<std::uint8_t>(from[i] & std::byte{15});
    codes[i + kHalfBlock] = std::to_integer<std::uint8_t>(from[i] >> 4);
  }
  return codes;
}

/// 5-bit codes: the fifth bits as one 32-bit word, bit i of value i, then the nibbles.
void store_five_bits(const Codes& codes, std::byte* to) {
  std::uint32_t high = 0;
  for (std::size_t i = 0; i < kBlock; ++i) high |= std::uint32_t{codes[i]} >> 4 << i;
  std::memcpy(to, &high, sizeof high);
  store_nibbles(codes, to + sizeof high);
}

Codes load_five_bits(const std::byte* from) {
  std::uint32_t high = 0;
  std::memcpy(&high, from, sizeof high);
  Codes codes = load_nibbles(from + sizeof high);
  for (std::size_t i = 0; i < kBlock; ++i)
    codes[i] = static_cast<std::uint8_t>(codes[i] | (high >> i & 1) << 4);
  return codes;
}

struct Q8_0 {
  static constexpr std::size_t kBytes = 2 + kBlock;
  static void encode(const float* x, std::byte* to) {
    const float scale = std::abs(largest_value(x)) / 127, inverse = inverse_or_zero(scale);
    store_half(to, scale);
    for (std::size_t i = 0; i < kBlock; ++i)
      to[2 + i] = static_cast<std::byte>(static_cast<std::int8_t>(std::round(x[i] * inverse)));
  }
  static void decode(const std::byte* from, float* x) {
    const float scale = load_half(from);
    for (std::size_t i = 0; i < kBlock; ++i)
      x[i] = static_cast<float>(static_cast<std::int8_t>(from[2 + i])) * scale;
  }
};

template <int Bits>
struct Nibbles {
  static constexpr std::size_t kBytes = kHalfBlock;
  static void store(const Codes& codes, std::byte* to) { store_nibbles(codes, to); }
  static Codes load(const std::byte* from) { return load_nibbles(from); }
};
template <>
struct Nibbles<5> {
  static constexpr std::size_t kBytes = 4 + kHalfBlock;
  static void store(const Codes& codes, std::byte* to) { store_five_bits(codes, to); }
  static Codes load(const std::byte* from) { return load_five_bits(from); }
};

/// Codes 0 .. 2 zero - 1 with levels (code - zero) * scale, where the value of largest magnitude,
/// with its sign, becomes code 0; `scale` is set.
Codes signed_codes(const float* x, int zero, float& scale) {
  scale = largest_value(x) / static_cast<float>(-zero);
  const float inverse = inverse_or_zero(scale), shift = static_cast<float>(zero) + 0.5f;
  Codes codes{};
  for (std::size_t i = 0; i < kBlock; ++i)
    codes[i] =
        static_cast<std::uint8_t>(std::min(2 * zero - 1, static_cast<int>(x[i] * inverse + shift)));
  return codes;
}

/// q4_0, q5_0.
template <int Bits>
struct Symmetric {
  static constexpr std::size_t kBytes = 2 + Nibbles<Bits>::kBytes;
  static constexpr int kZero = 1 << (Bits - 1);
  static void encode(const float* x, std::byte* to) {
    float scale = 0;
    const Codes codes = signed_codes(x, kZero, scale);
    store_half(to, scale);
    Nibbles<Bits>::store(codes, to + 2);
  }
  static void decode(const std::byte* from, float* x) {
    const float scale = load_half(from);
    const Codes codes = Nibbles<Bits>::load(from + 2);
    for (std::size_t i = 0; i < kBlock; ++i) x[i] = static_cast<float>(codes[i] - kZero) * scale;
  }
};

/// q4_1, q5_1: fp16 scale, fp16 minimum.
template <int Bits>
struct Asymmetric {
  static constexpr std::size_t kBytes = 4 + Nibbles<Bits>::kBytes;
  static constexpr int kTop = (1 << Bits) - 1;
  static void encode(const float* x, std::byte* to) {
    const auto [low, high] = std::minmax_element(x, x + kBlock);
    const float minimum = *low, scale = (*high - minimum) / kTop;
    const float inverse = inverse_or_zero(scale);
    store_half(to, scale);
    store_half(to + 2, minimum);
    Codes codes{};
    for (std::size_t i = 0; i < kBlock; ++i)
      codes[i] = static_cast<std::uint8_t>(
          std::min(kTop, static_cast<int>((x[i] - minimum) * inverse + 0.5f)));
    Nibbles<Bits>::store(codes, to + 4);
  }
  static void decode(const std::byte* from, float* x) {
    const float scale = load_half(from), minimum = load_half(from + 2);
    const Codes codes = Nibbles<Bits>::load(from + 4);
    for (std::size_t i = 0; i < kBlock; ++i) x[i] = static_cast<float>(codes[i]) * scale + minimum;
  }
};

/// Sixteen unevenly spaced levels. The scale first maps the largest value to the lowest level; then
/// it is fitted by least squares with weights x^2, the codes staying as they were.
struct Iq4Nl {
  static constexpr std::size_t kBytes = 2 + kHalfBlock;
  static constexpr std::array<float, 16> kLevels = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                    1,    13,   25,  38,  53,  69,  89,  113};
  static constexpr float kSmallest = 1e-15f;  // a block below is stored as 0

  /// Ties go to the higher level.
  static std::uint8_t nearest(float value) {
    const auto above = std::upper_bound(kLevels.begin(), kLevels.end(), value);
    const bool lower = above == kLevels.end() ||
                       (above != kLevels.begin() && value - *(above - 1) < *above - value);
    return static_cast<std::uint8_t>(above - kLevels.begin() - (lower ? 1 : 0));
  }
  static void encode(const float* x, std::byte* to) {
    const float largest = largest_value(x);
    std::fill_n(to, kBytes, std::byte{0});
    if (std::abs(largest) < kSmallest) return;
    const float inverse = 1 / (largest / kLevels.front());
    Codes codes{};
    float product = 0, square = 0;
    for (std::size_t i = 0; i < kBlock; ++i) {
      codes[i] = nearest(inverse * x[i]);
      const float level = kLevels[codes[i]], weight = x[i] * x[i];
      product += weight * level * x[i];
      square += weight * level * level;
    }
    store_half(to, product / square);
    store_nibbles(codes, to + 2);
  }
  static void decode(const std::byte* from, float* x) {
    const float scale = load_half(from);
    const Codes codes = load_nibbles(from + 2);
    for (std::size_t i = 0; i < kBlock; ++i) x[i] = scale * kLevels[codes[i]];
  }
};

/// q6_0 of ik_llama.cpp: as q5_0 with a top level of 31 and two high bits, four of value j and j +
/// 16 in nibble j / 8 of byte j % 8. Source: ggml/src/ggml-quants.c there, quantize_row_q6_0_ref.
struct Q6_0 {
  static constexpr std::size_t kBytes = 2 + 8 + kHalfBlock;
  static constexpr int kZero = 32;
  static void encode(const float* x, std::byte* to) {
    float scale = 0;
    const Codes codes = signed_codes(x, kZero, scale);
    store_half(to, scale);
    std::fill_n(to + 2, 8, std::byte{0});
    for (std::size_t j = 0; j < kHalfBlock; ++j) {
      const int high = codes[j] >> 4 | codes[j + kHalfBlock] >> 4 << 2;
      to[2 + j % 8] |= static_cast<std::byte>(high << 4 * (j / 8));
    }
    store_nibbles(codes, to + 10);
  }
  static void decode(const std::byte* from, float* x) {
    const float scale = load_half(from);
    const Codes low = load_nibbles(from + 10);
    for (std::size_t i = 0; i < kBlock; ++i) {
      const std::size_t j = i % kHalfBlock;
      const int high =
          std::to_integer<int>(from[2 + j % 8]) >> 4 * (j / 8) >> (i < kHalfBlock ? 0 : 2);
      x[i] = static_cast<float>((low[i] | (high & 3) << 4) - kZero) * scale;
    }
  }
};

template <class Format>
class BlockCodec : public Codec {
 public:
  BlockCodec(HeadGeometry geometry, bool exact_input)
      : exact_input_(exact_input),
        geometry_(geometry),
        blocks_per_token_(static_cast<std::size_t>(geometry.kv_heads) *
                          static_cast<std::size_t>(geometry.head_dim) / kBlock) {}

  std::size_t packed_bytes(const KvShape& shape) const override {
    require_shape(geometry_, shape);
    return static_cast<std::size_t>(shape.tokens) * blocks_per_token_ * Format::kBytes;
  }

  void encode(const KvShape& shape, std::int64_t first_position, std::span<const float> x,
              std::span<std::byte> codes) const override {
    require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
    const std::vector<float> rounded =
        exact_input_ ? std::vector<float>(x.begin(), x.end()) : rounded_to_half(shape, x);
    for (std::size_t block = 0; block * kBlock < rounded.size(); ++block)
      Format::encode(&rounded[block * kBlock], &codes[block * Format::kBytes]);
  }

  void decode(const KvShape& shape, std::int64_t first_position, std::span<const std::byte> codes,
              std::span<float> x) const override {
    require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
    for (std::size_t block = 0; block * kBlock < x.size(); ++block)
      Format::decode(&codes[block * Format::kBytes], &x[block * kBlock]);
  }

  double bits_per_token() const override {
    return 8.0 * static_cast<double>(blocks_per_token_ * Format::kBytes);
  }

 private:
  bool exact_input_;
  HeadGeometry geometry_;
  std::size_t blocks_per_token_;
};

}  // namespace

std::unique_ptr<Codec> make_ggml_codec(const std::string& format, HeadGeometry geometry,
                                       bool exact_input) {
  if (format == "q8_0") return std::make_unique<BlockCodec<Q8_0>>(geometry, exact_input);
  if (format == "q6_0") return std::make_unique<BlockCodec<Q6_0>>(geometry, exact_input);
  if (format == "q4_0") return std::make_unique<BlockCodec<Symmetric<4>>>(geometry, exact_input);
  if (format == "q4_1") return std::make_unique<BlockCodec<Asymmetric<4>>>(geometry, exact_input);
  if (format == "q5_0") return std::make_unique<BlockCodec<Symmetric<5>>>(geometry, exact_input);
  if (format == "q5_1") return std::make_unique<BlockCodec<Asymmetric<5>>>(geometry, exact_input);
  if (format == "iq4_nl") return std::make_unique<BlockCodec<Iq4Nl>>(geometry, exact_input);
  throw InputError("plan.json", "/codec",
                   "expected q8_0, q6_0, q4_0, q4_1, q5_0, q5_1 or iq4_nl, found " + format);
}

std::unique_ptr<Codec> make_block_codec(const PlanBundle& bundle, int layer, Side side) {
  side_plan(bundle, layer, side);
  const ModelSpec& model = bundle.plan.model;
  const std::string& codec = bundle.plan.codec;
  const HeadGeometry geometry{model.kv_heads, model.head_dim};
  if (std::int64_t{model.kv_heads} * model.head_dim % std::int64_t{kBlock} != 0)
    throw InputError("plan.json", "/codec",
                     codec + " needs kv_heads x head_dim to be a multiple of " +
                         std::to_string(kBlock) + ", found " + std::to_string(model.kv_heads) +
                         " x " + std::to_string(model.head_dim));
  return make_ggml_codec(codec, geometry);
}

}  // namespace kvplan::quant
