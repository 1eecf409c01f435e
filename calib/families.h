#pragma once
// What tells one family of decoders from another, as data. Private to calib.

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "calib/model.h"

namespace kvplan::calib {

/// A setting that would change the forward pass and therefore must be absent or have this value.
struct HfFixed {
  const char* field;
  const char* value;  // JSON text
};
struct GgufFixed {
  const char* key;  // behind "{architecture}."
  std::variant<bool, double> value;
};

struct Family {
  const char* name;              // model_type of config.json, general.architecture of a GGUF file
  bool gguf_interleaves_rotary;  // GGUF: rotary pairs are neighbouring rows of attn_q and attn_k
  bool qkv_bias;                 // q, k and v always have a bias
  bool optional_bias;  // "attention_bias" (GGUF: the tensors) adds one to q, k, v and output
  std::vector<HfFixed> hf_fixed;  // beside those of every family
  std::vector<GgufFixed> gguf_fixed;
};

/// InputError naming the families there are.
const Family& find_family(std::string_view name, const std::string& file, const std::string& field);

/// Settings fixed for every family.
std::span<const HfFixed> common_hf_fixed();
std::span<const GgufFixed> common_gguf_fixed();

/// Names and shapes of all tensors of a model, layer by layer (names as in ModelReader).
std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected_tensors(
    const ModelConfig& config);

/// The Hugging Face name of a tensor of expected_tensors.
std::string hf_tensor_name(std::string_view gguf_name);

}  // namespace kvplan::calib
