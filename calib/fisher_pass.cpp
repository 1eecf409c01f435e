#include "calib/fisher_pass.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdint>
#include <vector>

#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::calib {
namespace {

// Rows of logits held at once: 128 x 128k vocabulary x (logits + softmax) is 131 MB.
constexpr std::int64_t kHeadRows = 128;

at::Tensor token_ids(std::span<const TextWindow> windows) {
  const auto length = static_cast<std::int64_t>(windows.front().tokens.size());
  at::Tensor ids = at::empty({static_cast<std::int64_t>(windows.size()), length}, at::kLong);
  auto* out = ids.mutable_data_ptr<std::int64_t>();
  for (const TextWindow& window : windows)
    out = std::copy(window.tokens.begin(), window.tokens.end(), out);
  return ids;
}

void stop_if_asked(const RunControl& control) {
  if (const int signal = control.stopping()) throw InterruptedError(signal, "profile: interrupted");
}

/// x [batch, kv_heads, tokens, head_dim].
void require_finite(const at::Tensor& x, const char* what, int layer, Side side,
                    std::span<const TextWindow> windows, const std::string& model_file) {
  const at::Tensor finite = at::isfinite(x);
  if (finite.all().item<bool>()) return;
  const at::Tensor at = finite.logical_not().nonzero()[0];
  const auto window = windows[static_cast<std::size_t>(at[0].item<std::int64_t>())].index;
  const std::string name = "layers." + std::to_string(layer) + "." + side_name(side);
  throw InputError(model_file, name,
                   std::string("expected finite ") + what + ", found NaN or Inf in window " +
                       std::to_string(window) + ", KV head " +
                       std::to_string(at[1].item<std::int64_t>()) + ", position " +
                       std::to_string(at[2].item<std::int64_t>()) +
                       "; the weights are damaged or overflow float32");
}

/// A sample of p [vocab] by rejection from the uniform distribution, peak * vocab tries on average.
/// Inverting the distribution function would be cheaper, but a rounding error moves all its later
/// steps: where the tail is flat, the label of another thread count or processor would often be
/// another one. Here it changes with a probability of about that error.
std::int64_t draw(const float* p, std::int64_t vocab, float peak, quant::RandomStream& stream) {
  if (!(peak > 0)) return 0;  // NaN; the gradients will show it
  for (;;) {
    const std::uint32_t candidate = stream.next_below(static_cast<std::uint32_t>(vocab));
    if (stream.next_uniform() * peak < p[candidate]) return candidate;
  }
}

/// One label per row of p [rows, vocab], row 0 at position `first`.
at::Tensor draw_labels(const at::Tensor& p, std::uint64_t seed, std::int64_t window,
                       std::int64_t first) {
  const std::int64_t rows = p.size(0), vocab = p.size(1);
  at::Tensor labels = at::empty({rows}, at::kLong);
  const at::Tensor peaks = p.amax(-1);
  const float* probability = p.const_data_ptr<float>();
  const float* peak = peaks.const_data_ptr<float>();
  auto* label = labels.mutable_data_ptr<std::int64_t>();
  at::parallel_for(0, rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      quant::RandomStream stream(
          seed, quant::StreamPurpose::kLabels, static_cast<std::uint32_t>(window),
          static_cast<std::uint32_t>(window >> 32), static_cast<std::uint32_t>(first + row));
      label[row] = draw(probability + row * vocab, vocab, peak[row], stream);
    }
  });
  return labels;
}

/// d sum_t log p(y_t) / d normed [tokens, hidden] = W[y] - p W, a few rows of logits at a time.
at::Tensor label_gradient(const Decoder& decoder, const at::Tensor& normed, std::uint64_t seed,
                          std::int64_t window) {
  const at::Tensor& weight = decoder.head_weight();
  at::Tensor gradient = at::empty_like(normed);
  for (std::int64_t first = 0; first < normed.size(0); first += kHeadRows) {
    const std::int64_t rows = std::min(kHeadRows, normed.size(0) - first);
    const at::Tensor p = decoder.head(normed.narrow(0, first, rows)).softmax(-1);
    const at::Tensor labels = draw_labels(p, seed, window, first);
    gradient.narrow(0, first, rows)
        .copy_(at::addmm(weight.index_select(0, labels), p, weight, 1, -1));
  }
  return gradient;
}

}  // namespace

void FisherPass::run(std::span<const TextWindow> windows, const Visit& visit) const {
  const at::NoGradGuard no_grad;
  const int num_layers = decoder.config().num_layers;
  std::vector<at::Tensor> inputs;
  at::Tensor x = decoder.embed(token_ids(windows));
  for (int layer = 0; layer < num_layers; ++layer) {
    stop_if_asked(control);
    inputs.push_back(x);
    x = decoder.layer(layer, x, 0, [&](LayerKv& kv) {
      require_finite(kv.k, "keys", layer, Side::kKey, windows, model_file);
      require_finite(kv.v, "values", layer, Side::kValue, windows, model_file);
    });
  }

  at::Tensor gradient;  // of sum log p(y) with respect to the output of the layer at hand
  {
    const at::AutoGradMode with_grad(true);
    const at::Tensor leaf = x.detach().requires_grad_();
    const at::Tensor normed = decoder.final_norm(leaf);
    const at::Tensor rows = normed.detach();
    at::Tensor normed_gradient = at::empty_like(rows);
    for (std::size_t i = 0; i < windows.size(); ++i) {
      const auto row = static_cast<std::int64_t>(i);
      normed_gradient[row].copy_(label_gradient(decoder, rows[row], seed, windows[i].index));
    }
    gradient = torch::autograd::grad({normed}, {leaf}, {normed_gradient})[0];
  }
  x.reset();

  for (int layer = num_layers - 1; layer >= 0; --layer) {
    stop_if_asked(control);
    const at::AutoGradMode with_grad(true);
    const at::Tensor leaf = inputs.back().detach().requires_grad_();
    inputs.pop_back();
    LayerKv kv;
    const at::Tensor y = decoder.layer(layer, leaf, 0, [&kv](LayerKv& seen) { kv = seen; });
    const auto gradients = torch::autograd::grad({y}, {leaf, kv.k, kv.v}, {gradient});
    gradient = gradients[0];
    require_finite(gradients[1], "gradients of the keys", layer, Side::kKey, windows, model_file);
    require_finite(gradients[2], "gradients of the values", layer, Side::kValue, windows,
                   model_file);
    const at::NoGradGuard statistics_only;
    for (std::size_t i = 0; i < windows.size(); ++i) {
      const auto row = static_cast<std::int64_t>(i);
      visit(i, layer,
            {kv.k_pre.detach()[row], kv.k.detach()[row], kv.v.detach()[row], gradients[1][row],
             gradients[2][row]});
    }
  }
}

}  // namespace kvplan::calib
