// The means of keys as a GGUF v3 file: header, two metadata, F32 tensors.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

#include "exporters/writers.h"
#include "schemas/error.h"
#include "schemas/gguf.h"

namespace kvplan::exporters {
namespace {

constexpr std::uint32_t kGgufVersion = 3, kBoolType = 7, kStringType = 8;
constexpr std::size_t kAlignment = 32;  // GGUF's default

template <class T>
void append(std::string& out, T value) {
  static_assert(std::endian::native == std::endian::little);
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}

void append_string(std::string& out, std::string_view text) {
  append(out, static_cast<std::uint64_t>(text.size()));
  out += text;
}

void pad(std::string& out) {
  out.append((kAlignment - out.size() % kAlignment) % kAlignment, '\0');
}

/// Unsigned orthonormal Hadamard transform (Sylvester order) of each tile in place.
void transform_tiles(std::span<float> x, std::size_t tile) {
  for (std::size_t begin = 0; begin < x.size(); begin += tile) {
    for (std::size_t half = 1; half < tile; half *= 2)
      for (std::size_t block = begin; block < begin + tile; block += 2 * half)
        for (std::size_t i = block; i < block + half; ++i) {
          const float a = x[i], b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
    const float scale = 1 / std::sqrt(static_cast<float>(tile));
    for (std::size_t i = begin; i < begin + tile; ++i) x[i] *= scale;
  }
}

}  // namespace

std::string mean_centre_gguf(const PlanBundle& bundle, const Projection& projection,
                             const std::string& file) {
  bool rotated = false;
  std::map<int, std::vector<float>> means;
  for (int l = 0; l < projection.shape.num_layers(); ++l) {
    if (!projection.cached(l)) continue;
    const std::string prefix = "layers." + std::to_string(l) + ".k.";
    const Format& format = projection.format(l, Side::kKey);
    if (format.name != "q4_0")
      throw InputError(file, "/layers/" + std::to_string(l) + "/k/bits",
                       "--mean-centre works with keys of type q4_0 alone, this plan exports them "
                       "as " +
                           format.name + "; plan keys of at most 4 bits, or leave it out");
    const bool known = static_cast<std::size_t>(l) < bundle.tensors.layers.size();
    const Array<float> none;
    const Array<float>& mean =
        known ? bundle.tensors.layers[static_cast<std::size_t>(l)].k.mean_rotated : none;
    if (mean.empty())
      throw InputError(file, prefix + "mean_rotated",
                       "--mean-centre needs the means of keys after rotary, the plan has none; "
                       "plan with --codec calibrated, without --no-centre");
    auto& values = means[l] = mean.data;
    const int tile = projection.rotation[static_cast<std::size_t>(l)][0].tile;
    if (tile > 0) transform_tiles(values, static_cast<std::size_t>(tile));
    rotated = rotated || tile > 0;
  }

  std::string out = "GGUF";
  append(out, kGgufVersion);
  append(out, static_cast<std::uint64_t>(means.size()));
  append(out, std::uint64_t{2});
  append_string(out, "general.type");
  append(out, kStringType);
  append_string(out, "kv-mean-center");
  append_string(out, "kv_mean_center.k_rot");
  append(out, kBoolType);
  append(out, static_cast<std::uint8_t>(rotated));
  std::uint64_t offset = 0;
  for (const auto& [layer, values] : means) {
    append_string(out, "kv_bar.blk." + std::to_string(layer) + ".k");
    append(out, std::uint32_t{1});
    append(out, static_cast<std::uint64_t>(values.size()));
    append(out, static_cast<std::uint32_t>(GgmlType::kF32));
    append(out, offset);
    const std::uint64_t bytes = values.size() * sizeof(float);
    offset += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  pad(out);
  for (const auto& [layer, values] : means) {
    out.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    pad(out);
  }
  return out;
}

}  // namespace kvplan::exporters
