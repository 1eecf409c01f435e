#include "calib/work_estimate.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <string>
#include <vector>

namespace kvplan::calib {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kMeasuredSeconds = 0.3;

// Floating point operations of the pass over those of one forward pass: forward, forward again
// layer by layer, and the gradients of the layers' inputs.
constexpr double kPasses = 3;
// What is no large product (norms, rotary, attention's softmax, sums in double) makes the pass this
// much slower than products alone: an assumption until it is measured on an idle machine.
constexpr double kSlowdown = 1.9;
constexpr double kLoadBytesPerSecond = 400e6;  // of weights de-quantised to float

constexpr double kProgramBytes = 330e6;  // LibTorch and the program before any model

/// Operations per second of [rows, hidden] x [hidden, inner].
double measured_rate(std::int64_t rows, std::int64_t hidden, std::int64_t inner) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = at::ones({rows, hidden}), w = at::ones({inner, hidden});
  at::linear(x, w);  // the first call sets threads and caches up
  const auto start = Clock::now();
  double products = 0, seconds = 0;
  do {
    at::linear(x, w);
    ++products;
    seconds = std::chrono::duration<double>(Clock::now() - start).count();
  } while (seconds < kMeasuredSeconds);
  return products * 2.0 * static_cast<double>(rows * hidden * inner) / seconds;
}

/// Sizes of a model as doubles, so that products stay inside the range.
struct Sizes {
  double layers, hidden, inner, vocab, q, kv, heads, d;
  explicit Sizes(const models::ModelConfig& c)
      : layers(c.num_layers),
        hidden(c.hidden_size),
        inner(c.intermediate_size),
        vocab(c.vocab_size),
        q(double{1} * c.query_heads * c.head_dim),
        kv(double{1} * c.kv_heads * c.head_dim),
        heads(c.kv_heads),
        d(c.head_dim) {}
  double layer_matrices() const { return hidden * (2 * q + 2 * kv + 3 * inner); }
};

double operations_per_token(const Sizes& m, double window) {
  const double forward = m.layers * 2 * (m.layer_matrices() + m.q * window);
  const double head = 2 * 2 * m.hidden * m.vocab;              // logits and their gradient
  const double sums = m.layers * 2 * 6 * m.heads * m.d * m.d;  // outer products of K, V, gradients
  return kPasses * forward + head + sums;
}

double memory_bytes(const Sizes& m, const models::ModelConfig& config, double windows,
                    const ProfileOptions& options) {
  const double matrix_bytes = options.weights == forward::WeightType::kFloat32 ? 4 : 2;
  const double weights = matrix_bytes * m.layers * m.layer_matrices() +
                         4 * m.hidden * m.vocab * (config.tied_embeddings ? 1 : 2);
  const double tokens = double{1} * options.window * std::min<double>(options.batch, windows);
  // Inputs of all layers; of one layer what its backward pass needs.
  const double activations =
      4 * tokens * (m.layers * m.hidden + 3 * (4 * m.hidden + 2 * m.q + 4 * m.kv + 5 * m.inner));
  const double layer_sums = 8 * m.heads * (4 * m.d * m.d + 8 * m.d);
  // One set of sums for each power of two in the number of windows, those of the batch, the total.
  const auto powers = static_cast<double>(std::bit_width(static_cast<std::uint64_t>(windows)));
  const double sets = powers + options.batch + 1;
  const double coherent = 4 * std::min<double>(windows, options.coherent_windows) * m.heads * m.d *
                          (2 * m.d + config.rotary_dim + 2);
  return kProgramBytes + weights + activations + m.layers * (sets * layer_sums + coherent);
}

}  // namespace

WorkEstimate estimate_profile(const models::ModelReader& model, std::int64_t windows,
                              const ProfileOptions& options) {
  if (options.threads > 0) at::set_num_threads(options.threads);
  const models::ModelConfig& config = model.config();
  const Sizes sizes(config);
  const double rate = measured_rate(options.window, config.hidden_size, config.intermediate_size);
  const double tokens = static_cast<double>(windows) * options.window;
  const double weight_bytes =
      4 * (sizes.layers * sizes.layer_matrices() + sizes.hidden * sizes.vocab);
  WorkEstimate out;
  out.seconds = kSlowdown * tokens * operations_per_token(sizes, options.window) / rate +
                weight_bytes / kLoadBytesPerSecond;
  out.memory_bytes =
      static_cast<std::int64_t>(memory_bytes(sizes, config, static_cast<double>(windows), options));
  return out;
}

}  // namespace kvplan::calib
