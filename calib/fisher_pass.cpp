#include "calib/fisher_pass.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdint>
#include <vector>

#include "quant/categorical.h"
#include "quant/parallel_for.h"
#include "quant/random.h"
#include "schemas/error.h"

namespace kvplan::calib {
namespace {

/// Rows of logits held at once: on the CPU 128 x 128k vocabulary x (logits + softmax) is 131 MB; a
/// GPU needs more work at a time.
std::int64_t head_rows(bool on_gpu) { return on_gpu ? 512 : 128; }

at::Tensor token_ids(std::span<const tokenizers::TextWindow> windows) {
  const auto length = static_cast<std::int64_t>(windows.front().tokens.size());
  at::Tensor ids = at::empty({static_cast<std::int64_t>(windows.size()), length}, at::kLong);
  auto* out = ids.mutable_data_ptr<std::int64_t>();
  for (const tokenizers::TextWindow& window : windows)
    out = std::copy(window.tokens.begin(), window.tokens.end(), out);
  return ids;
}

void stop_if_asked(const RunControl& control) {
  if (const int signal = control.stopping()) throw InterruptedError(signal, "profile: interrupted");
}

/// x [batch, kv_heads, tokens, head_dim].
void require_finite(const at::Tensor& x, const char* what, int layer, Side side,
                    std::span<const tokenizers::TextWindow> windows,
                    const std::string& model_file) {
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

/// One label per row of p [rows, vocab], row 0 at position `first`.
at::Tensor draw_labels(const at::Tensor& p, std::uint64_t seed, std::int64_t window,
                       std::int64_t first) {
  const auto rows = static_cast<std::size_t>(p.size(0)),
             vocab = static_cast<std::size_t>(p.size(1));
  at::Tensor labels = at::empty({p.size(0)}, at::kLong);
  const at::Tensor on_host = host_copy(p);
  const std::span<const float> probability(on_host.const_data_ptr<float>(), rows * vocab);
  auto* label = labels.mutable_data_ptr<std::int64_t>();
  quant::parallel_for(rows, at::get_num_threads(), [&](std::size_t row) {
    const quant::RandomStream stream(
        seed, quant::StreamPurpose::kLabels, static_cast<std::uint32_t>(window),
        static_cast<std::uint32_t>(window >> 32),
        static_cast<std::uint32_t>(first) + static_cast<std::uint32_t>(row));
    label[row] = static_cast<std::int64_t>(
        quant::draw_categorical(probability.subspan(row * vocab, vocab), stream));
  });
  return labels.to(p.device());
}

/// d log p(y) / dz for logits l = cap tanh(z / cap): (1[y] - p) (1 - (l / cap)^2), [rows, vocab].
at::Tensor capped_slopes(const at::Tensor& logits, const at::Tensor& p, const at::Tensor& labels,
                         double cap) {
  const at::Tensor rows = labels.unsqueeze(1);
  const at::Tensor score = p.neg().scatter_add(1, rows, at::ones_like(rows, p.scalar_type()));
  return score * (1 - (logits / cap).square());
}

/// Without a soft cap: d sum_t log p(y_t) / d normed [tokens, hidden] = W[y] - p W, a few rows of
/// logits at a time.
at::Tensor label_gradient(const forward::Decoder& decoder, const at::Tensor& normed,
                          std::uint64_t seed, std::int64_t window) {
  const at::Tensor& weight = decoder.head_weight();
  const double cap = decoder.config().logit_soft_cap;
  at::Tensor gradient = at::empty_like(normed);
  const std::int64_t step = head_rows(normed.is_cuda());
  for (std::int64_t first = 0; first < normed.size(0); first += step) {
    const std::int64_t rows = std::min(step, normed.size(0) - first);
    const at::Tensor logits = decoder.head(normed.narrow(0, first, rows));
    const at::Tensor p = logits.softmax(-1);
    const at::Tensor labels = draw_labels(p, seed, window, first);
    gradient.narrow(0, first, rows)
        .copy_(cap == 0 ? at::addmm(weight.index_select(0, labels), p, weight, 1, -1)
                        : at::matmul(capped_slopes(logits, p, labels, cap), weight));
  }
  return gradient;
}

}  // namespace

at::Tensor host_copy(const at::Tensor& x) {
  if (x.is_cpu()) return x;
  at::Tensor copy = at::empty(x.sizes(), x.options().device(at::kCPU).pinned_memory(true));
  return copy.copy_(x);
}

std::int64_t head_bytes(const models::ModelConfig& config, bool on_gpu) {
  constexpr std::int64_t kCopies = 3;  // logits, probabilities, their product with a mask
  return kCopies * head_rows(on_gpu) * config.vocab_size * std::int64_t{sizeof(float)};
}

at::Tensor FisherPass::take(forward::ActivationStore::Slot slot) const {
  at::Tensor x = activations.get(slot);
  activations.drop(slot);
  return x;
}

/// The input of every layer and, last, the output of the last one.
std::vector<FisherPass::Slots> FisherPass::forward(std::span<const WindowBatch> batches) const {
  const int num_layers = decoder.config().num_layers;
  std::vector<Slots> inputs(static_cast<std::size_t>(num_layers) + 1);
  for (const WindowBatch batch : batches)
    inputs.front().push_back(activations.put(decoder.embed(token_ids(batch))));
  for (int layer = 0; layer < num_layers; ++layer) {
    decoder.prefetch(layer + 1);
    const auto l = static_cast<std::size_t>(layer);
    for (std::size_t b = 0; b < batches.size(); ++b) {
      stop_if_asked(control);
      const auto check = [&](forward::LayerKv& kv) {
        require_finite(kv.k, "keys", layer, Side::kKey, batches[b], model_file);
        require_finite(kv.v, "values", layer, Side::kValue, batches[b], model_file);
      };
      inputs[l + 1].push_back(
          activations.put(decoder.layer(layer, activations.get(inputs[l][b]), 0, check)));
    }
  }
  return inputs;
}

/// d sum log p(y) / dx, x the output of the last layer.
at::Tensor FisherPass::head_gradient(WindowBatch batch, const at::Tensor& x) const {
  const at::AutoGradMode with_grad(true);
  const at::Tensor leaf = x.detach().requires_grad_();
  const at::Tensor normed = decoder.final_norm(leaf);
  const at::Tensor rows = normed.detach();
  at::Tensor normed_gradient = at::empty_like(rows);
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i);
    normed_gradient[row].copy_(label_gradient(decoder, rows[row], seed, batch[i].index));
  }
  return torch::autograd::grad({normed}, {leaf}, {normed_gradient})[0];
}

