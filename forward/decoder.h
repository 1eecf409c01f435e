#pragma once
// Forward pass of decoder-only transformers in LibTorch, layer by layer.

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "forward/device.h"
#include "forward/layer_weights.h"
#include "models/model.h"

namespace kvplan::forward {

/// Token ids as int64 [1, tokens].
at::Tensor id_tensor(std::span<const std::int32_t> tokens);

/// What attention is about to use, [batch, heads, tokens, head_dim] float32; a hook may replace k
/// and v (after rotary).
struct LayerKv {
  int layer = 0;
  std::int64_t first_position = 0;
  at::Tensor k_pre;  // before rotary, attention factor of the rotary scaling included
  at::Tensor k;      // after rotary
  at::Tensor v;
};
using KvHook = std::function<void(LayerKv&)>;

/// Replaces softmax attention of one layer (mode decode needs two versions of K and V):
/// (q, kv) -> [batch, query_heads, tokens, head_dim]. Null: causal attention over kv.k, kv.v.
using AttentionOverride = std::function<at::Tensor(const at::Tensor& q, const LayerKv& kv)>;

/// Which weights are in memory.
enum class Residency {
  kAll,     // every one, read once
  kStream,  // one layer's and those of the next; embedding or head while they are used
};

class RotaryTable;

class Decoder {
 public:
  /// Reads and converts weights, dropping file pages as it goes; embeddings, norms and biases are
  /// float32. MemoryError when they cannot fit the host, EnvironmentError when LibTorch has no CUDA
  /// device to put them on. With kStream `reader` must outlive the decoder; each layer should then
  /// run on everything there is to run before the next does.
  explicit Decoder(const models::ModelReader& reader, WeightType matrices = WeightType::kFloat32,
                   Device device = Device::kCpu, Residency residency = Residency::kAll);
  ~Decoder();
  const models::ModelConfig& config() const { return config_; }
  at::Device device() const { return device_; }
  /// Rotary frequencies of a layer in a sequence of so many tokens.
  std::vector<double> inv_freq(int layer = 0, std::int64_t sequence = 0) const;

  /// ids [batch, tokens] int64 on any device -> hidden [batch, tokens, hidden]. ArgumentError for
  /// ids outside the vocabulary, and for positions that a model of learned positions does not know.
  at::Tensor embed(const at::Tensor& ids, std::int64_t first_position = 0) const;
  /// One transformer block on tokens at positions first_position .. of a sequence of `sequence`
  /// tokens, on which some rotary frequencies depend; 0: these tokens end it. Autograd flows
  /// through x, k, v when they require gradients.
  at::Tensor layer(int index, const at::Tensor& x, std::int64_t first_position = 0,
                   const KvHook& hook = {}, const AttentionOverride& attention = {},
                   std::int64_t sequence = 0) const;
  /// Final norm, then logits [.., vocab]: head_weight, bias and soft cap where the model has them.
  at::Tensor final_norm(const at::Tensor& x) const;
  at::Tensor head(const at::Tensor& normed) const;
  at::Tensor head_weight() const;  // [vocab, hidden]
  /// With kStream: begins to read a layer on another thread; num_layers means the head. Else
  /// nothing.
  void prefetch(int layer) const;
  /// embed, all layers, final_norm.
  at::Tensor hidden(const at::Tensor& ids, const KvHook& hook = {},
                    const AttentionOverride& attention = {}) const;

  /// x [.., tokens, head_dim] turned by R_t of the layer (inverse: R_t^T), t = first_position +
  /// row; `sequence` as in layer().
  at::Tensor rotate(const at::Tensor& x, int layer, std::int64_t first_position,
                    bool inverse = false, std::int64_t sequence = 0) const;

 private:
  struct Streams;
  std::shared_ptr<const LayerWeights> weights(int layer) const;
  models::ModelConfig config_;
  at::Device device_;
  std::unique_ptr<RotaryTable> rotary_;
  Affine output_norm_;
  at::Tensor positions_, output_bias_;                       // undefined where the model has none
  at::Tensor embedding_, output_;                            // kAll
  std::vector<std::shared_ptr<const LayerWeights>> layers_;  // kAll
  std::unique_ptr<Streams> streams_;                         // kStream
};

}  // namespace kvplan::forward
