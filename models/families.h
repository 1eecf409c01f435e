#pragma once
// What tells one family of decoders from another, as data.

#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "models/model.h"

namespace kvplan::models {

/// A setting that would change the forward pass and therefore must be absent or have this value.
struct HfFixed {
  const char* field;
  const char* value;  // JSON text
};
struct GgufFixed {
  const char* key;  // behind "{architecture}."
  std::variant<bool, double> value;
};

/// Parts of tensor names: of the model, or inside a layer.
struct NamePair {
  const char* hf;
  const char* gguf;
};

/// A tensor whose rows are those of several others, one after the other.
struct FusedTensor {
  const char* name;
  std::vector<const char*> parts;
};

/// Names of settings in config.json.
struct HfFields {
  const char* num_layers = "num_hidden_layers";
  const char* hidden_size = "hidden_size";
  const char* intermediate_size = "intermediate_size";
  const char* query_heads = "num_attention_heads";
  const char* kv_heads = "num_key_value_heads";
  const char* norm_epsilon = "rms_norm_eps";
  const char* max_context = "max_position_embeddings";
  const char* activation = "hidden_act";
};

struct HfTensorNames {
  const char* layer_prefix;     // before the number of a layer
  const char* optional_prefix;  // names may begin with it
  std::span<const NamePair> model, layer;
  std::span<const char* const> ignored;  // endings of tensors that hold no weights
};

/// Which layers have a window.
enum class WindowRule {
  kNone,
  kAll,       // sliding_window
  kUpper,     // from max_window_layers on, when use_sliding_window
  kPeriodic,  // all but each window_period-th
};

struct Family {
  const char* name;
  const char* hf_name;    // model_type of config.json
  const char* gguf_name;  // general.architecture of a GGUF file; null: none of its own
  // What all models of the family share, and the defaults of what their files may leave out; sizes
  // are the readers' part. head_dim 0: hidden_size / query_heads.
  ModelConfig traits;

  bool optional_bias =
      false;               // "attention_bias" (GGUF: the tensors) adds one to q, k, v and output
  bool soft_caps = false;  // of scores and logits, settings of the file
  bool scales_embedding = false;  // by sqrt(hidden_size)
  WindowRule window_rule = WindowRule::kNone;
  int window_default = 0;  // where the file says nothing
  int window_period = 0;
  int window_first = 0;  // max_window_layers where the file says nothing

  HfFields hf = {};
  const HfTensorNames* hf_tensors = nullptr;
  bool hf_transposed = false;    // matrices of layers are stored [in, out]
  float hf_norm_offset = 0;      // added to stored norm weights
  bool hf_query_scalar = false;  // attention_scale = query_pre_attn_scalar^(-1/2)
  double hf_partial_rotary = 0;  // default of partial_rotary_factor; 0: it must be 1
  int hf_inner_default = 0;      // intermediate_size in hidden_sizes; 0: the file says it
  std::vector<std::pair<const char*, Activation>> hf_activations = {
      {"silu", Activation::kSilu}};    // the first one is the default
  std::vector<HfFixed> hf_fixed = {};  // beside those of every family

  bool gguf_interleaves_rotary = false;  // rotary pairs are neighbouring rows of attn_q, attn_k
  bool gguf_fused_gate = false;          // ffn_up holds the rows of gate and up
  int gguf_wide_scale_layers = 0;  // so many layers: attention_scale = (hidden / heads)^(-1/2)
  std::vector<GgufFixed> gguf_fixed = {};
};

/// InputError naming the families that there are in the container.
const Family& find_hf_family(std::string_view model_type, const std::string& file);
const Family& find_gguf_family(std::string_view architecture, const std::string& file);

/// Settings fixed for every family.
std::span<const HfFixed> common_hf_fixed();
std::span<const GgufFixed> common_gguf_fixed();

/// Settings that do not change what the forward pass computes.
bool is_harmless_hf_field(std::string_view field);
bool is_harmless_gguf_key(std::string_view key);  // behind "{architecture}."

/// Layers with a window of `window` tokens by the rule, as in ModelSpec: empty if there is none.
/// `first` is max_window_layers of kUpper.
std::vector<int> windows_by_rule(WindowRule rule, int num_layers, int window, int period,
                                 int first);

/// Names and shapes of all tensors of a model, layer by layer (names as in ModelReader).
std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected_tensors(
    const ModelConfig& config);

/// Tensors that files may hold in place of their parts, names inside a layer.
std::span<const FusedTensor> fused_tensors();

/// Hugging Face names by the GGUF names of all tensors that a file of the family may hold (fused
/// and separate).
std::vector<std::pair<std::string, std::string>> hf_tensor_names(const Family& family,
                                                                 const ModelConfig& config);

}  // namespace kvplan::models
