#include "quant/stack_codes.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>

#include "quant/codec_checks.h"
#include "quant/packing.h"
#include "quant/portable_math.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

constexpr std::size_t kHalfBytes = 2, kFloatBytes = 4;

std::size_t code_bytes(std::size_t count, int bits) {
  return (count * static_cast<std::size_t>(bits) + 7) / 8;
}

/// A norm beyond fp16, which the stacks would store as infinity, is cut to its largest value.
void store_norm(std::byte* to, float norm) { store_half(to, std::min(norm, kHalfMax)); }

void store_float(std::byte* to, float value) { std::memcpy(to, &value, sizeof value); }
float load_float(const std::byte* from) {
  float value = 0;
  std::memcpy(&value, from, sizeof value);
  return value;
}

float largest_magnitude(std::span<const float> x) {
  float largest = 0;
  for (const float value : x) largest = std::max(largest, std::abs(value));
  return largest;
}

/// Calls visit(vector, row) for each vector of [count, size].
template <class Value, class Byte, class Visit>
void for_each_vector(std::size_t size, std::span<Value> x, PackedRows<Byte> rows, Visit visit) {
  for (std::size_t i = 0; i * size < x.size(); ++i) visit(x.subspan(i * size, size), rows.row(i));
}

/// Truncation towards 0 after half away from it, as `(x >= 0 ? x + .5 : x - .5).to(int)`.
float round_half_away(float x) { return std::trunc(x >= 0 ? x + 0.5f : x - 0.5f); }

class VllmInt8 : public VectorCode {
 public:
  using VectorCode::VectorCode;
  std::size_t bytes() const override { return size() + kFloatBytes; }
  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_vector(size(), x, to, [&](std::span<const float> v, std::byte* row) {
      const float scale = std::max(largest_magnitude(v) / 127.0f, 1e-6f), inverse = 1.0f / scale;
      for (std::size_t i = 0; i < size(); ++i) {
        const float code = v[i] * inverse;
        const float shifted = std::clamp(code >= 0 ? code + 0.5f : code - 0.5f, -128.0f, 127.0f);
        row[i] = static_cast<std::byte>(static_cast<std::int8_t>(shifted));
      }
      store_float(row + size(), scale);
    });
  }
  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_vector(size(), x, from, [&](std::span<float> v, const std::byte* row) {
      const float scale = load_float(row + size());
      for (std::size_t i = 0; i < size(); ++i)
        v[i] = static_cast<float>(static_cast<std::int8_t>(row[i])) * scale;
    });
  }
};

/// Coordinates that vLLM flips before its transform, bit i of word i / 32. They are the draws of
/// `torch.Generator().manual_seed(0x9E3779B9)` through torch.bernoulli(0.5), 0 flipping; a shorter
/// vector takes the first ones (tests/quant/make_stack_golden.py prints them).
constexpr std::array<std::uint32_t, 16> kFlipped = {
    0x9a8ca6f2, 0x7f7fca4e, 0x59bbc293, 0x9480abc7, 0xb55b747e, 0x54503bbe, 0xcdf467b7, 0x05dfbc5f,
    0xb291e3cc, 0x57563834, 0xe46ae225, 0x67fc4ca6, 0xcfc78691, 0x32d9dff1, 0x365fdb89, 0x75625346};

