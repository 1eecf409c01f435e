#include "quant/transform_codec.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "quant/codec_checks.h"
#include "quant/linalg.h"
#include "quant/packing.h"
#include "quant/portable_math.h"
#include "quant/trellis.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

// Work goes by tiles of tokens of one head, stored [coordinate][token]: every loop over a tile is
// one over tokens, which vectorises without changing the order of any sum over coordinates.
constexpr int kTile = 32;

// The scale must not leave these bounds where few coordinates carry bits and the sum of y c comes
// near 0.
constexpr double kMinScale = 0.5, kMaxScale = 4;
constexpr double kSmallestNorm = 1e-30;  // below, a vector counts as 0
constexpr float kOutlierMax = 127;

/// Meanings of the 8-bit norm, 2^(q/32) for q = -128..127, and the boundaries 2^((q + 1/2)/32)
/// between them.
struct LogNorms {
  std::array<float, 256> value;
  std::array<double, 255> boundary;
};

const LogNorms& log_norms() {
  static const LogNorms table = [] {
    LogNorms t;
    for (int i = 0; i < 256; ++i)
      t.value[static_cast<std::size_t>(i)] = static_cast<float>(portable_exp2((i - 128) / 32.0));
    for (int i = 0; i < 255; ++i)
      t.boundary[static_cast<std::size_t>(i)] = portable_exp2((i - 127.5) / 32.0);
    return t;
  }();
  return table;
}

// Up to 8 neighbouring codes, handled as one word of at most 64 bits. Widths descend, so that a
// word that does not start on a byte has codes of at most 7 bits and ends within 64 bits of its
// first byte.
struct CodeWord {
  int begin = 0, count = 0;
  std::size_t byte = 0;  // where it starts in the head's bytes
  std::array<std::uint8_t, 8> shift{};
};

struct Head {
  HeadTransform transform;
  std::vector<CodeWord> words;
  std::optional<Trellis> trellis;
  int trellis_begin = 0;              // its first coordinate
  std::size_t trellis_begin_bit = 0;  // where its codes start in the head's bytes
  std::size_t trellis_end_bit = 0;
  std::size_t code_offset = 0;  // bytes of norm and outliers before the codes
  std::size_t size_bytes = 0;
};

struct TileSums {
  std::array<double, kTile> yy, yc, cc;  // weighted sums of y^2, y c, c^2 of normalised coordinates
};

KVPLAN_VECTOR_CLONES void sum_squares(const float* y, int coordinates, double* sums) {
  double sum[kTile] = {};
  for (int i = 0; i < coordinates; ++i)
    for (int t = 0; t < kTile; ++t) sum[t] += double{y[i * kTile + t]} * double{y[i * kTile + t]};
  std::copy_n(sum, kTile, sums);
}

// Nearest levels of the coordinates begin..end of a tile, ties to the lower index, by counting the
// boundaries below.
KVPLAN_VECTOR_CLONES void quantise(const float* y, const float* inverse_norm, const double* weight,
                                   int begin, int end, const float* boundaries, int count,
                                   const float* levels, std::int32_t* codes, double* yy, double* yc,
                                   double* cc) {
  for (int i = begin; i < end; ++i) {
    float u[kTile];
    std::int32_t code[kTile] = {};
    for (int t = 0; t < kTile; ++t) u[t] = y[i * kTile + t] * inverse_norm[t];
    for (int k = 0; k < count; ++k)
      for (int t = 0; t < kTile; ++t) code[t] += u[t] > boundaries[k] ? 1 : 0;
    for (int t = 0; t < kTile; ++t) {
      const double level = levels[code[t]], value = u[t];
      yy[t] += weight[i] * value * value;
      yc[t] += weight[i] * value * level;
      cc[t] += weight[i] * level * level;
    }
    std::copy_n(code, kTile, codes + i * kTile);
  }
}