void FisherPass::run(std::span<const WindowBatch> batches, const Visit& visit) const {
  const at::NoGradGuard no_grad;
  std::vector<Slots> inputs = forward(batches);

  Slots gradients;  // of sum log p(y) with respect to the output of the layer at hand
  for (std::size_t b = 0; b < batches.size(); ++b) {
    stop_if_asked(control);
    const at::Tensor x = take(inputs.back()[b]);
    gradients.push_back(activations.put(head_gradient(batches[b], x)));
  }
  inputs.pop_back();

  for (int layer = decoder.config().num_layers - 1; layer >= 0; --layer) {
    if (layer > 0) decoder.prefetch(layer - 1);
    for (std::size_t b = 0; b < batches.size(); ++b) {
      stop_if_asked(control);
      const at::AutoGradMode with_grad(true);
      const at::Tensor leaf = take(inputs.back()[b]).detach().requires_grad_();
      forward::LayerKv kv;
      const at::Tensor y =
          decoder.layer(layer, leaf, 0, [&kv](forward::LayerKv& seen) { kv = seen; });
      const auto found = torch::autograd::grad({y}, {leaf, kv.k, kv.v}, {take(gradients[b])});
      require_finite(found[1], "gradients of the keys", layer, Side::kKey, batches[b], model_file);
      require_finite(found[2], "gradients of the values", layer, Side::kValue, batches[b],
                     model_file);
      const at::NoGradGuard statistics_only;
      if (layer > 0) gradients[b] = activations.put(found[0]);
      visit(batches[b], layer,
            {kv.k_pre.detach(), kv.k.detach(), kv.v.detach(), found[1], found[2]});
    }
    inputs.pop_back();
  }
}

}  // namespace kvplan::calib