class VllmInt4 : public VectorCode {
 public:
  explicit VllmInt4(std::size_t size)
      : VectorCode(size), tile_(std::size_t{1} << std::countr_zero(size)) {
    if (tile_ > 32 * kFlipped.size())
      throw InternalError("int4_per_token_head with a transform of " + std::to_string(tile_));
  }
  std::size_t bytes() const override { return size() / 2 + kFloatBytes; }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_vector(size(), x, to, [&](std::span<const float> v, std::byte* row) {
      std::vector<float> y(v.begin(), v.end());
      flip(y);
      hadamard_tiles(y, tile_);
      const auto [low, high] = std::ranges::minmax(y);
      const float scale = std::max((high - low) / 15.0f, 1e-6f), inverse = 1.0f / scale;
      const float zero = std::clamp(round_half_away(-low / scale), 0.0f, 15.0f);
      for (std::size_t i = 0; i < size(); i += 2)
        row[i / 2] = static_cast<std::byte>(code(y[i] * inverse + zero) |
                                            code(y[i + 1] * inverse + zero) << 4);
      const std::uint32_t bits = (std::bit_cast<std::uint32_t>(scale) & ~std::uint32_t{15}) |
                                 static_cast<std::uint32_t>(zero);
      store_float(row + size() / 2, std::bit_cast<float>(bits));
    });
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_vector(size(), x, from, [&](std::span<float> v, const std::byte* row) {
      const auto bits = std::bit_cast<std::uint32_t>(load_float(row + size() / 2));
      const float scale = std::bit_cast<float>(bits & ~std::uint32_t{15});
      const int zero = static_cast<int>(bits & 15);
      for (std::size_t i = 0; i < size(); ++i) {
        const int packed = std::to_integer<int>(row[i / 2]);
        v[i] = static_cast<float>((packed >> (i % 2 * 4) & 15) - zero) * scale;
      }
      hadamard_tiles(v, tile_);
      flip(v);
      for (float& value : v) value /= static_cast<float>(tile_);
    });
  }

 private:
  static int code(float shifted) {
    return static_cast<int>(std::clamp(round_half_away(shifted), 0.0f, 15.0f));
  }
  void flip(std::span<float> x) const {
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::size_t at = i % tile_;
      if (kFlipped[at / 32] >> at % 32 & 1) x[i] = -x[i];
    }
  }
  std::size_t tile_;
};

/// vLLM's own Lloyd-Max iteration for N(0, 1/size): trapezoids of 200 steps, outer edges at 10.5
/// standard deviations, at most 200 rounds. It stops short of the optimum, so the true book would
/// give other codes. Source: quantization/turboquant/centroids.py.
std::vector<float> vllm_levels(std::size_t size, int bits) {
  constexpr int kSteps = 200, kRounds = 200;
  constexpr double kTolerance = 1e-10;
  const double variance = 1 / static_cast<double>(size), sigma = std::sqrt(variance);
  const auto density = [&](double x) {
    return 1 / std::sqrt(2 * std::numbers::pi * variance) * portable_exp(-x * x / (2 * variance));
  };
  const auto integral = [&](auto f, double a, double b) {
    const double h = (b - a) / kSteps;
    double sum = (f(a) + f(b)) / 2;
    for (int i = 1; i < kSteps; ++i) sum += f(a + i * h);
    return sum * h;
  };
  const std::size_t count = std::size_t{1} << bits;
  const double low = -3.5 * sigma, high = 3.5 * sigma;
  std::vector<double> levels, edges(count + 1);
  for (std::size_t i = 0; i < count; ++i)
    levels.push_back(low +
                     (high - low) * (static_cast<double>(i) + 0.5) / static_cast<double>(count));
  for (int round = 0; round < kRounds; ++round) {
    edges.front() = low * 3;
    edges.back() = high * 3;
    for (std::size_t i = 1; i < count; ++i) edges[i] = (levels[i - 1] + levels[i]) / 2;
    double change = 0;
    std::vector<double> next = levels;
    for (std::size_t i = 0; i < count; ++i) {
      const double mass = integral(density, edges[i], edges[i + 1]);
      if (mass > 1e-15)
        next[i] = integral([&](double x) { return x * density(x); }, edges[i], edges[i + 1]) / mass;
      change = std::max(change, std::abs(next[i] - levels[i]));
    }
    if (change < kTolerance) break;
    levels = next;
  }
  return {levels.begin(), levels.end()};
}

/// The number of boundaries that are <= x (`inclusive`) or < x.
int bin_of(std::span<const float> boundaries, float x, bool inclusive) {
  const auto at =
      inclusive ? std::ranges::upper_bound(boundaries, x) : std::ranges::lower_bound(boundaries, x);
  return static_cast<int>(at - boundaries.begin());
}