KVPLAN_VECTOR_CLONES void pack_word(const std::int32_t* codes, const std::uint8_t* shift, int count,
                                    std::uint64_t* words) {
  std::uint64_t word[kTile] = {};
  for (int k = 0; k < count; ++k)
    for (int t = 0; t < kTile; ++t)
      word[t] |= static_cast<std::uint64_t>(static_cast<std::uint32_t>(codes[k * kTile + t]))
                 << shift[k];
  std::copy_n(word, kTile, words);
}

KVPLAN_VECTOR_CLONES void unpack_row(const std::uint64_t* words, int shift, std::uint32_t mask,
                                     const float* levels, const float* norms, float* y) {
  for (int t = 0; t < kTile; ++t)
    y[t] = levels[static_cast<std::uint32_t>(words[t] >> shift) & mask] * norms[t];
}

std::uint64_t load_word(const std::byte* from) {
  std::uint64_t word = 0;
  std::memcpy(&word, from, sizeof word);
  return word;
}

void merge_word(std::byte* to, std::uint64_t word) {
  word |= load_word(to);
  std::memcpy(to, &word, sizeof word);
}

double scale_of(ScaleRule rule, double yy, double yc, double cc) {
  if (rule == ScaleRule::kOne || !(yy > 0)) return 1;
  const double top = rule == ScaleRule::kBiased ? yc : yy;
  const double bottom = rule == ScaleRule::kUnbiased ? yc : cc;
  if (!(bottom > 0)) return kMaxScale;
  const double ratio = top / bottom;
  return std::clamp(rule == ScaleRule::kNormCorrected ? std::sqrt(ratio) : ratio, kMinScale,
                    kMaxScale);
}

// The trellis of a head whose runs stay where they are, or none.
std::optional<Trellis> make_trellis(const HeadTransform& transform) {
  double largest = 0;
  for (const CodeRun& run : transform.runs)
    for (int i = run.begin; run.trellis() && i < run.end; ++i)
      largest = std::max(largest, transform.weight[static_cast<std::size_t>(i)]);
  std::vector<TrellisStep> steps;
  for (const CodeRun& run : transform.runs)
    for (int i = run.begin; run.trellis() && i < run.end; ++i) {
      const double weight = transform.weight[static_cast<std::size_t>(i)];
      steps.push_back(
          {run.width, run.levels.data(), largest > 0 ? static_cast<float>(weight / largest) : 1});
    }
  return steps.empty() ? std::nullopt : std::optional<Trellis>(std::move(steps));
}

// The stream of a trellis goes on with its first bits behind its last, so that every state is 8
// bits in a row.
void close_circle(const Head& head, std::byte* bytes) {
  const auto first =
      load_word(bytes + head.trellis_begin_bit / 8) >> head.trellis_begin_bit % 8 & 0xff;
  std::byte* const end = bytes + head.trellis_end_bit / 8;
  const std::size_t used = head.trellis_end_bit % 8;
  const std::uint64_t codes = load_word(end) & ((std::uint64_t{1} << used) - 1);
  const std::uint64_t word = codes | first << used;
  std::memcpy(end, &word, sizeof word);
}

// fp16 absmax/127, then one signed byte per channel.
void encode_outliers(std::span<const int> channels, const float* x, std::byte* to) {
  float largest = 0;
  for (const int channel : channels) largest = std::max(largest, std::abs(x[channel]));
  const float scale = round_to_half(largest / kOutlierMax);
  store_half(to, scale);
  for (std::size_t j = 0; j < channels.size(); ++j) {
    const float code = scale > 0 ? std::floor(x[channels[j]] / scale + 0.5f) : 0;
    to[2 + j] = static_cast<std::byte>(
        static_cast<std::int8_t>(std::clamp(code, -kOutlierMax, kOutlierMax)));
  }
}

void decode_outliers(std::span<const int> channels, const std::byte* from, float* x) {
  const float scale = load_half(from);
  for (std::size_t j = 0; j < channels.size(); ++j)
    x[channels[j]] = scale * static_cast<float>(static_cast<std::int8_t>(from[2 + j]));
}

