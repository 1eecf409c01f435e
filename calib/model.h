#pragma once
// Model files: configuration and weights of a GGUF file or a Hugging Face folder behind one
// interface. Torch-free.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "schemas/types.h"

namespace kvplan::calib {

/// What the forward pass needs to know; a family is a set of these values (calib/families.cpp), not
/// code of its own.
struct ModelConfig {
  std::string architecture;  // "llama", "qwen2"
  int num_layers = 0, hidden_size = 0, intermediate_size = 0, vocab_size = 0;
  int query_heads = 0, kv_heads = 0, head_dim = 0, rotary_dim = 0;
  RopeSpec rope;
  double norm_epsilon = 1e-5;
  bool tied_embeddings = false;  // no output.weight
  bool qkv_bias = false;         // attn_{q,k,v}.bias present
  bool output_bias = false;      // attn_output.bias present
  std::int64_t max_context = 0;
  std::string container;  // "gguf" | "hf"
};

/// Tensor names are GGUF's for both containers: token_embd.weight, output_norm.weight,
/// output.weight, blk.{l}.attn_norm.weight, blk.{l}.attn_{q,k,v}.{weight,bias},
/// blk.{l}.attn_output.weight, blk.{l}.ffn_norm.weight, blk.{l}.ffn_{gate,up,down}.weight. Rotary
/// pairs are always half-split (llama GGUF's interleaving of q and k is undone on read).
class ModelReader {
 public:
  virtual ~ModelReader() = default;
  virtual const ModelConfig& config() const = 0;
  virtual bool has(std::string_view name) const = 0;
  /// Row-major, output dimension first ([out, in] for matrices). InputError if absent.
  virtual std::vector<std::int64_t> shape(std::string_view name) const = 0;
  /// De-quantised to float; out.size() = product of shape. InputError{file, tensor} on NaN or Inf,
  /// naming the first element as stored.
  virtual void read(std::string_view name, std::span<float> out) const = 0;
  /// Fingerprint with kv_weights_sha256.
  virtual const ModelSpec& spec() const = 0;
  virtual std::filesystem::path path() const = 0;
};

/// How the matrices of the layers are held in memory. Arithmetic is float32 in any case: the half
/// types halve the memory and round weights that need more bits (a bf16 checkpoint does not), and
/// cost a conversion at each use.
enum class WeightType { kFloat32, kBFloat16, kFloat16 };

/// "fp32", "bf16" or "fp16", as on the command line.
const char* weight_type_name(WeightType type);

/// Where the forward pass runs.
enum class Device { kCpu, kCuda };

/// Opens a .gguf file or a folder with config.json. All shapes are checked against the
/// configuration before this returns. InputError: missing or truncated file, unsupported
/// architecture, tensor type or feature (by name), wrong shape.
std::unique_ptr<ModelReader> open_model(const std::filesystem::path& path);

/// Rotary frequencies theta_j, scaling applied, [rotary_dim/2].
std::vector<double> rotary_frequencies(const ModelConfig& config);

}  // namespace kvplan::calib
