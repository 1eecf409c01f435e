#pragma once
// One pass over a batch of windows, layer by layer: activations, and gradients of sum log p(y) for
// labels y drawn from the model's own softmax (quantization.md section 2, pass B).

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "forward/activation_store.h"
#include "forward/decoder.h"
#include "schemas/run_control.h"
#include "tokenizers/text.h"

namespace kvplan::calib {

/// What the windows of a batch show of one layer, [windows, kv_heads, tokens, head_dim] float32;
/// finite.
struct LayerTrace {
  at::Tensor k_pre;     // before rotary
  at::Tensor k, v;      // after rotary
  at::Tensor h_k, h_v;  // gradients with respect to k (after rotary) and v, over all later use
};

/// Windows of equal length that go through the model as one tensor.
using WindowBatch = std::span<const tokenizers::TextWindow>;

struct FisherPass {
  const forward::Decoder& decoder;
  std::string model_file;  // named in errors
  std::uint64_t seed = 0;  // of the labels: a draw depends on (seed, window index, position) alone
  const RunControl& control;
  forward::ActivationStore& activations;

  /// Calls visit(batch, layer, trace), layers from last to first. Every layer runs on all batches
  /// before the next one does. Holds the input of every layer in `activations` and one layer's
  /// graph. InputError on NaN or Inf (layer, side, window, position); InterruptedError between
  /// layers.
  using Visit = std::function<void(WindowBatch, int, const LayerTrace&)>;
  void run(std::span<const WindowBatch> batches, const Visit& visit) const;

 private:
  using Slots = std::vector<forward::ActivationStore::Slot>;  // one per batch
  at::Tensor take(forward::ActivationStore::Slot slot) const;
  std::vector<Slots> forward(std::span<const WindowBatch> batches) const;
  at::Tensor head_gradient(WindowBatch batch, const at::Tensor& x) const;
};

/// What the head holds for a few rows of logits.
std::int64_t head_bytes(const models::ModelConfig& config, bool on_gpu);

/// x itself on the CPU; from a GPU through pinned memory, which a copy reaches several times
/// faster.
at::Tensor host_copy(const at::Tensor& x);

}  // namespace kvplan::calib
