#pragma once
// One pass over a batch of windows, layer by layer: activations, and gradients of sum log p(y) for
// labels y drawn from the model's own softmax (quantization.md section 2, pass B). Internal to
// calib.

#include <cstddef>
#include <functional>
#include <span>
#include <string>

#include "calib/decoder.h"
#include "calib/text.h"
#include "schemas/run_control.h"

namespace kvplan::calib {

/// What one window shows of one layer, [kv_heads, tokens, head_dim] float32; finite.
struct LayerTrace {
  at::Tensor k_pre;     // before rotary
  at::Tensor k, v;      // after rotary
  at::Tensor h_k, h_v;  // gradients with respect to k (after rotary) and v, over all later use
};

struct FisherPass {
  const Decoder& decoder;
  std::string model_file;  // named in errors
  std::uint64_t seed = 0;  // of the labels: a draw depends on (seed, window index, position) alone
  const RunControl& control;

  /// Calls visit(window in the batch, layer, trace), layers from last to first; windows are of
  /// equal length. Holds the input of every layer and one layer's graph. InputError on NaN or Inf
  /// (layer, side, window, position); InterruptedError between layers.
  using Visit = std::function<void(std::size_t, int, const LayerTrace&)>;
  void run(std::span<const TextWindow> windows, const Visit& visit) const;
};

}  // namespace kvplan::calib
