#include "quant/codec.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "quant/codec_checks.h"
#include "quant/linalg.h"
#include "quant/packing.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

static_assert(std::endian::native == std::endian::little, "the packed form is little endian");

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 30;
constexpr std::uint32_t kInfinityBits = 0x7f800000;

std::string describe(const KvShape& shape) {
  return "[" + std::to_string(shape.tokens) + ", " + std::to_string(shape.kv_heads) + ", " +
         std::to_string(shape.head_dim) + "]";
}

// Returns whether all values stay finite.
KVPLAN_VECTOR_CLONES bool round_all(const float* x, std::size_t n, float* out) {
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = round_to_half(x[i]);
    bad |= (std::bit_cast<std::uint32_t>(out[i]) & kInfinityBits) == kInfinityBits ? 1u : 0u;
  }
  return bad == 0;
}

}  // namespace

void require_shape(const HeadGeometry& geometry, const KvShape& shape,
                   std::int64_t first_position) {
  if (shape.kv_heads != geometry.kv_heads || shape.head_dim != geometry.head_dim)
    throw ArgumentError("vectors of shape " + describe(shape) + " given to a codec for " +
                        std::to_string(geometry.kv_heads) + " KV heads of dimension " +
                        std::to_string(geometry.head_dim));
  if (shape.tokens < 0 || shape.tokens > kMaxTokens)
    throw ArgumentError("a codec takes 0 to 2^30 tokens at once, got " +
                        std::to_string(shape.tokens));
  if (first_position < 0 || first_position > kMaxTokens - shape.tokens)
    throw ArgumentError("positions must lie in 0..2^30, got " + std::to_string(shape.tokens) +
                        " tokens from position " + std::to_string(first_position));
}

void require_buffers(const HeadGeometry& geometry, const KvShape& shape,
                     std::int64_t first_position, std::size_t values, std::size_t bytes,
                     std::size_t packed_bytes) {
  require_shape(geometry, shape, first_position);
  if (values != static_cast<std::size_t>(shape.elements()))
    throw ArgumentError("a buffer of " + std::to_string(values) + " values was given for vectors " +
                        describe(shape) + ", which have " + std::to_string(shape.elements()));
  if (bytes != packed_bytes)
    throw ArgumentError("a packed buffer of " + std::to_string(bytes) +
                        " bytes was given for vectors " + describe(shape) + ", which take " +
                        std::to_string(packed_bytes) + "; use packed_bytes()");
}

std::vector<float> rounded_to_half(const KvShape& shape, std::span<const float> x) {
  std::vector<float> out(x.size());
  if (round_all(x.data(), x.size(), out.data())) return out;
  std::size_t i = 0;
  while ((std::bit_cast<std::uint32_t>(out[i]) & kInfinityBits) != kInfinityBits) ++i;
  const auto d = static_cast<std::size_t>(shape.head_dim);
  const auto heads = static_cast<std::size_t>(shape.kv_heads);
  throw ArgumentError("value " + std::to_string(x[i]) + " of token " +
                      std::to_string(i / d / heads) + ", head " + std::to_string(i / d % heads) +
                      ", channel " + std::to_string(i % d) + " is not finite in fp16");
}

void store_half(std::byte* to, float value) {
  const std::uint16_t half = to_half(value);
  std::memcpy(to, &half, sizeof half);
}

float load_half(const std::byte* from) {
  std::uint16_t half = 0;
  std::memcpy(&half, from, sizeof half);
  return from_half(half);
}

std::string side_pointer(int layer, Side side) {
  return "/layers/" + std::to_string(layer) + "/" + side_name(side);
}

std::string tensor_name(int layer, Side side, const char* name) {
  return "layers." + std::to_string(layer) + "." + side_name(side) + "." + name;
}

const SidePlan& side_plan(const PlanBundle& bundle, int layer, Side side) {
  const Plan& plan = bundle.plan;
  if (layer < 0 || static_cast<std::size_t>(layer) >= plan.layers.size())
    throw ArgumentError("layer " + std::to_string(layer) + " was asked of a plan with " +
                        std::to_string(plan.layers.size()) + " layers");
  if (plan.model.kv_heads < 1 || plan.model.head_dim < 1)
    throw InputError("plan.json", "/model",
                     "expected at least 1 KV head and 1 channel, found kv_heads " +
                         std::to_string(plan.model.kv_heads) + ", head_dim " +
                         std::to_string(plan.model.head_dim));
  const SidePlan& found = plan.layers[static_cast<std::size_t>(layer)].side(side);
  if (found.heads.size() != static_cast<std::size_t>(plan.model.kv_heads))
    throw InputError("plan.json", side_pointer(layer, side) + "/heads",
                     "expected one entry per KV head (" + std::to_string(plan.model.kv_heads) +
                         "), found " + std::to_string(found.heads.size()));
  return found;
}

