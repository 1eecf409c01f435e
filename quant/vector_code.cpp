#include "quant/vector_code.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "quant/codec_checks.h"
#include "quant/linalg.h"
#include "quant/packing.h"
#include "quant/portable_math.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr double kMinScale = 0.5, kMaxScale = 4;  // of the scale rule, as in all plans
constexpr double kSmallestNorm = 1e-30;           // below, a vector counts as 0

std::size_t bytes_of_bits(std::size_t bits) { return (bits + 7) / 8; }

void store_norm(std::byte* to, double norm) {
  store_half(to, static_cast<float>(std::min(norm, double{kHalfMax})));
}

std::vector<float> transposed_square(std::span<const float> a, std::size_t n) {
  std::vector<float> out(a.size());
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < n; ++j) out[j * n + i] = a[i * n + j];
  return out;
}

/// [count, columns] = vectors [count, n] times matrix [n, columns].
std::vector<float> product(std::span<const float> vectors, std::span<const float> matrix,
                           std::size_t n) {
  const std::size_t count = vectors.size() / n, columns = matrix.size() / n;
  std::vector<float> out(count * columns);
  multiply(vectors, matrix, static_cast<int>(count), static_cast<int>(n), static_cast<int>(columns),
           std::span(out));
  return out;
}

double norm_of(std::span<const float> x) {
  double square = 0;
  for (const float value : x) square += double{value} * value;
  return std::sqrt(square);
}

/// Nearest level, ties to the lower index.
std::size_t nearest_level(const Codebook& book, float value) {
  return static_cast<std::size_t>(
      std::lower_bound(book.boundaries.begin(), book.boundaries.end(), value) -
      book.boundaries.begin());
}

class ScalarCode : public VectorCode {
 public:
  explicit ScalarCode(ScalarCodeSpec spec)
      : VectorCode(spec.size),
        spec_(std::move(spec)),
        analysis_(transposed_square(spec_.rotation, size())) {
    if (spec_.norm_block == 0 || size() % spec_.norm_block != 0)
      throw InternalError("a norm block of " + std::to_string(spec_.norm_block) +
                          " coordinates does not divide " + std::to_string(size()));
  }

  std::size_t bytes() const override {
    return blocks() * block_header() +
           bytes_of_bits(size() * static_cast<std::size_t>(spec_.book.bits));
  }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    const std::vector<float> y = product(x, analysis_, size());
    for (std::size_t i = 0; i * size() < y.size(); ++i) {
      std::byte* header = to.row(i);
      BitWriter codes({header + blocks() * block_header(), bytes() - blocks() * block_header()});
      for (std::size_t block = 0; block < blocks(); ++block, header += block_header())
        encode_block(std::span(y).subspan(i * size() + block * spec_.norm_block, spec_.norm_block),
                     header, codes);
    }
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    std::vector<float> y(x.size());
    for (std::size_t i = 0; i * size() < y.size(); ++i) {
      const std::byte* const row = from.row(i);
      const std::size_t headers = blocks() * block_header();
      BitReader codes({row + headers, bytes() - headers});
      for (std::size_t j = 0; j < size(); ++j) {
        const std::byte* const header = row + j / spec_.norm_block * block_header();
        const float unit = load_half(header) * (spec_.with_deviation ? load_half(header + 2) : 1);
        y[i * size() + j] = unit * spec_.book.levels[codes.get(spec_.book.bits)];
      }
    }
    const std::vector<float> back = product(y, spec_.rotation, size());
    std::copy(back.begin(), back.end(), x.begin());
  }

 private:
  std::size_t blocks() const { return size() / spec_.norm_block; }
  std::size_t block_header() const { return spec_.with_deviation ? 4 : 2; }

  void encode_block(std::span<const float> y, std::byte* header, BitWriter& codes) const {
    const auto n = static_cast<double>(y.size());
    const double norm = norm_of(y) / std::sqrt(n);
    double deviation = 1;
    if (spec_.with_deviation && norm > kSmallestNorm) {
      const double mean = std::accumulate(y.begin(), y.end(), 0.0) / n / norm;
      deviation = round_to_half(static_cast<float>(std::sqrt(std::max(0.0, 1 - mean * mean))));
    }
    const double unit = norm * deviation;
    const auto inverse = unit > kSmallestNorm ? static_cast<float>(1 / unit) : 0.0f;
    double yy = 0, yc = 0, cc = 0;
    for (const float value : y) {
      const float u = value * inverse;
      const std::size_t code = nearest_level(spec_.book, u);
      const double level = spec_.book.levels[code];
      yy += double{u} * u;
      yc += u * level;
      cc += level * level;
      codes.put(code, spec_.book.bits);
    }
    store_norm(header, norm * scale(yy, yc, cc));
    if (spec_.with_deviation) store_half(header + 2, static_cast<float>(deviation));
  }

  double scale(double yy, double yc, double cc) const {
    if (spec_.scale_rule == ScaleRule::kOne || !(yy > 0)) return 1;
    const double top = spec_.scale_rule == ScaleRule::kBiased ? yc : yy;
    const double bottom = spec_.scale_rule == ScaleRule::kUnbiased ? yc : cc;
    if (!(bottom > 0)) return kMaxScale;
    const double ratio = top / bottom;
    const bool root = spec_.scale_rule == ScaleRule::kNormCorrected;
    return std::clamp(root ? std::sqrt(ratio) : ratio, kMinScale, kMaxScale);
  }

  ScalarCodeSpec spec_;
  std::vector<float> analysis_;  // Pi^T, for row vectors
};