class VllmTurboKey : public VectorCode {
 public:
  VllmTurboKey(std::size_t size, int bits)
      : VectorCode(size),
        bits_(bits),
        unit_(1 / std::sqrt(static_cast<float>(size))),
        levels_(vllm_levels(size, bits)),
        boundaries_(midpoints(levels_)) {}
  std::size_t bytes() const override { return code_bytes(size(), bits_) + kHalfBytes; }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_vector(size(), x, to, [&](std::span<const float> v, std::byte* row) {
      float square = 0;
      for (const float value : v) square += value * value;
      const float norm = std::sqrt(square);
      std::vector<float> y(v.begin(), v.end());
      for (float& value : y) value = value / (norm + 1e-8f) * unit_;
      hadamard_tiles(y, size());
      BitWriter codes({row, code_bytes(size(), bits_)});
      for (const float value : y)
        codes.put(static_cast<std::uint64_t>(bin_of(boundaries_, value, true)), bits_);
      store_norm(row + code_bytes(size(), bits_), norm);
    });
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_vector(size(), x, from, [&](std::span<float> v, const std::byte* row) {
      BitReader codes({row, code_bytes(size(), bits_)});
      float square = 0;
      for (float& value : v) {
        value = levels_[codes.get(bits_)];
        square += value * value;
      }
      const float norm = load_half(row + code_bytes(size(), bits_)) / std::sqrt(square + 1e-16f);
      for (float& value : v) value *= norm * unit_;
      hadamard_tiles(v, size());
    });
  }

 private:
  int bits_;
  float unit_;
  std::vector<float> levels_, boundaries_;
};

class VllmTurboValue : public VectorCode {
 public:
  VllmTurboValue(std::size_t size, int bits) : VectorCode(size), bits_(bits) {}
  std::size_t bytes() const override { return code_bytes(size(), bits_) + 2 * kHalfBytes; }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_vector(size(), x, to, [&](std::span<const float> v, std::byte* row) {
      const auto [low, high] = std::ranges::minmax(v);
      const int top = (1 << bits_) - 1;
      const float scale = std::max((high - low) / static_cast<float>(top), 1e-8f);
      BitWriter codes({row, code_bytes(size(), bits_)});
      for (const float value : v)
        codes.put(static_cast<std::uint64_t>(
                      std::clamp(static_cast<int>((value - low) / scale + 0.5f), 0, top)),
                  bits_);
      store_half(row + code_bytes(size(), bits_), scale);
      store_half(row + code_bytes(size(), bits_) + kHalfBytes, low);
    });
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_vector(size(), x, from, [&](std::span<float> v, const std::byte* row) {
      BitReader codes({row, code_bytes(size(), bits_)});
      const std::byte* const side = row + code_bytes(size(), bits_);
      const float scale = load_half(side), low = load_half(side + kHalfBytes);
      for (float& value : v) value = static_cast<float>(codes.get(bits_)) * scale + low;
    });
  }

 private:
  int bits_;
};

/// fp16 arithmetic; what overflows in the stack is cut to the largest value here.
float half_of(float x) { return round_to_half(std::clamp(x, -kHalfMax, kHalfMax)); }

class LmdeployCode : public VectorCode {
 public:
  LmdeployCode(std::size_t size, int bits) : VectorCode(size), bits_(bits) {}
  std::size_t bytes() const override { return code_bytes(size(), bits_) + 2 * kHalfBytes; }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_vector(size(), x, to, [&](std::span<const float> v, std::byte* row) {
      const auto [low, high] = std::ranges::minmax(v);
      const float scale = bits_ == 8 ? half_of(half_of(high - low) / 255.0f) : (high - low) / 15.0f;
      if (scale == 0) return;  // the row is 0 already
      const float zero = bits_ == 8 ? half_of(-low / scale) : -low / scale;
      for (std::size_t i = 0; i < size(); ++i)
        row[at(i)] |= static_cast<std::byte>(code(v[i], scale, zero) << shift(i));
      store_half(row + code_bytes(size(), bits_), scale);
      store_half(row + code_bytes(size(), bits_) + kHalfBytes, zero);
    });
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_vector(size(), x, from, [&](std::span<float> v, const std::byte* row) {
      const std::byte* const side = row + code_bytes(size(), bits_);
      const float scale = load_half(side), zero = load_half(side + kHalfBytes);
      for (std::size_t i = 0; i < size(); ++i) {
        const int packed = std::to_integer<int>(row[at(i)]);
        v[i] = (static_cast<float>(packed >> shift(i) & ((1 << bits_) - 1)) - zero) * scale;
      }
    });
  }

 private:
  std::size_t at(std::size_t i) const { return bits_ == 8 ? i : i % (size() / 2); }
  int shift(std::size_t i) const { return bits_ == 8 || i < size() / 2 ? 0 : 4; }
  int code(float value, float scale, float zero) const {
    const float shifted = bits_ == 8 ? half_of(half_of(half_of(value / scale) + zero) + 0.5f)
                                     : value / scale + zero + 0.5f;
    return std::clamp(static_cast<int>(shifted), 0, (1 << bits_) - 1);
  }
  int bits_;
};