void Codec::decode_transformed(const KvShape&, std::span<const std::byte>, std::span<float>) const {
  throw ArgumentError(
      "this codec has no transformed domain; decode_transformed works for calibrated codecs and "
      "for "
      "rotated codecs without outlier channels");
}

std::unique_ptr<Codec> make_codec(const PlanBundle& bundle, int layer, Side side) {
  if (!side_plan(bundle, layer, side).codec.empty()) return make_side_codec(bundle, layer, side);
  struct Family {
    std::string_view codec;
    std::initializer_list<std::string_view> codes;
    std::unique_ptr<Codec> (*make)(const PlanBundle&, int, Side);
  };
  static const Family kFamilies[] = {
      {"calibrated", {"scalar", "tcq"}, make_calibrated_codec},
      {"rotated", {"scalar", "polar", "polar_edge"}, make_rotated_codec},
      {"q8_0", {"scalar"}, make_block_codec},
      {"q4_0", {"scalar"}, make_block_codec},
      {"q4_1", {"scalar"}, make_block_codec},
      {"q5_0", {"scalar"}, make_block_codec},
      {"q5_1", {"scalar"}, make_block_codec},
      {"iq4_nl", {"scalar"}, make_block_codec},
      {"fp8_e4m3", {"scalar"}, make_float_codec},
      {"fp8_e5m2", {"scalar"}, make_float_codec},
      {"nvfp4", {"scalar"}, make_float_codec},
      {"mxfp4", {"scalar"}, make_float_codec},
      {"int", {"scalar"}, make_int_codec},
      {"kivi", {"scalar"}, make_kivi_codec},
      {"fp16", {"scalar"}, make_fp16_codec}};
  const auto listed = [](const auto& items, auto name) {
    std::string names;
    for (const auto& item : items)
      names.append(names.empty() ? "" : ", ").append(std::string(name(item)));
    return names;
  };
  const auto family = std::ranges::find(kFamilies, bundle.plan.codec, &Family::codec);
  if (family == std::end(kFamilies))
    throw InputError("plan.json", "/codec",
                     "expected one of " +
                         listed(kFamilies, [](const Family& f) { return f.codec; }) + ", found " +
                         bundle.plan.codec);
  if (std::ranges::find(family->codes, bundle.plan.code) == family->codes.end())
    throw InputError("plan.json", "/code",
                     "expected " +
                         listed(family->codes, [](std::string_view code) { return code; }) +
                         " with codec " + bundle.plan.codec + ", found " + bundle.plan.code);
  return family->make(bundle, layer, side);
}

void round_trip(const Codec& codec, const KvShape& shape, std::int64_t first_position,
                std::span<const float> x, std::span<float> x_hat) {
  if (shape.tokens < 0 || x.size() != static_cast<std::size_t>(shape.elements()) ||
      x_hat.size() != x.size())
    throw ArgumentError("a round trip of vectors " + describe(shape) + " got buffers of " +
                        std::to_string(x.size()) + " and " + std::to_string(x_hat.size()) +
                        " values");
  // Small enough for the caches, a multiple of every token group in use.
  const std::int64_t step =
      std::max<std::int64_t>(256 / codec.token_multiple(), 1) * codec.token_multiple();
  std::vector<std::byte> codes;
  for (std::int64_t token = 0; token < shape.tokens; token += step) {
    const KvShape chunk{std::min(step, shape.tokens - token), shape.kv_heads, shape.head_dim};
    const auto offset = static_cast<std::size_t>(token * shape.kv_heads * shape.head_dim);
    const auto size = static_cast<std::size_t>(chunk.elements());
    codes.assign(codec.packed_bytes(chunk), std::byte{0});
    codec.encode(chunk, first_position + token, x.subspan(offset, size), codes);
    codec.decode(chunk, first_position + token, codes, x_hat.subspan(offset, size));
  }
}

double measured_effective_bits(const PlanBundle& bundle) {
  double bits = 0;
  for (int layer = 0; layer < static_cast<int>(bundle.plan.layers.size()); ++layer)
    for (const Side side : kSides) bits += make_codec(bundle, layer, side)->bits_per_token();
  return bits / static_cast<double>(elements_per_token(bundle.plan.model));
}

}  // namespace kvplan::quant
