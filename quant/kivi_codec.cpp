// KIVI: asymmetric integers, keys per channel over groups of 32 tokens, values per token over
// groups of 32 channels. Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for
// KV Cache" (2024), section 3. KVTuner's quantiser differs in its zero point, a whole number, and
// in its fp16 arithmetic. Source: flexible_quant/vanilla_quantizer.py there.

#include <algorithm>
#include <cmath>
#include <string>

#include "quant/codec_checks.h"
#include "quant/packing.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr std::size_t kGroup = 32;
constexpr std::size_t kScaleBytes = 4;  // fp16 scale, then fp16 minimum

enum class Zero { kMinimum, kWhole };

/// KVTuner computes in fp16; what overflows there is cut to the largest value here.
float half_of(float x) { return round_to_half(std::clamp(x, -kHalfMax, kHalfMax)); }

// A strided run of values that share scale and zero: fp16 scale, fp16 minimum (KVTuner: zero point
// in steps), count codes of `bits`.
void encode_kvtuner_group(const float* x, std::size_t stride, std::size_t count, int bits,
                          float low, float high, std::byte* to) {
  const auto top = static_cast<float>((1 << bits) - 1);
  const float range = std::max(half_of(high - low), half_of(1e-5f));
  const float scale = half_of(range / top), lowest = -static_cast<float>(1 << (bits - 1));
  const float zero = half_of(std::nearbyint(half_of(low / scale)) - lowest);
  store_half(to, scale);
  store_half(to + 2, zero);
  BitWriter writer({to + kScaleBytes, (count * static_cast<std::size_t>(bits) + 7) / 8});
  for (std::size_t i = 0; i < count; ++i) {
    const float code = std::nearbyint(half_of(half_of(x[i * stride] / scale) - zero)) - lowest;
    writer.put(static_cast<std::uint64_t>(std::clamp(code, 0.0f, top)), bits);
  }
}

void encode_group(Zero rule, const float* x, std::size_t stride, std::size_t count, int bits,
                  std::byte* to) {
  float low = x[0], high = x[0];
  for (std::size_t i = 1; i < count; ++i) {
    low = std::min(low, x[i * stride]);
    high = std::max(high, x[i * stride]);
  }
  std::fill_n(to, kScaleBytes + (count * static_cast<std::size_t>(bits) + 7) / 8, std::byte{0});
  if (rule == Zero::kWhole) return encode_kvtuner_group(x, stride, count, bits, low, high, to);
  const auto top = static_cast<float>((1 << bits) - 1);
  const float scale = std::min(round_to_half((high - low) / top), kHalfMax);
  store_half(to, scale);
  store_half(to + 2, low);
  BitWriter writer({to + kScaleBytes, (count * static_cast<std::size_t>(bits) + 7) / 8});
  for (std::size_t i = 0; i < count; ++i) {
    const float code = scale > 0 ? std::floor((x[i * stride] - low) / scale + 0.5f) : 0;
    writer.put(static_cast<std::uint64_t>(std::min(code, top)), bits);
  }
}

void decode_group(Zero rule, const std::byte* from, std::size_t stride, std::size_t count, int bits,
                  float* x) {
  const float scale = load_half(from), low = load_half(from + 2);
  BitReader reader({from + kScaleBytes, (count * static_cast<std::size_t>(bits) + 7) / 8});
  const auto lowest = static_cast<float>(1 << (bits - 1));
  for (std::size_t i = 0; i < count; ++i) {
    const auto code = static_cast<float>(reader.get(bits));
    x[i * stride] =
        rule == Zero::kMinimum ? code * scale + low : half_of(half_of(code - lowest + low) * scale);
  }
}

std::size_t group_bytes(std::size_t count, int bits) {
  return kScaleBytes + (count * static_cast<std::size_t>(bits) + 7) / 8;
}

// Groups of 32 tokens; in each, KV head by KV head, channel by channel. Tokens after the last whole
// group are fp16 rows.
class KiviKeys : public Codec {
 public:
  KiviKeys(HeadGeometry geometry, int bits, Zero zero = Zero::kMinimum)
      : zero_(zero),
        geometry_(geometry),
        bits_(bits),
        row_(static_cast<std::size_t>(geometry.kv_heads) *
             static_cast<std::size_t>(geometry.head_dim)) {}

  std::size_t packed_bytes(const KvShape& shape) const override {
    require_shape(geometry_, shape);
    const auto tokens = static_cast<std::size_t>(shape.tokens);
    return row_ * (tokens / kGroup * group_bytes(kGroup, bits_) + tokens % kGroup * 2);
  }
  int token_multiple() const override { return static_cast<int>(kGroup); }

