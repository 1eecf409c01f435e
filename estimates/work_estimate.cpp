#include "estimates/work_estimate.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <functional>
#include <string>

#include "estimates/model_slice.h"
#include "evaluation/window_scorer.h"
#include "forward/decoder.h"
#include "forward/memory_plan.h"
#include "schemas/error.h"

namespace kvplan::estimates {
namespace {

namespace fs = std::filesystem;

/// A window is cut when it and one layer take more floating point operations than this: some
/// seconds on a few cores.
constexpr double kMeasuredOperations = 4e11;
constexpr int kShortestWindow = 128;
constexpr std::int64_t kMeasuredWindows = 2;

constexpr double kProgramBytes = 330e6;  // LibTorch and the program before any model

/// Forward, forward again layer by layer, and the gradients of the layers' inputs.
constexpr double kProfilePasses = 3;

/// What passes on the clock and in the process's threads.
struct Duration {
  double seconds = 0, cpu_seconds = 0;
  friend Duration operator+(Duration a, Duration b) {
    return {a.seconds + b.seconds, a.cpu_seconds + b.cpu_seconds};
  }
  friend Duration operator-(Duration a, Duration b) { return a + -1.0 * b; }
  friend Duration operator*(double f, Duration a) { return {f * a.seconds, f * a.cpu_seconds}; }
};

Duration now() {
  return {
      std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(),
      static_cast<double>(std::clock()) / CLOCKS_PER_SEC};
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
  double matrices() const { return layers * layer_matrices(); }
  double layer_operations(double tokens) const {
    return 2 * tokens * (layer_matrices() + q * tokens);
  }
  double head_operations(double tokens) const { return 2 * tokens * hidden * vocab; }
};

/// Of one window through one layer and the head.
double operations(const models::ModelConfig& config, double tokens, double passes) {
  const Sizes m(config);
  return passes * (m.layer_operations(tokens) + m.head_operations(tokens));
}

int measured_window(const models::ModelConfig& config, int window, double passes) {
  int tokens = window;
  while (tokens > kShortestWindow && operations(config, tokens, passes) > kMeasuredOperations)
    tokens /= 2;
  return std::min(window, std::max(tokens, kShortestWindow));
}

std::vector<tokenizers::TextWindow> measured_windows(
    const std::vector<tokenizers::TextWindow>& windows, int tokens) {
  if (windows.empty()) throw ArgumentError("no window of text to estimate the work on");
  std::vector<tokenizers::TextWindow> out;
  for (std::int64_t i = 0; i < kMeasuredWindows; ++i) {
    out.push_back(windows[static_cast<std::size_t>(i) % windows.size()]);
    out.back().index = i;
    out.back().tokens.resize(static_cast<std::size_t>(tokens));
  }
  return out;
}

/// Work on some windows: what one takes, and what they take together beside that.
struct Timing {
  Duration setup, window;
};

/// `work` reports progress in steps of equal size for every window.
Timing time_windows(const std::function<void(const RunControl&)>& work) {
  const Duration begin = now();
  Duration half, whole;
  work({.progress =
            [&](const Progress& p) {
              if (2 * p.done == p.total) half = now();
              if (p.done == p.total) whole = now();
            },
        .stop_signal = {}});
  const Duration window = whole - half;
  return {now() - begin - double{kMeasuredWindows} * window, window};
}

/// Layers from the middle, neighbours: where kinds of layers alternate, they are of all kinds.
std::vector<int> middle_layers(const models::ModelConfig& config) {
  constexpr int kMeasuredLayers = 4;
  std::vector<int> some;
  for (int layer = config.num_layers / 2;
       layer < config.num_layers && std::ssize(some) < kMeasuredLayers; ++layer)
    some.push_back(layer);
  return some;
}

Duration load_time(const models::ModelReader& model, forward::WeightType weights,
                   forward::Device device) {
  const Duration begin = now();
  const forward::Decoder decoder(model, weights, device);
  return now() - begin;
}

/// All layers: the first with embedding and head, and the others as some do without them. (A
/// difference between two numbers of layers would be small against the head, and as noisy.)
/// `work(slice, windows, control)` does the work on a part of the model.
template <class Work>
Timing time_model(const models::ModelReader& model,
                  const std::vector<tokenizers::TextWindow>& windows, forward::WeightType weights,
                  forward::Device device, const Work& work) {
  constexpr int kFewTokens = 256;
  const auto measure = [&](const ModelSlice& slice, std::vector<tokenizers::TextWindow> some) {
    for (tokenizers::TextWindow& window : some)
      for (std::int32_t& token : window.tokens) token %= slice.config().vocab_size;
    return time_windows([&](const RunControl& control) { work(slice, some, control); });
  };
  const std::vector<int> middle = middle_layers(model.config());
  const auto others = static_cast<double>(model.config().num_layers - 1);
  const auto measured = static_cast<double>(middle.size());
  const ModelSlice one(model, {middle.front()}, kFewTokens), some(model, middle, kFewTokens);
  const Timing whole = measure(ModelSlice(model, {0}), windows), layers = measure(some, windows);
  const Duration load = load_time(some, weights, device) - load_time(one, weights, device);
  return {whole.setup + others / std::max(1.0, measured - 1) * load,
          whole.window + others / measured * layers.window};
}

WorkEstimate stretched(const Timing& timing, double windows, double cut, std::size_t devices) {
  const Duration work = windows * cut * timing.window;
  return {.seconds = timing.setup.seconds + work.seconds / static_cast<double>(devices),
          .cpu_seconds = timing.setup.cpu_seconds + work.cpu_seconds};
}

double weights_bytes(const Sizes& m, const models::ModelConfig& config, forward::WeightType type) {
  return (type == forward::WeightType::kFloat32 ? 4 : 2) * m.matrices() +
         4 * m.hidden * m.vocab * (config.tied_embeddings ? 1 : 2);
}

double profile_bytes(const models::ModelConfig& config, double windows,
                     const calib::ProfileOptions& options) {
  const Sizes m(config);
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
  return kProgramBytes + weights_bytes(m, config, options.weights) + activations +
         m.layers * (sets * layer_sums + coherent);
}

double evaluation_bytes(const models::ModelConfig& config, std::size_t passes,
                        const evaluation::EvaluateOptions& options) {
  const Sizes m(config);
  const double lanes = static_cast<double>(passes) + 1;
  const double scored = static_cast<double>(evaluation::scored_range(options.window).count);
  return kProgramBytes + weights_bytes(m, config, options.weights) +
         static_cast<double>(evaluation::logits_bytes()) + 4 * lanes * scored * m.hidden +
         static_cast<double>(forward::layer_bytes(config, options.window, /*gradients=*/false));
}

/// A limit is kept by reading layers again and again.
std::int64_t limited(double bytes, std::int64_t limit) {
  const auto all = static_cast<std::int64_t>(bytes);
  return limit > 0 ? std::min(all, limit) : all;
}

/// Vanishes with what was written into it.
class ScratchFolder {
 public:
  ScratchFolder() : path_(fs::temp_directory_path() / ("kvplan-" + std::to_string(getpid()))) {}
  ~ScratchFolder() {
    std::error_code gone;
    fs::remove_all(path_, gone);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

}  // namespace

WorkEstimate estimate_profile(const models::ModelReader& model,
                              const std::vector<tokenizers::TextWindow>& windows,
                              const std::vector<ProfileSource>& sources,
                              const calib::ProfileOptions& options) {
  const models::ModelConfig& config = model.config();
  calib::ProfileOptions own = options;
  own.window = std::max(measured_window(config, options.window, kProfilePasses),
                        std::min(options.window, options.sink_tokens + 1));
  own.batch = 1;
  own.memory_bytes = 0;
  own.peers = nullptr;
  own.devices.resize(1);
  const auto some = measured_windows(windows, own.window);
  const Timing timing =
      time_model(model, some, own.weights, own.devices.front(),
                 [&](const models::ModelReader& slice,
                     const std::vector<tokenizers::TextWindow>& text, const RunControl& control) {
                   const ScratchFolder folder;
                   calib::run_profile(slice, text, sources, own, folder.path(), control);
                 });
  const auto count = static_cast<double>(windows.size());
  WorkEstimate out = stretched(timing, count,
                               operations(config, options.window, kProfilePasses) /
                                   operations(config, own.window, kProfilePasses),
                               options.devices.size());
  out.memory_bytes = limited(profile_bytes(config, count, options), options.memory_bytes);
  return out;
}

WorkEstimate estimate_evaluation(const models::ModelReader& model,
                                 const std::vector<tokenizers::TextWindow>& windows,
                                 const std::vector<evaluation::Candidate>& candidates,
                                 const evaluation::EvaluateOptions& options) {
  const models::ModelConfig& config = model.config();
  const auto passes = evaluation::evaluation_passes(candidates, options.modes).size();
  const double lanes = static_cast<double>(passes) + 1;
  evaluation::EvaluateOptions own = options;
  own.window = measured_window(config, options.window, lanes);
  own.memory_bytes = 0;
  own.peers = nullptr;
  own.devices.resize(1);
  own.partial_file.clear();
  const auto some = measured_windows(windows, own.window);
  const Timing timing = time_model(
      model, some, own.weights, own.devices.front(),
      [&](const ModelSlice& slice, const std::vector<tokenizers::TextWindow>& text,
          const RunControl& control) {
        std::vector<PlanBundle> plans;
        for (const evaluation::Candidate& candidate : candidates)
          plans.push_back(candidate.bundle ? slice_plan(*candidate.bundle, slice.layers())
                                           : PlanBundle{});
        std::vector<evaluation::Candidate> sliced = candidates;
        for (std::size_t i = 0; i < sliced.size(); ++i)
          if (sliced[i].bundle) sliced[i].bundle = &plans[i];
        evaluation::score_tokens(slice, text, sliced, own, control);
      });
  WorkEstimate out =
      stretched(timing, static_cast<double>(windows.size()),
                operations(config, options.window, lanes) / operations(config, own.window, lanes),
                options.devices.size());
  out.memory_bytes = limited(evaluation_bytes(config, passes, options), options.memory_bytes);
  return out;
}

}  // namespace kvplan::estimates