class PolarCode : public VectorCode {
 public:
  PolarCode(std::size_t size, std::vector<float> rotation, int bits, bool centre)
      : VectorCode(size),
        bits_(bits),
        rotation_(std::move(rotation)),
        analysis_(transposed_square(rotation_, size)) {
    const double step = 2 * std::numbers::pi / static_cast<double>(bins());
    for (std::size_t k = 0; k < bins(); ++k) {
      const double edge = step * static_cast<double>(k), read = edge + (centre ? step / 2 : 0);
      edges_.push_back({portable_cos(edge), portable_sin(edge)});
      read_.push_back({portable_cos(read), portable_sin(read)});
    }
  }

  std::size_t bytes() const override {
    return size() + bytes_of_bits(size() / 2 * static_cast<std::size_t>(bits_));
  }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    const std::vector<float> y = product(x, analysis_, size());
    for (std::size_t i = 0; i * size() < y.size(); ++i) {
      std::byte* const row = to.row(i);
      BitWriter codes({row + size(), bytes() - size()});
      for (std::size_t j = 0; j < size(); j += 2) {
        const double a = y[i * size() + j], b = y[i * size() + j + 1];
        store_norm(row + j, std::sqrt(a * a + b * b));
        codes.put(bin_of(a, b), bits_);
      }
    }
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    std::vector<float> y(x.size());
    for (std::size_t i = 0; i * size() < y.size(); ++i) {
      const std::byte* const row = from.row(i);
      BitReader codes({row + size(), bytes() - size()});
      for (std::size_t j = 0; j < size(); j += 2) {
        const double radius = load_half(row + j);
        const Direction& direction = read_[codes.get(bits_)];
        y[i * size() + j] = static_cast<float>(radius * direction.cos);
        y[i * size() + j + 1] = static_cast<float>(radius * direction.sin);
      }
    }
    const std::vector<float> back = product(y, rotation_, size());
    std::copy(back.begin(), back.end(), x.begin());
  }

 private:
  struct Direction {
    double cos, sin;
  };
  std::size_t bins() const { return std::size_t{1} << bits_; }

  /// By comparing with the bins' edges, which needs no arctangent: half a turn is taken off first,
  /// so that the sign of a cross product tells which side of an edge a direction is on.
  std::size_t bin_of(double a, double b) const {
    const bool lower_half = b < 0 || (b == 0 && a < 0);
    if (lower_half) a = -a, b = -b;
    const std::size_t half = bins() / 2;
    const auto beyond = std::partition_point(
        edges_.begin() + 1, edges_.begin() + static_cast<std::ptrdiff_t>(half),
        [&](const Direction& edge) { return b * edge.cos - a * edge.sin >= 0; });
    return static_cast<std::size_t>(beyond - edges_.begin()) - 1 + (lower_half ? half : 0);
  }

  int bits_;
  std::vector<float> rotation_, analysis_;  // Pi, Pi^T
  std::vector<Direction> edges_, read_;     // by bin
};

class AbsmaxCode : public VectorCode {
 public:
  AbsmaxCode(std::size_t size, int bits, std::size_t group)
      : VectorCode(size), bits_(bits), group_(group) {}

