#include "calib/decoder.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>

#include <cmath>
#include <fstream>
#include <mutex>
#include <span>
#include <string>

#include "schemas/error.h"

namespace kvplan::calib {

namespace {

/// Memory that can be had without swapping; 0 when the system does not say.
std::int64_t available_memory_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key, unit;
  std::int64_t kibibytes = 0;
  while (meminfo >> key >> kibibytes) {
    if (key == "MemAvailable:") return kibibytes * 1024;
    std::getline(meminfo, unit);
  }
  return 0;
}

std::string layer_tensor(int layer, const char* name) {
  return "blk." + std::to_string(layer) + "." + name;
}

/// Every tensor name that the forward pass of `config` reads.
std::vector<std::string> weight_names(const ModelConfig& config) {
  std::vector<std::string> names = {"token_embd.weight", "output_norm.weight"};
  if (!config.tied_embeddings) names.emplace_back("output.weight");
  std::vector<const char*> per_layer = {
      "attn_norm.weight", "attn_q.weight",      "attn_k.weight",
      "attn_v.weight",    "attn_output.weight", "ffn_norm.weight",
      "ffn_gate.weight",  "ffn_up.weight",      "ffn_down.weight"};
  if (config.qkv_bias)
    per_layer.insert(per_layer.end(), {"attn_q.bias", "attn_k.bias", "attn_v.bias"});
  if (config.output_bias) per_layer.push_back("attn_output.bias");
  for (int l = 0; l < config.num_layers; ++l)
    for (const char* name : per_layer) names.push_back(layer_tensor(l, name));
  return names;
}

at::ScalarType scalar_type(WeightType type) {
  switch (type) {
    case WeightType::kBFloat16:
      return at::kBFloat16;
    case WeightType::kFloat16:
      return at::kHalf;
    case WeightType::kFloat32:
      break;
  }
  return at::kFloat;
}

bool is_layer_matrix(const std::string& name, std::size_t dimensions) {
  return name.starts_with("blk.") && dimensions == 2;
}

void require_memory(const ModelReader& reader, WeightType matrices) {
  std::int64_t needed = 0;
  for (const std::string& name : weight_names(reader.config())) {
    const std::vector<std::int64_t> shape = reader.shape(name);
    std::int64_t elements = 1;
    for (std::int64_t n : shape) elements *= n;
    const bool half = matrices != WeightType::kFloat32 && is_layer_matrix(name, shape.size());
    needed += elements * (half ? 2 : 4);
  }
  const std::int64_t available = available_memory_bytes();
  if (available != 0 && needed > available)
    throw MemoryError(needed, available,
                      reader.path().string() + ": the weights need " +
                          std::to_string(needed >> 20) + " MiB, " +
                          std::to_string(available >> 20) +
                          " MiB are free; close other programs, hold the weights in half precision "
                          "(--dtype bf16) or take a smaller model");
}

at::Device torch_device(Device device) {
  if (device == Device::kCpu) return at::kCPU;
  if (!at::hasCUDA())
    throw EnvironmentError("cuda",
                           "LibTorch finds no CUDA device: it was built without CUDA, or there is "
                           "no GPU or driver; use --device cpu");
  return at::Device(at::kCUDA, 0);
}

at::Tensor read_weight(const ModelReader& reader, const std::string& name, at::Device device) {
  at::Tensor weight = at::empty(reader.shape(name), at::kFloat);
  reader.read(name, {weight.data_ptr<float>(), static_cast<std::size_t>(weight.numel())});
  return weight.to(device);
}

}  // namespace

/// Matrices [out, in], norms and biases [out]; undefined where the family has none.
struct Decoder::LayerWeights {
  at::Tensor attention_norm, q, k, v, output;
  at::Tensor q_bias, k_bias, v_bias, output_bias;
  at::Tensor ffn_norm, gate, up, down;

  LayerWeights(const ModelReader& reader, int layer, at::ScalarType matrices, at::Device device) {
    const auto read = [&](const char* name) {
      const at::Tensor weight = read_weight(reader, layer_tensor(layer, name), device);
      return weight.dim() == 2 ? weight.to(matrices) : weight;
    };
    attention_norm = read("attn_norm.weight");
    q = read("attn_q.weight");
    k = read("attn_k.weight");
    v = read("attn_v.weight");
    output = read("attn_output.weight");
    if (reader.config().qkv_bias) {
      q_bias = read("attn_q.bias");
      k_bias = read("attn_k.bias");
      v_bias = read("attn_v.bias");
    }
    if (reader.config().output_bias) output_bias = read("attn_output.bias");
    ffn_norm = read("ffn_norm.weight");
    gate = read("ffn_gate.weight");
    up = read("ffn_up.weight");
    down = read("ffn_down.weight");
  }
};

/// cos and sin of position x frequency, [positions, rotary_dim / 2], computed in double; grows on
/// demand.
class Decoder::RotaryTable {
 public:
  RotaryTable(std::span<const double> inv_freq, at::Device device)
      : inv_freq_(inv_freq), device_(device) {}

  std::pair<at::Tensor, at::Tensor> rows(std::int64_t first, std::int64_t count) {
    const std::lock_guard lock(mutex_);
    if (positions_ < first + count) grow(std::max(first + count, 2 * positions_));
    return {cos_.narrow(0, first, count), sin_.narrow(0, first, count)};
  }

