#pragma once
// Rotary embedding of the layers of a model: frequencies, angles, rotation.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "models/model.h"

namespace kvplan::forward {

/// Keeps cos and sin of the positions that were asked for, computed in double. Safe to use from
/// several threads.
class RotaryTable {
 public:
  /// `config` must outlive the table.
  RotaryTable(const models::ModelConfig& config, at::Device device)
      : config_(config), device_(device) {}

  /// x [.., tokens, head_dim] at positions first .. of a sequence of so many tokens (0: they end
  /// it), turned by R_t of the layer (inverse: R_t^T).
  at::Tensor rotate(const at::Tensor& x, int layer, std::int64_t first, bool inverse,
                    std::int64_t sequence);

  /// x [.., head_dim] with its rotary channels multiplied by the attention factor.
  at::Tensor scale(const at::Tensor& x, int layer) const;

 private:
  /// Of one kind of layers, [positions, rotary_dim / 2].
  struct Angles {
    std::vector<double> inv_freq;
    std::int64_t positions = 0;
    at::Tensor cos, sin;
  };
  std::pair<at::Tensor, at::Tensor> rows(int layer, std::int64_t first, std::int64_t count,
                                         std::int64_t sequence);
  void grow(Angles& angles, std::int64_t positions) const;

  const models::ModelConfig& config_;
  at::Device device_;
  std::mutex mutex_;
  std::array<Angles, 2> angles_;  // of layers that read all, of layers with a window
};

}  // namespace kvplan::forward