class TransformCodec : public Codec {
 public:
  explicit TransformCodec(TransformCodecSpec spec);
  std::size_t packed_bytes(const KvShape& shape) const override {
    require_shape(geometry_, shape);
    return static_cast<std::size_t>(shape.tokens) * token_bytes_;
  }
  void encode(const KvShape& shape, std::int64_t first_position, std::span<const float> x,
              std::span<std::byte> codes) const override;
  void decode(const KvShape& shape, std::int64_t first_position, std::span<const std::byte> codes,
              std::span<float> x) const override;
  void decode_transformed(const KvShape& shape, std::span<const std::byte> codes,
                          std::span<float> y) const override;
  double bits_per_token() const override { return 8.0 * static_cast<double>(token_bytes_); }

 private:
  // Scratch of one call: a tile of one head.
  struct Tile {
    explicit Tile(int d, std::size_t head_bytes)
        : x(static_cast<std::size_t>(d) * kTile),
          y(x.size()),
          codes(x.size()),
          row_bytes(head_bytes + sizeof(std::uint64_t)),
          rows(row_bytes * kTile) {}
    std::vector<float> x, y;          // [channel][token], [coordinate][token]
    std::vector<std::int32_t> codes;  // [coordinate][token]
    std::size_t row_bytes;            // one spare word, so that words may pass the end
    std::vector<std::byte> rows;      // [token][row_bytes]
    std::byte* row(int t) { return rows.data() + static_cast<std::size_t>(t) * row_bytes; }
  };

  std::size_t norm_bytes() const { return norm_ == NormFormat::kLog8 ? 1 : 2; }
  void store_norm(std::byte* to, double norm) const;
  float load_norm(const std::byte* from) const;
  void encode_tile(const Head& head, int tokens, Tile& tile) const;
  static void encode_trellis(const Head& head, int tokens, const float* inverse_norm, Tile& tile,
                             TileSums& sums);
  void load_rows(const Head& head, std::span<const std::byte> codes, int tokens, Tile& tile) const;
  void decode_coordinates(const Head& head, Tile& tile) const;
  /// Calls visit(head, its index, first token, tokens, offset of the head's bytes of the first
  /// token) tile by tile.
  template <class Visit>
  void for_each_tile(const KvShape& shape, Visit visit) const;

  HeadGeometry geometry_;
  std::vector<Head> heads_;
  std::optional<RotaryMean> mean_;
  ScaleRule scale_rule_;
  NormFormat norm_;
  std::size_t token_bytes_ = 0, largest_head_ = 0;
};

TransformCodec::TransformCodec(TransformCodecSpec spec)
    : geometry_(spec.geometry),
      mean_(std::move(spec.mean)),
      scale_rule_(spec.scale_rule),
      norm_(spec.norm) {
  for (HeadTransform& transform : spec.heads) {
    Head head;
    if (transform.fp16) {
      head.size_bytes = 2 * static_cast<std::size_t>(geometry_.head_dim);
    } else {
      head.code_offset =
          norm_bytes() + (transform.outliers.empty() ? 0 : 2 + transform.outliers.size());
      std::size_t bits = 0;
      for (const CodeRun& run : transform.runs) {
        if (run.trellis() && head.trellis_begin_bit == 0) {
          head.trellis_begin = run.begin;
          head.trellis_begin_bit = 8 * head.code_offset + bits;
        }
        for (int i = run.begin; i < run.end; ++i) {
          if (i % 8 == 0) {
            CodeWord word;
            word.begin = i;
            word.byte = head.code_offset + bits / 8;
            head.words.push_back(word);
          }
          CodeWord& word = head.words.back();
          const auto used = bits - 8 * (word.byte - head.code_offset);
          word.shift[static_cast<std::size_t>(word.count++)] = static_cast<std::uint8_t>(used);
          bits += static_cast<std::size_t>(run.width);
        }
      }
      head.size_bytes = head.code_offset + (bits + 7) / 8;
      head.trellis_end_bit = 8 * head.code_offset + bits;
    }
    head.transform = std::move(transform);
    head.trellis = make_trellis(head.transform);
    token_bytes_ += head.size_bytes;
    largest_head_ = std::max(largest_head_, head.size_bytes);
    heads_.push_back(std::move(head));
  }
}

