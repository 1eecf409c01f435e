#include "forward/decoder.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tanh.h>

#include <fstream>
#include <string>

#include "forward/causal_attention.h"
#include "forward/layer_weights.h"
#include "forward/rotary_table.h"
#include "forward/token_chunks.h"
#include "forward/weight_stream.h"
#include "models/families.h"
#include "schemas/error.h"

namespace kvplan::forward {

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

void require_memory(const models::ModelReader& reader, WeightType matrices) {
  std::int64_t needed = 0;
  for (const auto& [name, expected] : models::expected_tensors(reader.config())) {
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
  if (device.is_cpu()) return at::kCPU;
  if (!at::hasCUDA())
    throw EnvironmentError("cuda",
                           "LibTorch finds no CUDA device: it was built without CUDA, or there is "
                           "no GPU or driver; use --device cpu");
  if (const std::int64_t found = at::detail::getCUDAHooks().deviceCount(); device.gpu >= found)
    throw EnvironmentError("cuda:" + std::to_string(device.gpu),
                           "this machine shows " + std::to_string(found) +
                               " CUDA devices, numbered from 0; choose another --device");
  return at::Device(at::kCUDA, static_cast<at::DeviceIndex>(device.gpu));
}

// Half matrices: a GPU multiplies them as they are, the CPU widens them for the one product.
at::Tensor linear(const at::Tensor& x, const Affine& w) {
  if (!x.is_cuda() || w.weight.scalar_type() == at::kFloat)
    return at::linear(x, w.weight.to(at::kFloat), w.bias);
  const at::Tensor product = at::linear(x.to(w.weight.scalar_type()), w.weight).to(at::kFloat);
  return w.bias.defined() ? product + w.bias : product;
}

/// Over the last dimension of x; x itself where the model has no such norm.
at::Tensor normed(const at::Tensor& x, const Affine& w, const models::ModelConfig& config) {
  if (!w.defined()) return x;
  const std::vector<std::int64_t> shape = {w.weight.numel()};
  return config.norm == models::NormKind::kLayer
             ? at::layer_norm(x, shape, w.weight, w.bias, config.norm_epsilon)
             : at::rms_norm(x, shape, w.weight, config.norm_epsilon);
}

at::Tensor activated(const at::Tensor& x, models::Activation activation) {
  switch (activation) {
    case models::Activation::kGelu:
      return at::gelu(x);
    case models::Activation::kGeluTanh:
      return at::gelu(x, "tanh");
    case models::Activation::kSilu:
      break;
  }
  return at::silu(x);
}

/// What the feed-forward part adds to its input rows.
at::Tensor feed_forward(const at::Tensor& rows, const LayerWeights& w,
                        const models::ModelConfig& config) {
  const at::Tensor in = normed(rows, w.ffn_norm, config);  // none in a parallel block
  const at::Tensor inner =
      config.gated ? activated(linear(in, w.ffn_gate), config.activation) * linear(in, w.ffn_up)
                   : activated(linear(in, w.ffn_up), config.activation);
  return normed(linear(inner, w.ffn_down), w.post_ffw_norm, config);
}

at::Tensor soft_capped(const at::Tensor& x, double cap) {
  return cap > 0 ? at::tanh(x / cap) * cap : x;
}

}  // namespace

at::Tensor id_tensor(std::span<const std::int32_t> tokens) {
  return at::from_blob(const_cast<std::int32_t*>(tokens.data()),
                       {1, static_cast<std::int64_t>(tokens.size())}, at::kInt)
      .to(at::kLong);
}

/// What stays in the file. Embedding and head are large, too, and used at the two ends of a pass.
struct Decoder::Streams {
  enum Vocabulary { kEmbedding, kHead };
  WeightStream<at::Tensor> vocabulary;
  WeightStream<LayerWeights> layers;