 private:
  void grow(std::int64_t positions) {
    const auto half = static_cast<std::int64_t>(inv_freq_.size());
    const at::Tensor cosines = at::empty({positions, half}, at::kFloat),
                     sines = at::empty({positions, half}, at::kFloat);
    float* cos = cosines.data_ptr<float>();
    float* sin = sines.data_ptr<float>();
    for (std::int64_t t = 0; t < positions; ++t)
      for (const double frequency : inv_freq_) {
        const double angle = static_cast<double>(t) * frequency;
        *cos++ = static_cast<float>(std::cos(angle));
        *sin++ = static_cast<float>(std::sin(angle));
      }
    cos_ = cosines.to(device_);
    sin_ = sines.to(device_);
    positions_ = positions;
  }

  std::span<const double> inv_freq_;
  at::Device device_;
  std::mutex mutex_;
  std::int64_t positions_ = 0;
  at::Tensor cos_, sin_;
};

Decoder::Decoder(const ModelReader& reader, WeightType matrices, Device where)
    : config_(reader.config()), inv_freq_(rotary_frequencies(config_)) {
  const at::Device device = torch_device(where);
  if (where == Device::kCuda) {
    at::globalContext().setAllowTF32CuBLAS(false);
  } else {
    require_memory(reader, matrices);
  }
  rotary_ = std::make_unique<RotaryTable>(inv_freq_, device);
  embedding_ = read_weight(reader, "token_embd.weight", device);
  output_norm_ = read_weight(reader, "output_norm.weight", device);
  output_ = config_.tied_embeddings ? embedding_ : read_weight(reader, "output.weight", device);
  layers_.reserve(static_cast<std::size_t>(config_.num_layers));
  for (int l = 0; l < config_.num_layers; ++l)
    layers_.emplace_back(reader, l, scalar_type(matrices), device);
}

Decoder::~Decoder() = default;

at::Tensor Decoder::embed(const at::Tensor& ids) const {
  if (ids.numel() > 0) {
    const auto lowest = ids.min().item<std::int64_t>(), highest = ids.max().item<std::int64_t>();
    if (lowest < 0 || highest >= config_.vocab_size)
      throw ArgumentError("token id " + std::to_string(lowest < 0 ? lowest : highest) +
                          " is outside the vocabulary of " + std::to_string(config_.vocab_size) +
                          " tokens; was the text tokenised for another model?");
  }
  return at::embedding(embedding_, ids.to(device()));
}

at::Tensor Decoder::layer(int index, const at::Tensor& x, std::int64_t first_position,
                          const KvHook& hook, const AttentionOverride& attention) const {
  const LayerWeights& w = layers_.at(static_cast<std::size_t>(index));
  const std::int64_t batch = x.size(0), tokens = x.size(1);
  const auto norm = [&](const at::Tensor& h, const at::Tensor& weight) {
    return at::rms_norm(h, {config_.hidden_size}, weight, config_.norm_epsilon);
  };
  // Half matrices are widened for the one product; float32 ones pass through.
  const auto linear = [](const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias) {
    return at::linear(h, weight.to(at::kFloat), bias);
  };
  // [batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]
  const auto project = [&](const at::Tensor& h, const at::Tensor& weight, const at::Tensor& bias) {
    return linear(h, weight, bias).view({batch, tokens, -1, config_.head_dim}).transpose(1, 2);
  };

  const at::Tensor normed = norm(x, w.attention_norm);
  const at::Tensor q = rotate(project(normed, w.q, w.q_bias), first_position);
  const at::Tensor k_pre = project(normed, w.k, w.k_bias);
  LayerKv kv{.layer = index,
             .first_position = first_position,
             .k_pre = k_pre,
             .k = rotate(k_pre, first_position),
             .v = project(normed, w.v, w.v_bias)};
  if (hook) hook(kv);
  // On 2 cores, 1,024 tokens, 9 heads of 64: the flash kernel takes 9 ms, the plain one 61 ms;
  // enable_gqa equals expanding.
  const at::Tensor mixed =
      attention ? attention(q, kv)
                : at::scaled_dot_product_attention(q, kv.k, kv.v, {}, 0.0, /*is_causal=*/true,
                                                   /*scale=*/std::nullopt, /*enable_gqa=*/true);
  const at::Tensor attended =
      x + linear(mixed.transpose(1, 2).reshape({batch, tokens, -1}), w.output, w.output_bias);
  const at::Tensor ffn_in = norm(attended, w.ffn_norm);
  return attended +
         linear(at::silu(linear(ffn_in, w.gate, {})) * linear(ffn_in, w.up, {}), w.down, {});
}

at::Tensor Decoder::final_norm(const at::Tensor& x) const {
  return at::rms_norm(x, {config_.hidden_size}, output_norm_, config_.norm_epsilon);
}

at::Tensor Decoder::head(const at::Tensor& normed) const { return at::linear(normed, output_); }

const at::Tensor& Decoder::head_weight() const { return output_; }

at::Tensor Decoder::hidden(const at::Tensor& ids, const KvHook& hook,
                           const AttentionOverride& attention) const {
  at::Tensor x = embed(ids);
  for (int l = 0; l < config_.num_layers; ++l) x = layer(l, x, 0, hook, attention);
  return final_norm(x);
}

at::Tensor Decoder::rotate(const at::Tensor& x, std::int64_t first_position, bool inverse) const {
  const std::int64_t rotary_dim = config_.rotary_dim, half = rotary_dim / 2;
  if (half == 0) return x;
  const auto [cos, sin_forward] = rotary_->rows(first_position, x.size(-2));
  const at::Tensor sin = inverse ? -sin_forward : sin_forward;
  const at::Tensor a = x.narrow(-1, 0, half), b = x.narrow(-1, half, half);
  std::vector<at::Tensor> parts = {a * cos - b * sin, b * cos + a * sin};
  if (rotary_dim < config_.head_dim)
    parts.push_back(x.narrow(-1, rotary_dim, config_.head_dim - rotary_dim));
  return at::cat(parts, -1);
}

}  // namespace kvplan::calib