  std::size_t bytes() const override {
    const std::size_t rest = size() % group_;
    return size() / group_ * group_bytes(group_) + (rest == 0 ? 0 : group_bytes(rest));
  }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_group(x.size(), to, [&](std::size_t begin, std::size_t count, std::byte* bytes) {
      float largest = 0;
      for (const float value : x.subspan(begin, count))
        largest = std::max(largest, std::abs(value));
      const float scale = round_to_half(largest / top());
      store_half(bytes, scale);
      BitWriter codes({bytes + 2, group_bytes(count) - 2});
      for (const float value : x.subspan(begin, count)) {
        const float code = scale > 0 ? std::floor(value / scale + 0.5f) : 0;
        codes.put(static_cast<std::uint64_t>(static_cast<int>(std::clamp(code, -top(), top()))),
                  bits_);
      }
    });
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_group(
        x.size(), from, [&](std::size_t begin, std::size_t count, const std::byte* bytes) {
          const float scale = load_half(bytes);
          BitReader codes({bytes + 2, group_bytes(count) - 2});
          const int sign = 1 << (bits_ - 1);
          for (float& value : x.subspan(begin, count))
            value = scale * static_cast<float>((static_cast<int>(codes.get(bits_)) ^ sign) - sign);
        });
  }

 private:
  float top() const { return static_cast<float>((1 << (bits_ - 1)) - 1); }
  std::size_t group_bytes(std::size_t count) const {
    return 2 + bytes_of_bits(count * static_cast<std::size_t>(bits_));
  }
  template <class Byte, class Visit>
  void for_each_group(std::size_t values, PackedRows<Byte> rows, Visit visit) const {
    for (std::size_t i = 0; i * size() < values; ++i) {
      Byte* bytes = rows.row(i);
      for (std::size_t begin = 0; begin < size(); begin += group_) {
        const std::size_t count = std::min(group_, size() - begin);
        visit(i * size() + begin, count, bytes);
        bytes += group_bytes(count);
      }
    }
  }

  int bits_;
  std::size_t group_;
};

class SignSketch : public VectorCode {
 public:
  SignSketch(std::size_t size, std::vector<float> rows_matrix)
      : VectorCode(size), count_(rows_matrix.size() / size), rows_(std::move(rows_matrix)) {
    columns_.resize(rows_.size());
    for (std::size_t i = 0; i < count_; ++i)
      for (std::size_t j = 0; j < size; ++j) columns_[j * count_ + i] = rows_[i * size + j];
  }

  std::size_t bytes() const override { return 2 + bytes_of_bits(count_); }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    const std::vector<float> projected = product(x, columns_, size());
    for (std::size_t i = 0; i * size() < x.size(); ++i) {
      store_norm(to.row(i), norm_of(x.subspan(i * size(), size())));
      BitWriter signs({to.row(i) + 2, bytes() - 2});
      for (std::size_t row = 0; row < count_; ++row)
        signs.put(projected[i * count_ + row] < 0 ? 1 : 0, 1);
    }
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    const double per_row = std::sqrt(std::numbers::pi / 2) / static_cast<double>(count_);
    std::vector<float> terms(x.size() / size() * count_);
    for (std::size_t i = 0; i * size() < x.size(); ++i) {
      const auto term = static_cast<float>(per_row * load_half(from.row(i)));
      BitReader signs({from.row(i) + 2, bytes() - 2});
      for (std::size_t row = 0; row < count_; ++row)
        terms[i * count_ + row] = signs.get(1) ? -term : term;
    }
    const std::vector<float> sum = product(terms, rows_, count_);
    std::copy(sum.begin(), sum.end(), x.begin());
  }

 private:
  std::size_t count_;
  std::vector<float> rows_, columns_;  // S, S^T
};

}  // namespace

std::unique_ptr<VectorCode> make_scalar_code(ScalarCodeSpec spec) {
  return std::make_unique<ScalarCode>(std::move(spec));
}

std::unique_ptr<VectorCode> make_polar_code(std::size_t size, std::vector<float> rotation, int bits,
                                            bool centre) {
  return std::make_unique<PolarCode>(size, std::move(rotation), bits, centre);
}

std::unique_ptr<VectorCode> make_absmax_code(std::size_t size, int bits, std::size_t group) {
  return std::make_unique<AbsmaxCode>(size, bits, group);
}

std::unique_ptr<VectorCode> make_sign_sketch(std::size_t size, std::vector<float> rows_matrix) {
  return std::make_unique<SignSketch>(size, std::move(rows_matrix));
}

}  // namespace kvplan::quant
