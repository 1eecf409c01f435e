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
#include <type_traits>

#include "schemas/error.h"

namespace kvplan::calib {
namespace {

constexpr std::int64_t kTokenDim = 2;

/// Arrays of several windows, still on the device of the model, to reach the host in one copy.
template <class Out>
class Fetch {
 public:
  /// Window w's part of x, [windows, ..] of any type, goes to of(window w's Out) at run().
  template <class Of>
  void add(const at::Tensor& x, const Of& of) {
    const std::vector<std::int64_t> shape = x.sizes().slice(1).vec();
    parts_.push_back(x.to(at::kDouble).flatten(1));
    take_.push_back([of, shape](std::span<const double> values, Out& out) {
      auto& array = of(out);
      using Value = typename std::remove_reference_t<decltype(array.data)>::value_type;
      array.shape = shape;
      array.data.resize(values.size());
      std::transform(values.begin(), values.end(), array.data.begin(),
                     [](double value) { return static_cast<Value>(value); });
    });
  }
  void run(std::span<Out> windows) const {
    const at::Tensor all = host_copy(at::cat(parts_, 1));
    const double* next = all.const_data_ptr<double>();
    for (Out& window : windows)
      for (std::size_t i = 0; i < parts_.size(); ++i) {
        const auto values = static_cast<std::size_t>(parts_[i].size(1));
        take_[i]({next, values}, window);
        next += values;
      }
  }

 private:
  std::vector<at::Tensor> parts_;  // [windows, values]
  std::vector<std::function<void(std::span<const double>, Out&)>> take_;
};

/// Positions after the sinks in double: [windows, heads, tokens - sinks, head_dim].
at::Tensor packed(const at::Tensor& x, int sink_tokens) {
  return x.narrow(kTokenDim, sink_tokens, x.size(kTokenDim) - sink_tokens).to(at::kDouble);
}

/// sum_t a_t b_tT: [.., tokens, m] x [.., tokens, n] -> [.., m, n].
at::Tensor outer(const at::Tensor& a, const at::Tensor& b) {
  return at::matmul(a.transpose(-2, -1), b);
}

at::Tensor norms(const at::Tensor& x) { return at::linalg_vector_norm(x, 2, {-1}); }

void add_side(Side side, const at::Tensor& x, const at::Tensor& norm, const at::Tensor& h,
              const at::Tensor& with_sinks, Fetch<LayerProfile>& fetch) {
  const auto to = [&fetch, side](const at::Tensor& value, auto member) {
    fetch.add(value, [side, member](LayerProfile& out) -> auto& { return out.side(side).*member; });
  };
  to(x.sum(kTokenDim), &SideSums::sum);
  to(outer(x, x), &SideSums::outer);
  to(norm.sum(kTokenDim), &SideSums::norm_sum);
  to(outer(h, h), &SideSums::fisher);
  to(with_sinks.abs().amax(kTokenDim), &SideSums::absmax);
}

void store_row(const Array<float>& from, std::size_t row, Array<float>& out) {
  const auto to = out.row(row);
  if (from.data.size() != to.size()) {
    throw InternalError("coherent row: " + std::to_string(from.data.size()) +
                        " values for a row of " + std::to_string(to.size()));
  }
  std::copy(from.data.begin(), from.data.end(), to.begin());
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

std::vector<LayerProfile> TraceStatistics::sums(int layer, const LayerTrace& trace) const {
  const at::Tensor k_pre = packed(trace.k_pre, sink_tokens_), k = packed(trace.k, sink_tokens_),
                   v = packed(trace.v, sink_tokens_), h_v = packed(trace.h_v, sink_tokens_);
  const at::Tensor h_k_pre =
      packed(decoder_.rotate(trace.h_k, layer, 0, /*inverse=*/true), sink_tokens_);
  const at::Tensor k_norm = norms(k), v_norm = norms(v);

  Fetch<LayerProfile> fetch;
  add_side(Side::kKey, k_pre, k_norm, h_k_pre, trace.k, fetch);
  add_side(Side::kValue, v, v_norm, h_v, trace.v, fetch);
  const auto to = [&fetch](const at::Tensor& value, auto member) {
    fetch.add(value, [member](LayerProfile& out) -> auto& { return out.*member; });
  };
  to(k.sum(kTokenDim), &LayerProfile::k_rotated_sum);
  to(k.square().sum(kTokenDim), &LayerProfile::k_rotated_sumsq);
  to(at::where(v_norm.gt(0), k_norm.div(v_norm), 0.0).sum(kTokenDim),  // v = 0 adds nothing
     &LayerProfile::norm_ratio_sum);

  LayerProfile blank;
  blank.kv_heads = decoder_.config().kv_heads;
  blank.head_dim = decoder_.config().head_dim;
  blank.rotary_dim = decoder_.config().rotary_dim;
  std::vector<LayerProfile> out(static_cast<std::size_t>(trace.k.size(0)), blank);
  fetch.run(out);
  return out;
}

void TraceStatistics::store_coherent(int layer, const LayerTrace& trace, std::size_t windows,
                                     std::size_t row, LayerProfile& out) {
  const auto first = [&](const at::Tensor& x) {
    return packed(x.narrow(0, 0, static_cast<std::int64_t>(windows)), sink_tokens_);
  };
  const at::Tensor h_k = first(trace.h_k), h_v = first(trace.h_v);
  Fetch<LayerProfile> fetch;
  const auto to = [&fetch](Side side, const at::Tensor& value, auto member) {
    fetch.add(value, [side, member](LayerProfile& one) -> auto& { return one.side(side).*member; });
  };
  to(Side::kKey, outer(h_k, first(trace.k)), &SideSums::cross);
  to(Side::kValue, outer(h_v, first(trace.v)), &SideSums::cross);
  to(Side::kKey, at::matmul(h_k.transpose(-2, -1), phases(layer, trace.k.size(kTokenDim))),
     &SideSums::phase);
  to(Side::kValue, h_v.sum(kTokenDim), &SideSums::phase);
  std::vector<LayerProfile> rows(windows);
  fetch.run(rows);
  for (std::size_t i = 0; i < windows; ++i)
    for (const Side side : kSides) {
      store_row(rows[i].side(side).cross, row + i, out.side(side).cross);
      store_row(rows[i].side(side).phase, row + i, out.side(side).phase);
    }
}

/// phi_t = (cos theta_j t.., sin theta_j t.., 1) for t = sink_tokens .. tokens - 1: [tokens -
/// sinks, 2 pairs + 1].
const at::Tensor& TraceStatistics::phases(int layer, std::int64_t tokens) {
  std::vector<double> inv_freq = decoder_.inv_freq(layer, tokens);
  const std::int64_t count = tokens - sink_tokens_;
  if (!phases_.value.defined() || phases_.value.size(0) != count || phases_.inv_freq != inv_freq) {
    const at::Tensor position =
        at::arange(std::int64_t{sink_tokens_}, tokens, at::kDouble).unsqueeze(1);
    const at::Tensor angle = position.mul(at::tensor(inv_freq, at::kDouble));
    phases_.value = at::cat({angle.cos(), angle.sin(), at::ones({count, 1}, at::kDouble)}, 1)
                        .to(decoder_.device());
    phases_.inv_freq = std::move(inv_freq);
  }
  return phases_.value;
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