/// Levels and boundaries for N(0,1) as LMDeploy ships them (pytorch/kernels/cuda/turbo_quant.py).
/// The boundaries are those of the round before the levels, not their midpoints.
constexpr std::array<float, 8> kLmdeployKeyLevels = {-2.1519456f, -1.3439093f, -0.7560052f,
                                                     -0.2450942f, 0.2450942f,  0.7560052f,
                                                     1.3439093f,  2.1519456f};
constexpr std::array<float, 7> kLmdeployKeyBoundaries = {-1.7479274f, -1.0499573f, -0.5005497f, 0,
                                                         0.5005497f,  1.0499573f,  1.7479274f};
constexpr std::array<float, 4> kLmdeployValueLevels = {-1.5104176f, -0.4527808f, 0.4527808f,
                                                       1.5104176f};
constexpr std::array<float, 3> kLmdeployValueBoundaries = {-0.9815992f, 0, 0.9815992f};

class LmdeployTurbo : public VectorCode {
 public:
  LmdeployTurbo(std::size_t size, bool key)
      : VectorCode(size),
        key_(key),
        bits_(key ? 4 : 2),
        per_byte_(8 / static_cast<std::size_t>(bits_)),
        unit_(1 / std::sqrt(static_cast<float>(size))) {
    const auto scaled = [&](auto values) {
      for (float& value : values) value *= unit_;
      return std::vector<float>(values.begin(), values.end());
    };
    levels_ = key ? scaled(kLmdeployKeyLevels) : scaled(kLmdeployValueLevels);
    boundaries_ = key ? scaled(kLmdeployKeyBoundaries) : scaled(kLmdeployValueBoundaries);
  }
  std::size_t bytes() const override { return size() / per_byte_ + kHalfBytes * (key_ ? 2 : 1); }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_vector(size(), x, to, [&](std::span<const float> v, std::byte* row) {
      std::vector<float> y(v.begin(), v.end());
      transform(y);
      float square = 0;
      for (float& value : y) {
        value = half_of(value);  // the transform gives the model's type
        square += value * value;
      }
      const float norm = std::sqrt(square + 1e-8f);
      float left = 0;
      for (std::size_t i = 0; i < size(); ++i) {
        const float u = y[i] / norm;
        int code = bin_of(boundaries_, u, false);
        if (key_) {
          const float residual = u - levels_[static_cast<std::size_t>(code)];
          left += residual * residual;
          code |= residual >= 0 ? 8 : 0;
        }
        row[i % stride()] |= static_cast<std::byte>(code << shift(i));
      }
      store_norm(row + stride(), norm);
      if (key_) store_half(row + stride() + kHalfBytes, std::sqrt(left + 1e-8f) * unit_);
    });
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_vector(size(), x, from, [&](std::span<float> v, const std::byte* row) {
      const float norm = load_half(row + stride());
      const float left = key_ ? load_half(row + stride() + kHalfBytes) : 0;
      for (std::size_t i = 0; i < size(); ++i) {
        const int code = std::to_integer<int>(row[i % stride()]) >> shift(i) & ((1 << bits_) - 1);
        const float level = levels_[static_cast<std::size_t>(key_ ? code & 7 : code)];
        v[i] = half_of(norm * (level + (code & 8 ? left : -left)));
      }
      transform(v);
    });
  }

 private:
  std::size_t stride() const { return size() / per_byte_; }
  int shift(std::size_t i) const { return static_cast<int>(i / stride()) * bits_; }
  void transform(std::span<float> x) const {
    hadamard_tiles(x, size());
    for (float& value : x) value *= unit_;
  }
  bool key_;
  int bits_;  // of a stored field
  std::size_t per_byte_;
  float unit_;
  std::vector<float> levels_, boundaries_;
};