  void encode(const KvShape& shape, std::int64_t first_position, std::span<const float> x,
              std::span<std::byte> codes) const override {
    require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
    const std::vector<float> rounded = rounded_to_half(shape, x);
    std::byte* to = codes.data();
    std::size_t i = 0;
    for (; i + kGroup * row_ <= rounded.size(); i += kGroup * row_)
      for (std::size_t channel = 0; channel < row_; ++channel, to += group_bytes(kGroup, bits_))
        encode_group(zero_, &rounded[i + channel], row_, kGroup, bits_, to);
    for (; i < rounded.size(); ++i, to += 2) store_half(to, rounded[i]);
  }

  void decode(const KvShape& shape, std::int64_t first_position, std::span<const std::byte> codes,
              std::span<float> x) const override {
    require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
    const std::byte* from = codes.data();
    std::size_t i = 0;
    for (; i + kGroup * row_ <= x.size(); i += kGroup * row_)
      for (std::size_t channel = 0; channel < row_; ++channel, from += group_bytes(kGroup, bits_))
        decode_group(zero_, from, row_, kGroup, bits_, &x[i + channel]);
    for (; i < x.size(); ++i, from += 2) x[i] = load_half(from);
  }

  double bits_per_token() const override {
    return 8.0 * static_cast<double>(row_ * group_bytes(kGroup, bits_)) /
           static_cast<double>(kGroup);
  }

 private:
  Zero zero_;
  HeadGeometry geometry_;
  int bits_;
  std::size_t row_;  // values per token
};

// Token, KV head, group of 32 channels; the last group of a head takes what is left.
class KiviValues : public Codec {
 public:
  KiviValues(HeadGeometry geometry, int bits, Zero zero = Zero::kMinimum)
      : zero_(zero), geometry_(geometry), bits_(bits) {
    const auto d = static_cast<std::size_t>(geometry.head_dim);
    for (std::size_t begin = 0; begin < d; begin += kGroup)
      head_bytes_ += group_bytes(std::min(kGroup, d - begin), bits);
  }

  std::size_t packed_bytes(const KvShape& shape) const override {
    require_shape(geometry_, shape);
    return static_cast<std::size_t>(shape.tokens * shape.kv_heads) * head_bytes_;
  }

  void encode(const KvShape& shape, std::int64_t first_position, std::span<const float> x,
              std::span<std::byte> codes) const override {
    require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
    const std::vector<float> rounded = rounded_to_half(shape, x);
    std::byte* to = codes.data();
    for_each_group(rounded.size(), [&](std::size_t begin, std::size_t count) {
      encode_group(zero_, &rounded[begin], 1, count, bits_, to);
      to += group_bytes(count, bits_);
    });
  }

  void decode(const KvShape& shape, std::int64_t first_position, std::span<const std::byte> codes,
              std::span<float> x) const override {
    require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
    const std::byte* from = codes.data();
    for_each_group(x.size(), [&](std::size_t begin, std::size_t count) {
      decode_group(zero_, from, 1, count, bits_, &x[begin]);
      from += group_bytes(count, bits_);
    });
  }

  double bits_per_token() const override {
    return 8.0 * static_cast<double>(head_bytes_) * geometry_.kv_heads;
  }

 private:
  template <class Visit>
  void for_each_group(std::size_t values, Visit visit) const {
    const auto d = static_cast<std::size_t>(geometry_.head_dim);
    for (std::size_t head = 0; head < values; head += d)
      for (std::size_t begin = 0; begin < d; begin += kGroup)
        visit(head + begin, std::min(kGroup, d - begin));
  }
  Zero zero_;
  HeadGeometry geometry_;
  int bits_;
  std::size_t head_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Codec> make_kvtuner_codec(HeadGeometry geometry, int bits, bool by_channel) {
  if (by_channel) return std::make_unique<KiviKeys>(geometry, bits, Zero::kWhole);
  return std::make_unique<KiviValues>(geometry, bits, Zero::kWhole);
}

std::unique_ptr<Codec> make_kivi_codec(const PlanBundle& bundle, int layer, Side side) {
  const SidePlan& plan = side_plan(bundle, layer, side);
  const HeadGeometry geometry{bundle.plan.model.kv_heads, bundle.plan.model.head_dim};
  const std::string pointer = side_pointer(layer, side) + "/heads";
  const int bits = plan.heads.front().widths.empty() ? 0 : plan.heads.front().widths.front();
  for (const HeadPlan& head : plan.heads)
    if (bits < 1 || bits > 8 || head.widths.empty() ||
        head.widths != std::vector(head.widths.size(), bits))
      throw InputError("plan.json", pointer, "kivi needs one width of 1 to 8 bits for all heads");
  if (side == Side::kKey) return std::make_unique<KiviKeys>(geometry, bits);
  return std::make_unique<KiviValues>(geometry, bits);
}

}  // namespace kvplan::quant
