#pragma once
// Forward pass of decoder-only transformers in LibTorch, layer by layer. Internal to calib: the one
// header that names torch.

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

#include "calib/model.h"

namespace kvplan::calib {

/// What attention is about to use, [batch, heads, tokens, head_dim] float32; a hook may replace k
/// and v (after rotary).
struct LayerKv {
  int layer = 0;
  std::int64_t first_position = 0;
  at::Tensor k_pre;  // before rotary
  at::Tensor k;      // after rotary
  at::Tensor v;
};
using KvHook = std::function<void(LayerKv&)>;

/// Replaces softmax attention of one layer (mode decode needs two versions of K and V):
/// (q, kv) -> [batch, query_heads, tokens, head_dim]. Null: causal attention over kv.k, kv.v.
using AttentionOverride = std::function<at::Tensor(const at::Tensor& q, const LayerKv& kv)>;

class Decoder {
 public:
  /// Reads and converts all weights, dropping file pages as it goes; embeddings, norms and biases
  /// are float32. MemoryError when they cannot fit the host, EnvironmentError when LibTorch has no
  /// CUDA device to put them on.
  explicit Decoder(const ModelReader& reader, WeightType matrices = WeightType::kFloat32,
                   Device device = Device::kCpu);
  ~Decoder();
  const ModelConfig& config() const { return config_; }
  at::Device device() const { return embedding_.device(); }
  const std::vector<double>& inv_freq() const { return inv_freq_; }

  /// ids [batch, tokens] int64 on any device -> hidden [batch, tokens, hidden]. ArgumentError for
  /// ids outside the vocabulary.
  at::Tensor embed(const at::Tensor& ids) const;
  /// One transformer block. Autograd flows through x, k, v when they require gradients.
  at::Tensor layer(int index, const at::Tensor& x, std::int64_t first_position = 0,
                   const KvHook& hook = {}, const AttentionOverride& attention = {}) const;
  /// Final norm, then logits [.., vocab].
  at::Tensor final_norm(const at::Tensor& x) const;
  at::Tensor head(const at::Tensor& normed) const;
  const at::Tensor& head_weight() const;  // [vocab, hidden]
  /// embed, all layers, final_norm.
  at::Tensor hidden(const at::Tensor& ids, const KvHook& hook = {},
                    const AttentionOverride& attention = {}) const;

  /// x [.., tokens, head_dim] turned by R_t (inverse: R_t^T), t = first_position + row.
  at::Tensor rotate(const at::Tensor& x, std::int64_t first_position, bool inverse = false) const;

 private:
  struct LayerWeights;
  class RotaryTable;
  ModelConfig config_;
  std::vector<double> inv_freq_;
  std::unique_ptr<RotaryTable> rotary_;
  at::Tensor embedding_, output_norm_, output_;
  std::vector<LayerWeights> layers_;
};

}  // namespace kvplan::calib