void TransformCodec::store_norm(std::byte* to, double norm) const {
  if (norm_ == NormFormat::kFp16)
    return store_half(to, static_cast<float>(std::min(norm, double{kHalfMax})));
  const auto& boundary = log_norms().boundary;
  const auto above = std::lower_bound(boundary.begin(), boundary.end(), norm);
  *to = static_cast<std::byte>((above - boundary.begin()) - 128);
}

float TransformCodec::load_norm(const std::byte* from) const {
  if (norm_ == NormFormat::kFp16) return load_half(from);
  return log_norms().value[static_cast<std::size_t>(static_cast<std::int8_t>(*from) + 128)];
}

template <class Visit>
void TransformCodec::for_each_tile(const KvShape& shape, Visit visit) const {
  std::size_t head_offset = 0;
  for (std::size_t h = 0; h < heads_.size(); ++h) {
    for (std::int64_t token = 0; token < shape.tokens; token += kTile)
      visit(heads_[h], h, static_cast<std::size_t>(token),
            static_cast<int>(std::min<std::int64_t>(kTile, shape.tokens - token)),
            static_cast<std::size_t>(token) * token_bytes_ + head_offset);
    head_offset += heads_[h].size_bytes;
  }
}

// tile.x holds the vectors; writes tile.rows.
void TransformCodec::encode_tile(const Head& head, int tokens, Tile& tile) const {
  const HeadTransform& transform = head.transform;
  const int coded = transform.coded(), n = transform.transformed();
  const auto size = [](int rows) { return static_cast<std::size_t>(rows) * kTile; };
  multiply(transform.analysis, std::span<const float>(tile.x).first(size(n)), coded, n, kTile,
           std::span(tile.y).first(size(coded)));

  std::array<double, kTile> norm{};
  std::array<float, kTile> inverse{};
  sum_squares(tile.y.data(), coded, norm.data());
  for (std::size_t t = 0; t < kTile; ++t) {
    norm[t] = coded == 0 ? 0 : std::sqrt(norm[t] / coded);
    inverse[t] = norm[t] > kSmallestNorm ? static_cast<float>(1 / norm[t]) : 0;
  }
  TileSums sums{};
  for (const CodeRun& run : transform.runs) {
    if (run.trellis()) break;
    quantise(tile.y.data(), inverse.data(), transform.weight.data(), run.begin, run.end,
             run.boundaries.data(), static_cast<int>(run.boundaries.size()), run.levels.data(),
             tile.codes.data(), sums.yy.data(), sums.yc.data(), sums.cc.data());
  }
  if (head.trellis) encode_trellis(head, tokens, inverse.data(), tile, sums);

  for (int t = 0; t < tokens; ++t) {
    const auto i = static_cast<std::size_t>(t);
    std::fill_n(tile.row(t) + head.code_offset, tile.row_bytes - head.code_offset, std::byte{0});
    store_norm(tile.row(t), norm[i] * scale_of(scale_rule_, sums.yy[i], sums.yc[i], sums.cc[i]));
  }
  for (const CodeWord& word : head.words) {
    std::array<std::uint64_t, kTile> words{};
    pack_word(tile.codes.data() + word.begin * kTile, word.shift.data(), word.count, words.data());
    for (int t = 0; t < tokens; ++t)
      merge_word(tile.row(t) + word.byte, words[static_cast<std::size_t>(t)]);
  }
}

