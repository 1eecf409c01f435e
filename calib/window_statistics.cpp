#include "calib/window_statistics.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <span>

#include "schemas/error.h"

namespace kvplan::calib {
namespace {

/// Arrays still on the device of the model, to reach the host in one copy.
class Fetch {
 public:
  /// `out` gets the values of x, [..] of any type, at run().
  template <class T>
  void add(const at::Tensor& x, Array<T>& out) {
    out.shape = x.sizes().vec();
    parts_.push_back(x.to(at::kDouble).flatten());
    take_.push_back([&out](std::span<const double> values) {
      out.data.resize(values.size());
      std::transform(values.begin(), values.end(), out.data.begin(),
                     [](double value) { return static_cast<T>(value); });
    });
  }
  void run() const {
    const at::Tensor all = at::cat(parts_).to(at::kCPU);
    const double* next = all.const_data_ptr<double>();
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      take_[i]({next, static_cast<std::size_t>(parts_[i].numel())});
      next += parts_[i].numel();
    }
  }

 private:
  std::vector<at::Tensor> parts_;
  std::vector<std::function<void(std::span<const double>)>> take_;
};

/// Positions after the sinks in double: [heads, tokens - sinks, head_dim].
at::Tensor packed(const at::Tensor& x, int sink_tokens) {
  return x.narrow(1, sink_tokens, x.size(1) - sink_tokens).to(at::kDouble);
}

/// sum_t a_t b_tT: [heads, tokens, m] x [heads, tokens, n] -> [heads, m, n].
at::Tensor outer(const at::Tensor& a, const at::Tensor& b) {
  return at::matmul(a.transpose(1, 2), b);
}

at::Tensor norms(const at::Tensor& x) { return at::linalg_vector_norm(x, 2, {-1}); }

void add_side(const at::Tensor& x, const at::Tensor& norm, const at::Tensor& h,
              const at::Tensor& with_sinks, SideSums& sums, Fetch& fetch) {
  fetch.add(x.sum(1), sums.sum);
  fetch.add(outer(x, x), sums.outer);
  fetch.add(norm.sum(1), sums.norm_sum);
  fetch.add(outer(h, h), sums.fisher);
  fetch.add(with_sinks.abs().amax(1), sums.absmax);
}

void store_row(const at::Tensor& x, std::size_t row, Array<float>& out) {
  const at::Tensor single = x.to(at::kCPU, at::kFloat).contiguous();
  const std::span<const float> from(single.const_data_ptr<float>(),
                                    static_cast<std::size_t>(single.numel()));
  const auto to = out.row(row);
  if (from.size() != to.size()) {
    throw InternalError("coherent row: " + std::to_string(from.size()) + " values for a row of " +
                        std::to_string(to.size()));
  }
  std::copy(from.begin(), from.end(), to.begin());
}

/// phi_t = (cos theta_j t.., sin theta_j t.., 1) for t = first .. first + count - 1: [count, 2
/// pairs + 1].
at::Tensor phases(const std::vector<double>& inv_freq, std::int64_t first, std::int64_t count,
                  at::Device device) {
  const at::Tensor position = at::arange(first, first + count, at::kDouble).unsqueeze(1);
  const at::Tensor angle = position.mul(at::tensor(inv_freq, at::kDouble));
  return at::cat({angle.cos(), angle.sin(), at::ones({count, 1}, at::kDouble)}, 1).to(device);
}

template <class T>
void add_to(Array<T>& a, const Array<T>& b) {
  std::transform(a.data.begin(), a.data.end(), b.data.begin(), a.data.begin(), std::plus<T>());
}

template <class T>
void max_to(Array<T>& a, const Array<T>& b) {
  std::transform(a.data.begin(), a.data.end(), b.data.begin(), a.data.begin(),
                 [](T x, T y) { return std::max(x, y); });
}

}  // namespace

