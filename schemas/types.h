#pragma once
// Plain value types that every folder shares: the two cache sides, dense arrays, the model
// fingerprint.

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace kvplan {

enum class Side { kKey = 0, kValue = 1 };
inline constexpr std::array<Side, 2> kSides = {Side::kKey, Side::kValue};
/// "k" or "v", as in tensor names.
inline const char* side_name(Side side) { return side == Side::kKey ? "k" : "v"; }

/// Row-major dense array; data.size() is the product of shape.
template <class T>
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<T> data;

  Array() = default;
  explicit Array(std::vector<std::int64_t> dims, T fill = T{}) : shape(std::move(dims)) {
    std::size_t n = 1;
    for (auto s : shape) n *= static_cast<std::size_t>(s);
    data.assign(n, fill);
  }
  bool empty() const { return data.empty(); }
  std::size_t stride0() const {
    return shape.empty() || shape[0] == 0 ? 0 : data.size() / static_cast<std::size_t>(shape[0]);
  }
  /// The i-th sub-array along the first dimension, flattened.
  std::span<T> row(std::size_t i) { return std::span<T>(data).subspan(i * stride0(), stride0()); }
  std::span<const T> row(std::size_t i) const {
    return std::span<const T>(data).subspan(i * stride0(), stride0());
  }
  bool operator==(const Array&) const = default;
};

/// Rotary embedding scaling; `type` is a Hugging Face name: "linear", "dynamic", "llama3", "yarn"
/// or "longrope"; other types are refused by the readers.
struct RopeScaling {
  std::string type;
  double factor = 1;                                 // all but longrope
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  std::int64_t original_context = 8192;              // all but linear
  double beta_fast = 32, beta_slow = 1;              // yarn: rotations that bound the blend
  bool truncate = true;                              // yarn: the bounds are whole channels
  double attention_factor = 1;  // yarn, longrope: on the rotary channels of queries and keys
  std::vector<double> short_factors = {},
                      long_factors = {};  // longrope: divide the frequencies of sequences
                                          // up to original_context, and of longer ones
  bool operator==(const RopeScaling&) const = default;
};

/// Rotary embedding. style "half": channel j pairs with j + rotary_dim/2 ("interleaved": 2j with
/// 2j+1; "none").
struct RopeSpec {
  std::string style = "half";
  double base = 10000;
  std::optional<RopeScaling> scaling;
  bool operator==(const RopeSpec&) const = default;
};

/// What identifies a model in a profile and a plan. kv_weights_sha256: stored bytes of the k and v
/// projection weights (k then v per layer, layer order).
struct ModelSpec {
  std::string architecture;  // "llama", "gemma2": a family of docs/models.md
  int num_layers = 0;
  int query_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int rotary_dim = 0;
  RopeSpec rope;
  std::string container;  // "gguf" or "hf"
  std::string kv_weights_sha256;
  // One per layer: positions that a query reads, its own included, 0 for all. Empty: all layers 0.
  std::vector<int> windows = {};
  std::optional<RopeSpec> local_rope = {};  // of the layers with a window; none: `rope`
  bool operator==(const ModelSpec&) const = default;
};

/// "full", or "sliding" for a layer with a window.
inline const char* layer_kind(const ModelSpec& m, int layer) {
  return !m.windows.empty() && m.windows.at(static_cast<std::size_t>(layer)) > 0 ? "sliding"
                                                                                 : "full";
}

/// A calibration text, or the part of it that went in.
struct ProfileSource {
  std::string name;    // file name without its folder
  std::string sha256;  // of the file
  std::int64_t tokens = 0;
  double part_begin = 0, part_end = 1;  // token fractions used
  double weight = 1;
  bool operator==(const ProfileSource&) const = default;
};

/// Number of cached elements of one token: layers x heads x (K + V) x head_dim.
inline std::int64_t elements_per_token(const ModelSpec& m) {
  return std::int64_t{2} * m.num_layers * m.kv_heads * m.head_dim;
}

}  // namespace kvplan
