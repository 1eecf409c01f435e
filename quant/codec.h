#pragma once
// The codec interface: real packed bytes in, vectors out, built from one layer and side of a plan.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "schemas/plan.h"

namespace kvplan::quant {

/// Vectors [tokens, kv_heads, head_dim], row-major, after rotary.
struct KvShape {
  std::int64_t tokens = 0;
  int kv_heads = 0;
  int head_dim = 0;
  std::int64_t elements() const { return tokens * kv_heads * head_dim; }
};

/// What a codec was built for.
struct HeadGeometry {
  int kv_heads = 0;
  int head_dim = 0;
};

/// Immutable, thread-safe. Linear form: token, then KV head; per head norm, outlier scale and codes
/// if any, codes in storage order, lowest bit first, each head on a byte boundary
/// (docs/formats/packing.md). Sinks and fp16 windows are the caller's.
class Codec {
 public:
  virtual ~Codec() = default;
  /// Exact size of the packed buffer. Codecs that share scales over tokens (KIVI keys) count whole
  /// token groups of token_multiple(); a remainder is stored as fp16 rows and counted so.
  virtual std::size_t packed_bytes(const KvShape& shape) const = 0;
  virtual int token_multiple() const { return 1; }
  /// Rounds to fp16, centres, transforms, normalises, writes codes. `codes` has packed_bytes(shape)
  /// bytes. ArgumentError: size mismatch, other kv_heads or head_dim, non-finite value (says token,
  /// head, channel).
  virtual void encode(const KvShape& shape, std::int64_t first_position, std::span<const float> x,
                      std::span<std::byte> codes) const = 0;
  /// The vectors in the plain domain (after rotary).
  virtual void decode(const KvShape& shape, std::int64_t first_position,
                      std::span<const std::byte> codes, std::span<float> x) const = 0;
  /// level * stored norm in storage order, before synthesis and mean (calibrated and rotated codecs
  /// without outliers; ArgumentError elsewhere). What the GPU kernels multiply with.
  virtual void decode_transformed(const KvShape& shape, std::span<const std::byte> codes,
                                  std::span<float> y) const;
  /// Payload + side information per token in bits, averaged over whole token groups.
  virtual double bits_per_token() const = 0;
};

/// Codec of one layer and side. `bundle` may be destroyed afterwards. InputError for a codec or
/// option unknown to this version.
std::unique_ptr<Codec> make_codec(const PlanBundle& bundle, int layer, Side side);

/// x_hat = decode(encode(x)), by chunks of tokens so that it can run on several threads: [begin,
/// end) in tokens, begin a multiple of token_multiple(). Sizes as in encode for the chunk.
void round_trip(const Codec& codec, const KvShape& shape, std::int64_t first_position,
                std::span<const float> x, std::span<float> x_hat);

/// Sum of bits_per_token over all layers and sides / elements per token.
double measured_effective_bits(const PlanBundle& bundle);

}  // namespace kvplan::quant