class HfCode : public VectorCode {
 public:
  HfCode(std::size_t size, int bits, std::size_t group)
      : VectorCode(size), bits_(bits), group_(group) {}
  std::size_t bytes() const override { return size() / group_ * group_bytes(); }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_group(x, to, [&](std::span<const float> v, std::byte* bytes) {
      const auto [low, high] = std::ranges::minmax(v);
      const float top = static_cast<float>((1 << bits_) - 1);
      const float step = std::max((high - low) / top, 1e-8f);
      BitWriter codes({bytes, code_bytes(group_, bits_)});
      for (const float value : v)
        codes.put(static_cast<std::uint64_t>(std::nearbyint((value - low) / step)), bits_);
      store_float(bytes + code_bytes(group_, bits_), step);
      store_float(bytes + code_bytes(group_, bits_) + kFloatBytes, low);
    });
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_group(x, from, [&](std::span<float> v, const std::byte* bytes) {
      BitReader codes({bytes, code_bytes(group_, bits_)});
      const std::byte* const side = bytes + code_bytes(group_, bits_);
      const float step = load_float(side), low = load_float(side + kFloatBytes);
      for (float& value : v) value = half_of(static_cast<float>(codes.get(bits_)) * step + low);
    });
  }

 private:
  std::size_t group_bytes() const { return code_bytes(group_, bits_) + 2 * kFloatBytes; }
  template <class Value, class Byte, class Visit>
  void for_each_group(std::span<Value> x, PackedRows<Byte> rows, Visit visit) const {
    for_each_vector(size(), x, rows, [&](std::span<Value> v, Byte* bytes) {
      for (std::size_t begin = 0; begin < size(); begin += group_, bytes += group_bytes())
        visit(v.subspan(begin, group_), bytes);
    });
  }
  int bits_;
  std::size_t group_;
};

}  // namespace

void hadamard_tiles(std::span<float> x, std::size_t tile) {
  for (std::size_t begin = 0; begin < x.size(); begin += tile)
    for (std::size_t half = 1; half < tile; half *= 2)
      for (std::size_t i = begin; i < begin + tile; i += 2 * half)
        for (std::size_t j = i; j < i + half; ++j) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
}

std::unique_ptr<VectorCode> make_vllm_int8_code(std::size_t size) {
  return std::make_unique<VllmInt8>(size);
}
std::unique_ptr<VectorCode> make_vllm_int4_code(std::size_t size) {
  return std::make_unique<VllmInt4>(size);
}
std::unique_ptr<VectorCode> make_vllm_turbo_key_code(std::size_t size, int bits) {
  return std::make_unique<VllmTurboKey>(size, bits);
}
std::unique_ptr<VectorCode> make_vllm_turbo_value_code(std::size_t size, int bits) {
  return std::make_unique<VllmTurboValue>(size, bits);
}
std::unique_ptr<VectorCode> make_lmdeploy_code(std::size_t size, int bits) {
  return std::make_unique<LmdeployCode>(size, bits);
}
std::unique_ptr<VectorCode> make_lmdeploy_turbo_key_code(std::size_t size) {
  return std::make_unique<LmdeployTurbo>(size, true);
}
std::unique_ptr<VectorCode> make_lmdeploy_turbo_value_code(std::size_t size) {
  return std::make_unique<LmdeployTurbo>(size, false);
}
std::unique_ptr<VectorCode> make_hf_code(std::size_t size, int bits, std::size_t group) {
  return std::make_unique<HfCode>(size, bits, group);
}

}  // namespace kvplan::quant