// Coordinates from trellis_begin on, token by token.
void TransformCodec::encode_trellis(const Head& head, int tokens, const float* inverse_norm,
                                    Tile& tile, TileSums& sums) {
  const auto n = static_cast<std::size_t>(head.trellis->size());
  const auto begin = static_cast<std::size_t>(head.trellis_begin);
  std::vector<float> u(n);
  std::vector<std::uint8_t> states(n);
  for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
    for (std::size_t i = 0; i < n; ++i) u[i] = tile.y[(begin + i) * kTile + t] * inverse_norm[t];
    head.trellis->encode(u, states);
    for (std::size_t i = 0; i < n; ++i) {
      const TrellisStep& step = head.trellis->steps()[i];
      tile.codes[(begin + i) * kTile + t] = states[i] & ((1 << step.width) - 1);
      const double weight = head.transform.weight[begin + i];
      const double value = u[i], level = step.values[states[i]];
      sums.yy[t] += weight * value * value;
      sums.yc[t] += weight * value * level;
      sums.cc[t] += weight * level * level;
    }
  }
}

// `codes` starts at the head's bytes of the tile's first token.
void TransformCodec::load_rows(const Head& head, std::span<const std::byte> codes, int tokens,
                               Tile& tile) const {
  for (int t = 0; t < tokens; ++t) {
    std::copy_n(codes.data() + static_cast<std::size_t>(t) * token_bytes_, head.size_bytes,
                tile.row(t));
    if (head.trellis) close_circle(head, tile.row(t));
  }
}

// tile.rows holds the bytes; writes level x norm to tile.y.
void TransformCodec::decode_coordinates(const Head& head, Tile& tile) const {
  std::array<float, kTile> norms{};
  for (int t = 0; t < kTile; ++t) norms[static_cast<std::size_t>(t)] = load_norm(tile.row(t));
  std::array<std::uint64_t, kTile> words{};
  auto run = head.transform.runs.begin();
  for (const CodeWord& word : head.words) {
    for (int t = 0; t < kTile; ++t)
      words[static_cast<std::size_t>(t)] = load_word(tile.row(t) + word.byte);
    for (int k = 0; k < word.count; ++k) {
      const int coordinate = word.begin + k;
      if (coordinate == run->end) ++run;
      unpack_row(words.data(), word.shift[static_cast<std::size_t>(k)],
                 static_cast<std::uint32_t>(run->levels.size()) - 1, run->levels.data(),
                 norms.data(), tile.y.data() + coordinate * kTile);
    }
  }
}

void TransformCodec::encode(const KvShape& shape, std::int64_t first_position,
                            std::span<const float> x, std::span<std::byte> codes) const {
  require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
  const std::vector<float> plain = rounded_to_half(shape, x);
  std::vector<float> centred = plain;
  if (mean_) {
    mean_->fill(first_position, shape.tokens, centred);
    for (std::size_t i = 0; i < plain.size(); ++i) centred[i] = plain[i] - centred[i];
  }
  const auto d = static_cast<std::size_t>(geometry_.head_dim);
  const std::size_t token_values = d * heads_.size();
  Tile tile(geometry_.head_dim, largest_head_);
  for_each_tile(shape, [&](const Head& head, std::size_t h, std::size_t first, int tokens,
                           std::size_t offset) {
    const HeadTransform& transform = head.transform;
    for (int t = 0; t < tokens; ++t) {
      const std::size_t start = (first + static_cast<std::size_t>(t)) * token_values + h * d;
      if (transform.fp16) {
        for (std::size_t i = 0; i < d; ++i) store_half(tile.row(t) + 2 * i, plain[start + i]);
        continue;
      }
      for (std::size_t j = 0; j < transform.channels.size(); ++j)
        tile.x[j * kTile + static_cast<std::size_t>(t)] =
            centred[start + static_cast<std::size_t>(transform.channels[j])];
    }
    if (!transform.fp16) encode_tile(head, tokens, tile);
    for (int t = 0; t < tokens; ++t) {
      const std::size_t token = first + static_cast<std::size_t>(t);
      if (!transform.outliers.empty())
        encode_outliers(transform.outliers, centred.data() + token * token_values + h * d,
                        tile.row(t) + norm_bytes());
      std::copy_n(tile.row(t), head.size_bytes,
                  codes.data() + offset + static_cast<std::size_t>(t) * token_bytes_);
    }
  });
}