  Streams(const models::ModelReader& reader, at::ScalarType matrices, at::Device device)
      : vocabulary([&reader, device](int part) {
          const bool own_head = part == kHead && !reader.config().tied_embeddings;
          return read_weight(reader, own_head ? "output.weight" : "token_embd.weight", device);
        }),
        layers([&reader, matrices, device](int layer) {
          return LayerWeights(reader, layer, matrices, device);
        }) {}
};

Decoder::Decoder(const models::ModelReader& reader, WeightType matrices, Device where,
                 Residency residency)
    : config_(reader.config()),
      device_(torch_device(where)),
      rotary_(std::make_unique<RotaryTable>(config_, device_)) {
  if (device_.is_cuda()) at::globalContext().setAllowTF32CuBLAS(false);
  if (device_.is_cpu() && residency == Residency::kAll) require_memory(reader, matrices);
  output_norm_ = read_affine(reader, "output_norm", at::kFloat, device_);
  if (config_.learned_positions) positions_ = read_weight(reader, "position_embd.weight", device_);
  if (config_.head_bias) output_bias_ = read_weight(reader, "output.bias", device_);
  if (residency == Residency::kStream) {
    streams_ = std::make_unique<Streams>(reader, scalar_type(matrices), device_);
    return;
  }
  embedding_ = read_weight(reader, "token_embd.weight", device_);
  output_ = config_.tied_embeddings ? embedding_ : read_weight(reader, "output.weight", device_);
  for (int l = 0; l < config_.num_layers; ++l)
    layers_.push_back(
        std::make_shared<const LayerWeights>(reader, l, scalar_type(matrices), device_));
}

Decoder::~Decoder() = default;

at::Tensor Decoder::embed(const at::Tensor& ids, std::int64_t first_position) const {
  if (ids.numel() > 0) {
    const auto lowest = ids.min().item<std::int64_t>(), highest = ids.max().item<std::int64_t>();
    if (lowest < 0 || highest >= config_.vocab_size)
      throw ArgumentError("token id " + std::to_string(lowest < 0 ? lowest : highest) +
                          " is outside the vocabulary of " + std::to_string(config_.vocab_size) +
                          " tokens; was the text tokenised for another model?");
  }
  at::Tensor x = at::embedding(
      streams_ ? *streams_->vocabulary.get(Streams::kEmbedding) : embedding_, ids.to(device_));
  if (config_.embedding_scale != 1) x = x * config_.embedding_scale;
  if (!positions_.defined()) return x;
  const std::int64_t tokens = ids.size(-1);
  if (first_position + tokens > positions_.size(0))
    throw ArgumentError("the model knows " + std::to_string(positions_.size(0)) +
                        " positions, a sequence of " + std::to_string(first_position + tokens) +
                        " tokens has more; choose a smaller --window");
  return x + positions_.narrow(0, first_position, tokens);
}

at::Tensor Decoder::layer(int index, const at::Tensor& x, std::int64_t first_position,
                          const KvHook& hook, const AttentionOverride& attention,
                          std::int64_t sequence) const {
  const std::shared_ptr<const LayerWeights> held = weights(index);
  const LayerWeights& w = *held;
  const std::int64_t batch = x.size(0), tokens = x.size(1);
  // [batch, tokens, hidden] -> [batch, heads, tokens, head_dim]
  const auto project = [&](const at::Tensor& h, const Affine& weights) {
    return linear(h, weights).view({batch, tokens, -1, config_.head_dim}).transpose(1, 2);
  };
  const auto before_rotary = [&](const at::Tensor& h, const Affine& weights, const Affine& norm) {
    return rotary_->scale(normed(project(h, weights), norm, config_), index);
  };

  const at::Tensor in = normed(x, w.attn_norm, config_);
  const at::Tensor q = rotate(before_rotary(in, w.attn_q, w.attn_q_norm), index, first_position,
                              /*inverse=*/false, sequence);
  const at::Tensor k_pre = before_rotary(in, w.attn_k, w.attn_k_norm);
  LayerKv kv{.layer = index,
             .first_position = first_position,
             .k_pre = k_pre,
             .k = rotate(k_pre, index, first_position, /*inverse=*/false, sequence),
             .v = project(in, w.attn_v)};
  if (hook) hook(kv);
  const at::Tensor mixed = attention
                               ? attention(q, kv)
                               : causal_attention(q, kv.k, kv.v, attention_rule(config_, index));
  const at::Tensor added =
      linear(mixed.transpose(1, 2).reshape({batch, tokens, -1}), w.attn_output);
  const at::Tensor attended = x + normed(added, w.post_attention_norm, config_);
  return attended + by_token_chunks(config_.parallel_block ? in : attended,
                                    [this, held](const at::Tensor& rows) {
                                      return feed_forward(rows, *held, config_);
                                    });
}

at::Tensor Decoder::final_norm(const at::Tensor& x) const {
  return normed(x, output_norm_, config_);
}

at::Tensor Decoder::head(const at::Tensor& normed) const {
  return soft_capped(at::linear(normed, head_weight(), output_bias_), config_.logit_soft_cap);
}

at::Tensor Decoder::head_weight() const {
  return streams_ ? *streams_->vocabulary.get(Streams::kHead) : output_;
}

std::shared_ptr<const LayerWeights> Decoder::weights(int layer) const {
  if (!streams_) return layers_.at(static_cast<std::size_t>(layer));
  streams_->vocabulary.drop();
  return streams_->layers.get(layer);
}

void Decoder::prefetch(int layer) const {
  if (!streams_) return;
  if (layer == config_.num_layers) {
    streams_->vocabulary.prefetch(Streams::kHead);
  } else {
    streams_->layers.prefetch(layer);
  }
}

at::Tensor Decoder::hidden(const at::Tensor& ids, const KvHook& hook,
                           const AttentionOverride& attention) const {
  at::Tensor x = embed(ids);
  for (int l = 0; l < config_.num_layers; ++l) x = layer(l, x, 0, hook, attention);
  return final_norm(x);
}

at::Tensor Decoder::rotate(const at::Tensor& x, int layer, std::int64_t first_position,
                           bool inverse, std::int64_t sequence) const {
  return rotary_->rotate(x, layer, first_position, inverse, sequence);
}

std::vector<double> Decoder::inv_freq(int layer, std::int64_t sequence) const {
  return models::rotary_frequencies(config_, layer, sequence);
}

}  // namespace kvplan::forward
