// Small floating-point formats. Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP
// Microscaling Formats (MX) 1.0, section 6.3 for the conversion; NVIDIA's description of NVFP4
// (blocks of 16 with an e4m3 scale under an fp32 tensor scale).

#include <algorithm>
#include <cmath>

#include "quant/packing.h"
#include "quant/vector_code.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

/// Sign, exponent and fraction bits; infinities and NaN are not produced.
struct SmallFloat {
  int exponent_bits, fraction_bits;
  float largest;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int bits() const { return 1 + exponent_bits + fraction_bits; }

  /// Nearest value, ties to the even code; beyond the largest value, that one.
  unsigned encode(float x) const {
    const float magnitude = std::min(std::abs(x), largest);
    const int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), 1 - bias()) : 1 - bias();
    // In units of the last place; at most 2^(fraction_bits + 1), which carries into the exponent.
    const auto units =
        static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent)));
    const unsigned code = (static_cast<unsigned>(exponent + bias() - 1) << fraction_bits) + units;
    return code | (std::signbit(x) ? 1u << (bits() - 1) : 0);
  }

  float decode(unsigned code) const {
    const int exponent = static_cast<int>(code >> fraction_bits) & ((1 << exponent_bits) - 1);
    const int fraction = static_cast<int>(code) & ((1 << fraction_bits) - 1);
    const int units = exponent == 0 ? fraction : fraction | 1 << fraction_bits;
    const float magnitude =
        std::ldexp(static_cast<float>(units), std::max(exponent, 1) - bias() - fraction_bits);
    return code >> (bits() - 1) ? -magnitude : magnitude;
  }
};

constexpr SmallFloat kE4m3{4, 3, 448}, kE5m2{5, 2, 57344}, kE2m1{2, 1, 6};

/// One byte per value.
class Fp8Code : public VectorCode {
 public:
  Fp8Code(std::size_t size, SmallFloat format, float scale)
      : VectorCode(size), format_(format), scale_(scale) {
    for (unsigned code = 0; code < 256; ++code) values_.push_back(scale * format.decode(code));
  }
  std::size_t bytes() const override { return size(); }
  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for (std::size_t i = 0; i < x.size(); ++i)
      to.row(i / size())[i % size()] = static_cast<std::byte>(format_.encode(x[i] / scale_));
  }
  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = values_[std::to_integer<std::size_t>(from.row(i / size())[i % size()])];
  }

 private:
  SmallFloat format_;
  float scale_;
  std::vector<float> values_;  // by code
};

/// Power of two 2^(code - 127) that puts the block's largest magnitude into e2m1's top binade.
struct MxScale {
  static constexpr std::size_t kBlock = 32;
  static constexpr int kBias = 127, kTopExponent = 2;  // of 6 = 1.5 x 2^2
  float decode(unsigned code) const { return std::ldexp(1.0f, static_cast<int>(code) - kBias); }
  unsigned encode(float largest) const {
    if (largest == 0) return 0;
    return static_cast<unsigned>(std::max(std::ilogb(largest) - kTopExponent + kBias, 0));
  }
};

/// e4m3 multiple of the tensor's scale that maps the block's largest magnitude to 6.
struct NvScale {
  static constexpr std::size_t kBlock = 16;
  float tensor;
  float decode(unsigned code) const { return tensor * kE4m3.decode(code); }
  unsigned encode(float largest) const { return kE4m3.encode(largest / kE2m1.largest / tensor); }
};

/// Blocks of a scale byte and e2m1 codes, the first of two in the low nibble.
template <class Scale>
class BlockFloatCode : public VectorCode {
 public:
  BlockFloatCode(std::size_t size, Scale scale) : VectorCode(size), scale_(scale) {}

  std::size_t bytes() const override {
    const std::size_t rest = size() % Scale::kBlock;
    return size() / Scale::kBlock * block_bytes(Scale::kBlock) +
           (rest == 0 ? 0 : block_bytes(rest));
  }

  void encode(std::span<const float> x, PackedRows<std::byte> to) const override {
    for_each_block(x.size(), to, [&](std::size_t begin, std::size_t count, std::byte* bytes) {
      float largest = 0;
      for (const float value : x.subspan(begin, count))
        largest = std::max(largest, std::abs(value));
      const unsigned code = scale_.encode(largest);
      const float scale = scale_.decode(code);
      BitWriter writer({bytes, block_bytes(count)});
      writer.put(code, 8);
      for (const float value : x.subspan(begin, count))
        writer.put(scale > 0 ? kE2m1.encode(value / scale) : 0, kE2m1.bits());
    });
  }

  void decode(PackedRows<const std::byte> from, std::span<float> x) const override {
    for_each_block(
        x.size(), from, [&](std::size_t begin, std::size_t count, const std::byte* bytes) {
          BitReader reader({bytes, block_bytes(count)});
          const float scale = scale_.decode(static_cast<unsigned>(reader.get(8)));
          for (float& value : x.subspan(begin, count))
            value = scale * kE2m1.decode(static_cast<unsigned>(reader.get(kE2m1.bits())));
        });
  }

 private:
  static std::size_t block_bytes(std::size_t count) { return 1 + (count + 1) / 2; }
  template <class Byte, class Visit>
  void for_each_block(std::size_t values, PackedRows<Byte> rows, Visit visit) const {
    for (std::size_t i = 0; i * size() < values; ++i) {
      Byte* bytes = rows.row(i);
      for (std::size_t begin = 0; begin < size(); begin += Scale::kBlock) {
        const std::size_t count = std::min(Scale::kBlock, size() - begin);
        visit(i * size() + begin, count, bytes);
        bytes += block_bytes(count);
      }
    }
  }
  Scale scale_;
};

}  // namespace

std::unique_ptr<VectorCode> make_float_code(const std::string& format, std::size_t size,
                                            float scale) {
  if (format == "fp8_e4m3") return std::make_unique<Fp8Code>(size, kE4m3, scale);
  if (format == "fp8_e5m2") return std::make_unique<Fp8Code>(size, kE5m2, scale);
  if (format == "mxfp4") return std::make_unique<BlockFloatCode<MxScale>>(size, MxScale{});
  if (format == "nvfp4") return std::make_unique<BlockFloatCode<NvScale>>(size, NvScale{scale});
  throw InternalError("no small float format is called " + format);
}

float largest_float(const std::string& format) {
  if (format == "fp8_e4m3") return kE4m3.largest;
  if (format == "fp8_e5m2") return kE5m2.largest;
  return kE4m3.largest * kE2m1.largest;
}

}  // namespace kvplan::quant