void TransformCodec::decode(const KvShape& shape, std::int64_t first_position,
                            std::span<const std::byte> codes, std::span<float> x) const {
  require_buffers(geometry_, shape, first_position, x.size(), codes.size(), packed_bytes(shape));
  const auto d = static_cast<std::size_t>(geometry_.head_dim);
  const std::size_t token_values = d * heads_.size();
  std::vector<float> mean(mean_ ? x.size() : 0);
  if (mean_) mean_->fill(first_position, shape.tokens, mean);
  Tile tile(geometry_.head_dim, largest_head_);
  for_each_tile(shape, [&](const Head& head, std::size_t h, std::size_t first, int tokens,
                           std::size_t offset) {
    const HeadTransform& transform = head.transform;
    if (!transform.fp16) {
      load_rows(head, codes.subspan(offset), tokens, tile);
      decode_coordinates(head, tile);
      const int coded = transform.coded(), n = transform.transformed();
      const auto size = [](int rows) { return static_cast<std::size_t>(rows) * kTile; };
      multiply(transform.synthesis, std::span<const float>(tile.y).first(size(coded)), n, coded,
               kTile, std::span(tile.x).first(size(n)));
    }
    for (int t = 0; t < tokens; ++t) {
      const std::size_t start = (first + static_cast<std::size_t>(t)) * token_values + h * d;
      const std::byte* const bytes =
          codes.data() + offset + static_cast<std::size_t>(t) * token_bytes_;
      if (transform.fp16) {
        for (std::size_t i = 0; i < d; ++i) x[start + i] = load_half(bytes + 2 * i);
        continue;
      }
      for (std::size_t j = 0; j < transform.channels.size(); ++j)
        x[start + static_cast<std::size_t>(transform.channels[j])] =
            tile.x[j * kTile + static_cast<std::size_t>(t)];
      if (!transform.outliers.empty())
        decode_outliers(transform.outliers, bytes + norm_bytes(), &x[start]);
      for (std::size_t i = 0; mean_ && i < d; ++i) x[start + i] += mean[start + i];
    }
  });
}

void TransformCodec::decode_transformed(const KvShape& shape, std::span<const std::byte> codes,
                                        std::span<float> y) const {
  require_buffers(geometry_, shape, 0, y.size(), codes.size(), packed_bytes(shape));
  for (const Head& head : heads_)
    if (head.transform.fp16 || !head.transform.outliers.empty())
      throw ArgumentError(
          "heads stored as fp16 or with outlier channels have no transformed domain; use decode()");
  const auto d = static_cast<std::size_t>(geometry_.head_dim);
  std::fill(y.begin(), y.end(), 0.0f);
  Tile tile(geometry_.head_dim, largest_head_);
  for_each_tile(shape, [&](const Head& head, std::size_t h, std::size_t first, int tokens,
                           std::size_t offset) {
    load_rows(head, codes.subspan(offset), tokens, tile);
    decode_coordinates(head, tile);
    for (int t = 0; t < tokens; ++t)
      for (int i = 0; i < head.transform.coded(); ++i)
        y[((first + static_cast<std::size_t>(t)) * heads_.size() + h) * d +
          static_cast<std::size_t>(i)] = tile.y[static_cast<std::size_t>(i * kTile + t)];
  });
}

}  // namespace

std::unique_ptr<Codec> make_transform_codec(TransformCodecSpec spec) {
  return std::make_unique<TransformCodec>(std::move(spec));
}

std::span<const float, 256> log8_values() { return log_norms().value; }
std::span<const double, 255> log8_boundaries() { return log_norms().boundary; }

}  // namespace kvplan::quant