WindowSums empty_sums(const models::ModelConfig& config) {
  const std::int64_t heads = config.kv_heads, d = config.head_dim;
  LayerProfile layer;
  layer.kv_heads = config.kv_heads;
  layer.head_dim = config.head_dim;
  layer.rotary_dim = config.rotary_dim;
  for (const Side side : kSides) {
    SideSums& sums = layer.side(side);
    sums.sum = Array<double>({heads, d});
    sums.outer = sums.fisher = Array<double>({heads, d, d});
    sums.norm_sum = Array<double>({heads});
    sums.absmax = Array<float>({heads, d});
  }
  layer.k_rotated_sum = layer.k_rotated_sumsq = Array<double>({heads, d});
  layer.norm_ratio_sum = Array<double>({heads});
  return WindowSums(static_cast<std::size_t>(config.num_layers), layer);
}

LayerProfile layer_sums(const forward::Decoder& decoder, int index, const LayerTrace& trace,
                        int sink_tokens) {
  const at::Tensor k_pre = packed(trace.k_pre, sink_tokens);
  const at::Tensor k = packed(trace.k, sink_tokens);
  const at::Tensor v = packed(trace.v, sink_tokens);
  const at::Tensor h_k_pre =
      packed(decoder.rotate(trace.h_k, index, 0, /*inverse=*/true), sink_tokens);
  const at::Tensor h_v = packed(trace.h_v, sink_tokens);
  const at::Tensor k_norm = norms(k), v_norm = norms(v);

  LayerProfile layer;
  layer.kv_heads = decoder.config().kv_heads;
  layer.head_dim = decoder.config().head_dim;
  layer.rotary_dim = decoder.config().rotary_dim;
  Fetch fetch;
  add_side(k_pre, k_norm, h_k_pre, trace.k, layer.k, fetch);
  add_side(v, v_norm, h_v, trace.v, layer.v, fetch);
  fetch.add(k.sum(1), layer.k_rotated_sum);
  fetch.add(k.square().sum(1), layer.k_rotated_sumsq);
  fetch.add(at::where(v_norm.gt(0), k_norm.div(v_norm), 0.0).sum(1),  // v = 0 adds nothing
            layer.norm_ratio_sum);
  fetch.run();
  return layer;
}

void store_coherent(const forward::Decoder& decoder, int index, const LayerTrace& trace,
                    int sink_tokens, std::size_t row, LayerProfile& layer) {
  const at::Tensor h_k = packed(trace.h_k, sink_tokens), h_v = packed(trace.h_v, sink_tokens);
  const at::Tensor phi =
      phases(decoder.inv_freq(index, trace.k.size(1)), sink_tokens, h_k.size(1), h_k.device());
  store_row(outer(h_k, packed(trace.k, sink_tokens)), row, layer.k.cross);
  store_row(outer(h_v, packed(trace.v, sink_tokens)), row, layer.v.cross);
  store_row(at::matmul(h_k.transpose(1, 2), phi), row, layer.k.phase);
  store_row(h_v.sum(1), row, layer.v.phase);
}

void WindowTree::add(std::int64_t index, WindowSums sums) {
  // For a < b < index the smallest subtree with a and b ends before `index` exactly when the
  // highest bit in which a and b differ is below the one in which b and index differ.
  while (nodes_.size() >= 2) {
    const std::int64_t a = nodes_[nodes_.size() - 2].index, b = nodes_.back().index;
    if ((a ^ b) > (b ^ index) || !complete(a, b)) break;
    merge_last_two();
  }
  nodes_.push_back({index, std::move(sums)});
}

/// Whether the smallest subtree with a and b holds no window of another part.
bool WindowTree::complete(std::int64_t a, std::int64_t b) const {
  const auto bits = static_cast<std::uint64_t>(a ^ b);
  const auto mask = static_cast<std::int64_t>(std::bit_ceil(bits + 1) - 1);
  const std::int64_t first = a & ~mask, last = a | mask;
  return (before_ == kNone || before_ < first) && (after_ == kNone || after_ > last);
}

WindowSums WindowTree::total() && {
  while (nodes_.size() >= 2) merge_last_two();
  return std::move(nodes_.front().sums);
}

void WindowTree::merge_last_two() {
  Node& left = nodes_[nodes_.size() - 2];
  const Node& right = nodes_.back();
  for (std::size_t l = 0; l < left.sums.size(); ++l) {
    for_each_sum(
        left.sums[l], right.sums[l], [](auto& a, const auto& b) { add_to(a, b); },
        [](auto& a, const auto& b) { max_to(a, b); });
  }
  nodes_.pop_back();
}

}  // namespace kvplan::calib
