#include "exporters/stack_tables.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "schemas/error.h"

namespace kvplan::exporters {
namespace {

// Squared error relative to the energy, of Gaussian vectors of 128 elements: Lloyd-Max levels (Max
// 1960, table I) and integers between minimum and maximum of the vector or of groups.
constexpr std::array<double, 5> kLloydMax = {1, 0.3634, 0.1175, 0.03454, 0.009497};
constexpr std::array<double, 9> kMinMaxVector = {1,       1,        0.251,    0.0459,   0.00999,
                                                 0.00234, 0.000566, 0.000139, 0.0000345};
constexpr std::array<double, 9> kMinMaxGroup = {1,       1,        0.178,     0.0326,   0.00708,
                                                0.00166, 0.000401, 0.0000989, 0.0000245};
constexpr double kFp8Error = 0.0007, kNvfp4Error = 0.00905, kInt8Error = 0.000042;
constexpr int kNormBytes = 2;    // one fp16
constexpr int kMinMaxBytes = 4;  // fp16 scale and minimum
constexpr int kScaleBytes = 4;   // one fp32
constexpr int kKiviGroup = 32;
constexpr int kHfMaxGroup = 64;

struct GgmlType {
  std::string_view name;
  int width, block, block_bytes;
  double error;
};
constexpr std::array<GgmlType, 7> kGgmlTypes = {{{"q4_0", 4, 32, 18, 0.00738},
                                                 {"q5_0", 5, 32, 22, 0.00183},
                                                 {"q6_0", 6, 32, 26, 0.000454},
                                                 {"q8_0", 8, 32, 34, 0.0000287},
                                                 {"turbo2", 2, 128, 34, kLloydMax[2]},
                                                 {"turbo3", 3, 128, 50, kLloydMax[3]},
                                                 {"turbo4", 4, 128, 68, kLloydMax[4]}}};

struct BuunTier {
  std::string_view tier, type;
  int width, block_bytes;  // of 128 values
  double error;
};
// The error of trellis codes is that of our own (data/trellis).
constexpr std::array<BuunTier, 6> kBuunTiers = {{{"t1", "turbo1_tcq", 1, 20, 0.282},
                                                 {"t2", "turbo2_tcq", 2, 36, 0.0758},
                                                 {"t3", "turbo3_tcq", 3, 52, 0.0204},
                                                 {"t4", "turbo4", 4, 66, kLloydMax[4]},
                                                 {"t8", "turbo8", 8, 130, 0.00005},
                                                 {"f16", "f16", 16, 256, 0}}};

}  // namespace

Format plain_format(std::string_view name) { return {.name = std::string(name), .codec = "fp16"}; }

Format fp8_format(std::string_view codec) {
  return {.name = "fp8",
          .width = 8,
          .block = 1,
          .block_bytes = 1,
          .codec = std::string(codec),
          .relative_error = kFp8Error};
}

Format nvfp4_format() {
  return {.name = "nvfp4",
          .width = 4,
          .block = 16,
          .block_bytes = 9,
          .codec = "nvfp4",
          .relative_error = kNvfp4Error};
}

Format vllm_format(const VllmDtype& dtype, Side side) {
  const int bits = side == Side::kKey ? dtype.k_bits : dtype.v_bits;
  const auto width = static_cast<std::size_t>(bits);
  Format format{.name = std::string(dtype.name) + (side == Side::kKey ? "" : " (V)"),
                .width = bits,
                .codec = std::string(dtype.name)};
  if (dtype.name == "fp8" || (dtype.turboquant && bits == 8)) {
    format.block = format.block_bytes = 1;
    format.relative_error = kFp8Error;
    if (dtype.name == "fp8") format.codec = "fp8_e4m3+unit";
  } else if (dtype.name == "nvfp4") {
    format = nvfp4_format();
    format.name = std::string(dtype.name) + (side == Side::kKey ? "" : " (V)");
    format.codec = "nvfp4+unit";
  } else {
    format.block = 8;
    format.block_bytes = bits;
    format.vector_bytes = !dtype.turboquant    ? kScaleBytes
                          : side == Side::kKey ? kNormBytes
                                               : kMinMaxBytes;
    format.relative_error = dtype.turboquant && side == Side::kKey ? kLloydMax[width]
                            : bits == 8                            ? kInt8Error
                                                                   : kMinMaxVector[width];
  }
  return format;
}

std::vector<Format> ggml_formats(std::initializer_list<std::string_view> names) {
  std::vector<Format> formats;
  for (const std::string_view name : names) {
    if (name == "f16") {
      formats.push_back(plain_format(name));
      continue;
    }
    const auto type = std::ranges::find(kGgmlTypes, name, &GgmlType::name);
    if (type == kGgmlTypes.end())
      throw InternalError("no ggml type '" + std::string(name) + "' in the table");
    formats.push_back({.name = std::string(name),
                       .width = type->width,
                       .block = type->block,
                       .block_bytes = type->block_bytes,
                       .codec = name.starts_with("turbo") ? "" : std::string(name),
                       .relative_error = type->error});
  }
  return formats;
}

std::vector<Format> buun_formats() {
  std::vector<Format> formats;
  for (const BuunTier& tier : kBuunTiers) {
    if (tier.type == "f16") {
      formats.push_back(plain_format("f16"));
      continue;
    }
    formats.push_back({.name = std::string(tier.type),
                       .width = tier.width,
                       .block = 128,
                       .block_bytes = tier.block_bytes,
                       .relative_error = tier.error});
  }
  return formats;
}

std::string_view buun_tier(std::string_view type) {
  const auto found = std::ranges::find(kBuunTiers, type, &BuunTier::type);
  if (found == kBuunTiers.end()) throw InternalError("no tier of " + std::string(type));
  return found->tier;
}

Format kvtuner_format(int width, std::string_view scheme) {
  const bool kivi = scheme == "kivi";
  const std::string name = std::to_string(width);
  return {.name = name,
          .width = width,
          .block = kivi ? kKiviGroup : 8,
          .block_bytes = kivi ? kKiviGroup / 8 * width + kMinMaxBytes : width,
          .vector_bytes = kivi ? 0 : kMinMaxBytes,
          .codec = "kvtuner:" + name + (kivi ? "" : "+pertoken"),
          .relative_error = (kivi ? kMinMaxGroup : kMinMaxVector)[static_cast<std::size_t>(width)]};
}

int hf_group(const CacheShape& shape) {
  int common = 0;
  for (const LayerShape& layer : shape.layers)
    if (layer.cached()) common = std::gcd(common, std::gcd(layer.head_dim[0], layer.head_dim[1]));
  for (int group = std::min(common, kHfMaxGroup); group > 1; --group)
    if (common % group == 0) return group;
  return 1;
}

Format hf_format(int width, int group) {
  return {.name = std::to_string(width),
          .width = width,
          .block = group,
          .block_bytes = (group * width + 7) / 8 + 2 * kScaleBytes,
          .codec = "hf:" + std::to_string(width) + "+g" + std::to_string(group),
          .relative_error = kMinMaxGroup[static_cast<std::size_t>(width)]};
}

std::vector<Format> lmdeploy_formats(bool fp8) {
  Format turbo_k{.name = "turbo_quant",
                 .width = 3,
                 .block = 2,
                 .block_bytes = 1,  // three bits of code, one sign of the residual
                 .vector_bytes = 2 * kNormBytes,
                 .codec = "lmdeploy_turbo",
                 .relative_error = kLloydMax[3]};
  Format turbo_v{.name = "turbo_quant (V)",
                 .width = 2,
                 .block = 4,
                 .block_bytes = 1,
                 .vector_bytes = kNormBytes,
                 .codec = "lmdeploy_turbo",
                 .relative_error = kLloydMax[2]};
  Format int4{.name = "int4",
              .width = 4,
              .block = 2,
              .block_bytes = 1,
              .vector_bytes = kMinMaxBytes,
              .codec = "lmdeploy_int4",
              .relative_error = kMinMaxVector[4]};
  Format int8{.name = "int8",
              .width = 8,
              .block = 1,
              .block_bytes = 1,
              .vector_bytes = kMinMaxBytes,
              .codec = "lmdeploy_int8",
              .relative_error = kMinMaxVector[8]};
  return {turbo_k, turbo_v, int4, fp8 ? fp8_format("fp8_e4m3+unit") : int8};
}

}  // namespace kvplan::exporters
