// The block formats of ggml, to the byte: q8_0 and q4_0 over a token's whole row of kv_heads x
// head_dim values. Source: ggml/src/ggml-quants.c of llama.cpp, quantize_row_q8_0_ref and
// quantize_row_q4_0_ref.

#include <algorithm>
#include <cmath>
#include <string>

#include "quant/codec_checks.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr std::size_t kBlock = 32;  // values per fp16 scale

struct Q8_0 {
  static constexpr std::size_t kBytes = 2 + kBlock;
  static void encode(const float* x, std::byte* to) {
    float largest = 0;
    for (std::size_t i = 0; i < kBlock; ++i) largest = std::max(largest, std::abs(x[i]));
    const float scale = largest / 127, inverse = scale != 0 ? 1 / scale : 0;
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

// The value of largest magnitude, with its sign, becomes code 0 = level -8. Low nibbles hold the
// first half of the block.
struct Q4_0 {
  static constexpr std::size_t kBytes = 2 + kBlock / 2;
  static void encode(const float* x, std::byte* to) {
    float largest = 0;
    for (std::size_t i = 0; i < kBlock; ++i)
      if (std::abs(x[i]) > std::abs(largest)) largest = x[i];
    const float scale = largest / -8, inverse = scale != 0 ? 1 / scale : 0;
    store_half(to, scale);
    const auto code = [inverse](float value) {
      return static_cast<unsigned>(std::min(15, static_cast<int>(value * inverse + 8.5f)));
    };
    for (std::size_t i = 0; i < kBlock / 2; ++i)
      to[2 + i] = static_cast<std::byte>(code(x[i]) | code(x[i + kBlock / 2]) << 4);
  }
  static void decode(const std::byte* from, float* x) {
    const float scale = load_half(from);
    for (std::size_t i = 0; i < kBlock / 2; ++i) {
      const int both = std::to_integer<int>(from[2 + i]);
      x[i] = static_cast<float>((both & 15) - 8) * scale;
      x[i + kBlock / 2] = static_cast<float>((both >> 4) - 8) * scale;
    }
  }
};

template <class Format>
class BlockCodec : public Codec {
 public:
  explicit BlockCodec(HeadGeometry geometry)
      : geometry_(geometry),
        blocks_per_token_(static_cast<std::size_t>(geometry.kv_heads) *
                          static_cast<std::size_t>(geometry.head_dim) / kBlock) {}

  std::size_t packed_bytes(const KvShape& shape) const override {
    require_shape(geometry_, shape);
    return static_cast<std::size_t>(shape.tokens) * blocks_per_token_ * Format::kBytes;
  }

  void encode(const KvShape& shape, std::int64_t first_position, std::span<const float> x,
              std::span<std::byte> codes) const override {
    require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
    const std::vector<float> rounded = rounded_to_half(shape, x);
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
  HeadGeometry geometry_;
  std::size_t blocks_per_token_;
};

}  // namespace

std::unique_ptr<Codec> make_block_codec(const PlanBundle& bundle, int layer, Side side) {
  side_plan(bundle, layer, side);
  const ModelSpec& model = bundle.plan.model;
  const HeadGeometry geometry{model.kv_heads, model.head_dim};
  if (std::int64_t{model.kv_heads} * model.head_dim % std::int64_t{kBlock} != 0)
    throw InputError("plan.json", "/codec",
                     bundle.plan.codec + " needs kv_heads x head_dim to be a multiple of " +
                         std::to_string(kBlock) + ", found " + std::to_string(model.kv_heads) +
                         " x " + std::to_string(model.head_dim));
  if (bundle.plan.codec == "q8_0") return std::make_unique<BlockCodec<Q8_0>>(geometry);
  return std::make_unique<BlockCodec<Q4_0>>(geometry);
}

}  // namespace kvplan::quant
