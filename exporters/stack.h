#pragma once
// What a serving stack can store and what it can be told: formats, the choices that each of its
// settings leaves to a layer, refusals. Sources and versions: docs/serving/.

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "exporters/cache_shape.h"

namespace kvplan::exporters {

/// One way in which a stack stores the vectors of a side.
struct Format {
  std::string name = {};      // as the stack calls it: "q4_0", "turboquant_4bit_nc"
  int width = 16;             // bits per element that `want` is compared with; 16: not quantised
  int block = 1;              // elements per block; a vector is padded to whole blocks
  int block_bytes = 2;        // codes, scales and minima of a block
  int vector_bytes = 0;       // beside the blocks: norm, scale of the vector
  std::string codec = {};     // published name (docs/baselines.md), its bits included; empty: quant
                              // has no codec that does the same
  double relative_error = 0;  // E|x - x'|^2 / E|x|^2 of Gaussian vectors, for estimates

  bool plain() const { return width == kFp16Width; }
  /// Bytes of one vector (token, KV head) of head_dim elements.
  std::int64_t bytes(int head_dim) const;
  bool operator==(const Format&) const = default;
};

/// Indices into Stack::formats for K and V; kNone for both on a layer without a cache.
struct LayerFormat {
  int k = 0, v = 0;
  static constexpr int kNone = -1;
  int of(Side side) const { return side == Side::kKey ? k : v; }
  bool operator==(const LayerFormat&) const = default;
};

/// Everything the stack can be told under one stack-wide choice: any combination of the layers'
/// choices.
struct Setting {
  std::string name = {};  // "turboquant_4bit_nc", "mode 5"; empty where there is nothing to choose
  int number = 0;         // the stack's own number of it, if any (thetom's mode, LMDeploy's policy)
  std::vector<std::vector<LayerFormat>> choices = {};  // per layer, in order of preference
  std::vector<int> forced16 = {};      // layers that the stack keeps at 16 bits itself
  std::vector<int> unverified16 = {};  // kept at 16 bits because nobody tried them
};

/// A base type, another one for the first n layers, another one for the last n (the last wins).
struct Segments {
  int base = 0, first = 0, first_count = 0, last = 0, last_count = 0;
  int format_of(int layer, int num_layers) const {
    if (layer >= num_layers - last_count) return last;
    return layer < first_count ? first : base;
  }
  bool operator==(const Segments&) const = default;
};

/// The orthogonal transform that a stack applies to a side before coding it.
struct StackRotation {
  std::string kind = "none";  // none | hadamard (unsigned, Sylvester) | fixed_signs
  int tile = 0;               // coordinates that are mixed; 0 without rotation
  bool operator==(const StackRotation&) const = default;
};

struct StackOptions {
  std::vector<std::string> dtypes = {};  // vllm: the dtypes to choose from; empty: all but nvfp4
  std::string dialect = "mainline";      // llamacpp: mainline | ik | thetom | buun
  std::string backend = "vanilla";       // kvtuner: vanilla | hqq
  std::string scheme = "kivi";           // kvtuner: kivi | pertoken
  bool fp8 = false;                      // lmdeploy: fp8 instead of int8
};

struct Stack {
  std::string name = {};     // one of kTargets
  std::string dialect = {};  // of llamacpp; empty elsewhere
  std::string version = {};  // the one that the tables hold for
  std::vector<Format> formats = {};
  std::vector<Setting> settings = {};  // in order of preference; empty where `segments` holds
  bool segments = false;    // llama.cpp ik: sides are independent, each takes any Segments
  bool even_slots = false;  // K and V of a vector share a slot of an even number of bytes

  int format_index(std::string_view format) const;  // ArgumentError names those that exist
  const Format& format(const LayerFormat& layer, Side side) const {
    return formats.at(static_cast<std::size_t>(layer.of(side)));
  }
  /// Bytes per token of one layer.
  std::int64_t bytes(const LayerShape& layer, const LayerFormat& formats) const;
};

inline constexpr std::string_view kTargets[] = {"vllm",     "sglang",  "kv-scales", "modelopt",
                                                "llamacpp", "kvtuner", "hf",        "lmdeploy"};

/// "vllm, sglang, ... or lmdeploy", for messages.
std::string target_names();

/// The stack `target` for a cache of this shape. Throws InputError{file, field} for a shape that it
/// cannot hold (head_dim, mla, hybrids), ArgumentError for a name or option that does not exist.
/// `architecture` is the model's ("llama", "qwen2"); `file` names the plan in messages.
Stack make_stack(std::string_view target, const CacheShape& shape, std::string_view architecture,
                 const StackOptions& options = {}, const std::string& file = "plan.json");

/// "vllm", "llamacpp:ik", "kvtuner:hqq", "lmdeploy:fp8", "vllm:turboquant_4bit_nc": what follows
/// the colon is a dialect, backend or dtype. ArgumentError lists what there is.
struct StackName {
  std::string target;
  StackOptions options;
};
StackName parse_stack(std::string_view text);

/// What the stack does to vectors of this format before coding them. Mainline and ik rotate on
/// demand: `sides` are those that should be ("", "k", "v", "kv"; mainline rotates both or none).
StackRotation stack_rotation(const Stack& stack, const Format& format, const CacheShape& shape,
                             int layer, Side side, std::string_view sides);

}  // namespace kvplan::exporters
