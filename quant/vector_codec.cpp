#include "quant/vector_codec.h"

#include <algorithm>

namespace kvplan::quant {
namespace {

constexpr std::int64_t kTile = 64;  // tokens of one head at a time, so that they stay in the caches

class VectorCodec : public Codec {
 public:
  explicit VectorCodec(VectorCodecSpec spec) : spec_(std::move(spec)) {
    for (const VectorHead& head : spec_.heads) {
      std::size_t bytes = head.sketch ? head.sketch->bytes() : 0;
      for (const CodedChannels& part : head.parts) bytes += part.code->bytes();
      head_bytes_.push_back(bytes);
      token_bytes_ += bytes;
    }
  }

  std::size_t packed_bytes(const KvShape& shape) const override {
    require_shape(spec_.geometry, shape);
    return static_cast<std::size_t>(shape.tokens) * token_bytes_;
  }

  void encode(const KvShape& shape, std::int64_t first_position, std::span<const float> x,
              std::span<std::byte> codes) const override {
    require_buffers(spec_.geometry, shape, first_position, x.size(), codes.size(),
                    packed_bytes(shape));
    std::vector<float> centred = rounded_to_half(shape, x);
    if (spec_.mean) {
      std::vector<float> mean(x.size());
      spec_.mean->fill(first_position, shape.tokens, mean);
      for (std::size_t i = 0; i < mean.size(); ++i) centred[i] -= mean[i];
    }
    std::fill(codes.begin(), codes.end(), std::byte{0});
    for_each_tile(shape, codes.data(),
                  [&](const VectorHead& head, std::size_t start, std::size_t tokens,
                      PackedRows<std::byte> rows) {
                    encode_tile(head, gathered(centred, start, tokens), rows);
                  });
  }

  void decode(const KvShape& shape, std::int64_t first_position, std::span<const std::byte> codes,
              std::span<float> x) const override {
    require_buffers(spec_.geometry, shape, first_position, x.size(), codes.size(),
                    packed_bytes(shape));
    std::fill(x.begin(), x.end(), 0.0f);
    if (spec_.mean) spec_.mean->fill(first_position, shape.tokens, x);
    for_each_tile(shape, codes.data(),
                  [&](const VectorHead& head, std::size_t start, std::size_t tokens,
                      PackedRows<const std::byte> rows) {
                    const std::vector<float> tile = decoded_tile(head, tokens, rows);
                    for (std::size_t t = 0; t < tokens; ++t)
                      for (std::size_t i = 0; i < dimension(); ++i)
                        x[start + t * token_values() + i] += tile[t * dimension() + i];
                  });
  }

  double bits_per_token() const override { return 8.0 * static_cast<double>(token_bytes_); }

 private:
  std::size_t dimension() const { return static_cast<std::size_t>(spec_.geometry.head_dim); }
  std::size_t token_values() const { return dimension() * spec_.heads.size(); }

  /// Calls visit(head, index of its first value, tokens, its packed rows) for every tile.
  template <class Byte, class Visit>
  void for_each_tile(const KvShape& shape, Byte* codes, Visit visit) const {
    for (std::int64_t first = 0; first < shape.tokens; first += kTile) {
      const auto token = static_cast<std::size_t>(first);
      const auto tokens = static_cast<std::size_t>(std::min(kTile, shape.tokens - first));
      Byte* bytes = codes + token * token_bytes_;
      for (std::size_t h = 0; h < spec_.heads.size(); ++h) {
        visit(spec_.heads[h], token * token_values() + h * dimension(), tokens,
              PackedRows<Byte>{bytes, token_bytes_});
        bytes += head_bytes_[h];
      }
    }
  }

  /// The vectors of one head, [tokens, head_dim].
  std::vector<float> gathered(std::span<const float> x, std::size_t start,
                              std::size_t tokens) const {
    std::vector<float> tile;
    for (std::size_t t = 0; t < tokens; ++t) {
      const auto row = x.subspan(start + t * token_values(), dimension());
      tile.insert(tile.end(), row.begin(), row.end());
    }
    return tile;
  }

  void encode_tile(const VectorHead& head, std::vector<float> tile,
                   PackedRows<std::byte> rows) const {
    const std::size_t tokens = tile.size() / dimension();
    PackedRows<std::byte> to = rows;
    for (const CodedChannels& part : head.parts) {
      std::vector<float> x;
      for (std::size_t t = 0; t < tokens; ++t)
        for (const int channel : part.channels)
          x.push_back(tile[t * dimension() + static_cast<std::size_t>(channel)]);
      part.code->encode(x, to);
      to = to.skip(part.code->bytes());
    }
    if (!head.sketch) return;
    const std::vector<float> coarse = decoded_parts(head, tokens, {rows.first, rows.stride});
    for (std::size_t i = 0; i < tile.size(); ++i) tile[i] -= coarse[i];
    head.sketch->encode(tile, to);
  }

  std::vector<float> decoded_parts(const VectorHead& head, std::size_t tokens,
                                   PackedRows<const std::byte> rows) const {
    std::vector<float> tile(tokens * dimension());
    for (const CodedChannels& part : head.parts) {
      std::vector<float> x(tokens * part.channels.size());
      part.code->decode(rows, x);
      rows = rows.skip(part.code->bytes());
      auto value = x.begin();
      for (std::size_t t = 0; t < tokens; ++t)
        for (const int channel : part.channels)
          tile[t * dimension() + static_cast<std::size_t>(channel)] = *value++;
    }
    return tile;
  }

  std::vector<float> decoded_tile(const VectorHead& head, std::size_t tokens,
                                  PackedRows<const std::byte> rows) const {
    std::vector<float> tile = decoded_parts(head, tokens, rows);
    if (!head.sketch) return tile;
    for (const CodedChannels& part : head.parts) rows = rows.skip(part.code->bytes());
    std::vector<float> residual(tile.size());
    head.sketch->decode(rows, residual);
    for (std::size_t i = 0; i < tile.size(); ++i) tile[i] += residual[i];
    return tile;
  }

  VectorCodecSpec spec_;
  std::vector<std::size_t> head_bytes_;
  std::size_t token_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Codec> make_vector_codec(VectorCodecSpec spec) {
  return std::make_unique<VectorCodec>(std::move(spec));
}

}  // namespace kvplan::quant
