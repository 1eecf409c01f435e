#pragma once
// From what one window shows of a layer to the profile's sums, and the sum of windows.

#include <cstdint>
#include <vector>

#include "calib/fisher_pass.h"
#include "schemas/profile.h"

namespace kvplan::calib {

/// Sums of one window, one per layer; `cross`, `phase`, `inv_freq` and `weight_mse` are left empty.
using WindowSums = std::vector<LayerProfile>;

/// All sums of zero, of the model's shapes.
WindowSums empty_sums(const models::ModelConfig& config);

/// From traces of windows to their sums.
class TraceStatistics {
 public:
  TraceStatistics(const forward::Decoder& decoder, int sink_tokens)
      : decoder_(decoder), sink_tokens_(sink_tokens) {}

  /// Of each window of the trace its sums of one layer, without the first sink_tokens positions
  /// (absmax includes them).
  std::vector<LayerProfile> sums(int layer, const LayerTrace& trace) const;

  /// Writes rows row .. row + windows - 1 of cross and phase, which the caller has sized, from the
  /// first `windows` windows of the trace.
  void store_coherent(int layer, const LayerTrace& trace, std::size_t windows, std::size_t row,
                      LayerProfile& out);

 private:
  const at::Tensor& phases(int layer, std::int64_t tokens);

  const forward::Decoder& decoder_;
  int sink_tokens_;
  struct Phases {  // of the last call: layers and windows mostly share them
    std::vector<double> inv_freq;
    at::Tensor value;
  } phases_;
};

/// Calls f(array of `a`, same array of `b`) for every additive array, then g for every maximum.
template <class A, class B, class F, class G>
void for_each_sum(A& a, B& b, const F& additive, const G& maximum) {
  for (const Side side : kSides) {
    auto& x = a.side(side);
    auto& y = b.side(side);
    additive(x.sum, y.sum);
    additive(x.outer, y.outer);
    additive(x.norm_sum, y.norm_sum);
    additive(x.fisher, y.fisher);
    maximum(x.absmax, y.absmax);
  }
  additive(a.k_rotated_sum, b.k_rotated_sum);
  additive(a.k_rotated_sumsq, b.k_rotated_sumsq);
  additive(a.norm_ratio_sum, b.norm_ratio_sum);
}

/// Adds windows as a binary tree over their global index, whichever windows are there: the sum of
/// an aligned power-of-two range has the same bits in a run of its own and inside a larger one. A
/// part of a run adds only what no window of another part comes between, so that its nodes, added
/// to a tree in order with those of the others, give the bits of the whole run.
class WindowTree {
 public:
  struct Node {
    std::int64_t index = 0;  // of its first window
    WindowSums sums;
  };
  static constexpr std::int64_t kNone = -1;

  WindowTree() = default;
  /// Of a part of a run between two windows of other parts, which may be kNone.
  WindowTree(std::int64_t before, std::int64_t after) : before_(before), after_(after) {}
  /// Continues from nodes() of an earlier tree.
  void restore(std::vector<Node> nodes) { nodes_ = std::move(nodes); }
  /// A window, or a node of another tree. Indices ascend from call to call.
  void add(std::int64_t index, WindowSums sums);
  const std::vector<Node>& nodes() const { return nodes_; }
  /// The sum of everything added; at least one window.
  WindowSums total() &&;

 private:
  bool complete(std::int64_t a, std::int64_t b) const;
  void merge_last_two();
  std::int64_t before_ = kNone, after_ = kNone;
  std::vector<Node> nodes_;
};

}  // namespace kvplan::calib
