#include "calib/profiler.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <sstream>
#include <utility>

#include "calib/checkpoint.h"
#include "calib/fisher_pass.h"
#include "calib/window_statistics.h"
#include "quant/moments.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan::calib {
namespace {

namespace fs = std::filesystem;

void require(bool condition, const std::string& message) {
  if (!condition) throw ArgumentError("profile: " + message);
}

void check_arguments(const std::vector<TextWindow>& windows, const ProfileOptions& options) {
  require(!windows.empty(),
          "expected at least one calibration window, found none; give more text or a larger part "
          "of it");
  require(options.batch >= 1, "batch must be at least 1, found " + std::to_string(options.batch));
  require(options.sink_tokens >= 0,
          "sinks must not be negative, found " + std::to_string(options.sink_tokens));
  require(options.coherent_windows >= 0, "coherent windows must not be negative, found " +
                                             std::to_string(options.coherent_windows));
  require(options.window > options.sink_tokens, "window (" + std::to_string(options.window) +
                                                    " tokens) must be larger than sinks (" +
                                                    std::to_string(options.sink_tokens) + ")");
  std::int64_t previous = -1;
  for (const TextWindow& window : windows) {
    require(window.index > previous, "window indices must ascend from 0, found " +
                                         std::to_string(window.index) + " after " +
                                         std::to_string(previous));
    require(std::cmp_equal(window.tokens.size(), options.window),
            "window " + std::to_string(window.index) + " has " +
                std::to_string(window.tokens.size()) + " tokens, expected " +
                std::to_string(options.window));
    previous = window.index;
  }
}

std::string text_sha256(const std::vector<TextWindow>& windows,
                        const std::vector<ProfileSource>& sources) {
  std::ostringstream text;
  text.precision(17);
  for (const ProfileSource& s : sources) {
    text << s.name << '\n'
         << s.sha256 << ' ' << s.tokens << ' ' << s.part_begin << ' ' << s.part_end << ' '
         << s.weight << '\n';
  }
  for (const TextWindow& window : windows) {
    text << window.index << ' ' << window.source << ' '
         << sha256(std::as_bytes(std::span<const std::int32_t>(window.tokens))) << '\n';
  }
  return sha256(text.str());
}

RunKey run_key(const ModelReader& model, const std::vector<TextWindow>& windows,
               const std::vector<ProfileSource>& sources, const ProfileOptions& options) {
  return {{"model", model.spec().kv_weights_sha256},
          {"text", text_sha256(windows, sources)},
          {"window", std::to_string(options.window)},
          {"dtype", weight_type_name(options.weights)},
          {"sinks", std::to_string(options.sink_tokens)},
          {"coherent", std::to_string(options.coherent_windows)},
          {"seed", std::to_string(options.seed)}};
}

/// Mean squared error of the key projection under 3-bit absmax quantisation: the published weight
/// heuristic, a baseline policy.
double weight_mse(const ModelReader& model, int layer) {
  constexpr double kLargestLevel = 3;
  const std::string name = "blk." + std::to_string(layer) + ".attn_k.weight";
  std::size_t count = 1;
  for (const std::int64_t n : model.shape(name)) count *= static_cast<std::size_t>(n);
  std::vector<float> weight(count);
  model.read(name, weight);
  float absmax = 0;
  for (const float w : weight) absmax = std::max(absmax, std::abs(w));
  if (absmax == 0) return 0;
  const double step = absmax / kLargestLevel;
  double sum = 0;
  for (const double w : weight) {
    const double error = std::round(w / step) * step - w;
    sum += error * error;
  }
  return sum / static_cast<double>(count);
}

/// The profile with everything but its sums; coherent rows sized and zero.
Profile blank_profile(const ModelReader& model, const std::vector<TextWindow>& windows,
                      const std::vector<ProfileSource>& sources, const ProfileOptions& options) {
  const ModelConfig& config = model.config();
  Profile profile;
  profile.model = model.spec();
  profile.window = options.window;
  profile.sink_tokens = options.sink_tokens;
  profile.coherent_windows = options.coherent_windows;
  profile.seed = options.seed;
  profile.sources = sources;
  profile.program = options.program;
  for (const TextWindow& window : windows) {
    profile.windows.push_back({window.index, options.window, window.source});
  }
  profile.tokens = profile.fisher_tokens =
      static_cast<std::int64_t>(windows.size()) * (options.window - options.sink_tokens);

  const auto rows =
      std::min(static_cast<std::int64_t>(windows.size()), std::int64_t{options.coherent_windows});
  const std::int64_t heads = config.kv_heads, d = config.head_dim;
  profile.layers = empty_sums(config);
  for (int l = 0; l < config.num_layers; ++l) {
    LayerProfile& layer = profile.layers[static_cast<std::size_t>(l)];
    layer.inv_freq = rotary_frequencies(config);
    layer.weight_mse = weight_mse(model, l);
    layer.k.cross = layer.v.cross = Array<float>({rows, heads, d, d});
    layer.k.phase = Array<float>({rows, heads, d, config.rotary_dim + 1});
    layer.v.phase = Array<float>({rows, heads, d, 1});
  }
  return profile;
}

/// Profiles windows begin .. begin + count - 1 of the run.
void profile_batch(const FisherPass& pass, std::span<const TextWindow> windows, std::size_t begin,
                   std::size_t count, WindowTree& tree, Profile& profile) {
  const std::span<const TextWindow> batch = windows.subspan(begin, count);
  const auto coherent = static_cast<std::size_t>(profile.coherent_windows);
  std::vector<WindowSums> sums(count, WindowSums(profile.layers.size()));
  pass.run(batch, [&](std::size_t i, int layer, const LayerTrace& trace) {
    const auto l = static_cast<std::size_t>(layer);
    sums[i][l] = layer_sums(pass.decoder, trace, profile.sink_tokens);
    if (begin + i < coherent)
      store_coherent(pass.decoder, trace, profile.sink_tokens, begin + i, profile.layers[l]);
  });
  for (std::size_t i = 0; i < count; ++i) tree.add(batch[i].index, std::move(sums[i]));
}

/// Adds the sums of the windows from `done` on to `tree`, saving as it goes.
void profile_windows(const ModelReader& model, std::span<const TextWindow> windows,
                     const ProfileOptions& options, const RunControl& control, std::size_t done,
                     ProfileCheckpoint& checkpoint, WindowTree& tree, Profile& profile) {
  using Clock = std::chrono::steady_clock;
  const Decoder decoder(model, options.weights);
  const FisherPass pass{decoder, model.path().string(), options.seed, control};
  const auto total = static_cast<std::int64_t>(windows.size());
  auto last_save = Clock::now();
  try {
    while (done < windows.size()) {
      const std::size_t count =
          std::min(static_cast<std::size_t>(options.batch), windows.size() - done);
      profile_batch(pass, windows, done, count, tree, profile);
      done += count;
      control.report({"profile", static_cast<std::int64_t>(done), total, "windows"});
      if (Clock::now() - last_save >= std::chrono::seconds(options.checkpoint_seconds)) {
        checkpoint.save(done, tree, profile);
        last_save = Clock::now();
      }
    }
  } catch (const InterruptedError& interrupted) {
    checkpoint.save(done, tree, profile);
    throw InterruptedError(interrupted.signal(),
                           "profile: stopped after " + std::to_string(done) + " of " +
                               std::to_string(total) +
                               " windows; the same command continues from here");
  }
}

}  // namespace

Profile run_profile(const ModelReader& model, const std::vector<TextWindow>& windows,
                    const std::vector<ProfileSource>& sources, const ProfileOptions& options,
                    const fs::path& folder, const RunControl& control) {
  check_arguments(windows, options);
  const FolderLock lock(folder);
  if (fs::exists(folder / "profile.json")) {
    throw EnvironmentError(
        folder.string(),
        "already holds a finished profile; choose another --out or replace it with --force");
  }
  if (options.threads > 0) at::set_num_threads(options.threads);

  Profile profile = blank_profile(model, windows, sources, options);
  ProfileCheckpoint checkpoint(folder / "checkpoint", run_key(model, windows, sources, options));
  WindowTree tree;
  const std::size_t done = checkpoint.load(empty_sums(model.config()), tree, profile);
  control.report({"profile", static_cast<std::int64_t>(done),
                  static_cast<std::int64_t>(windows.size()), "windows"});
  profile_windows(model, windows, options, control, done, checkpoint, tree, profile);

  WindowSums total = std::move(tree).total();
  for (std::size_t l = 0; l < total.size(); ++l) {
    for_each_sum(
        profile.layers[l], total[l], [](auto& out, auto& sum) { out = std::move(sum); },
        [](auto& out, auto& maximum) { out = std::move(maximum); });
  }
  profile.summary = quant::summarise(profile);
  write_profile(profile, folder);
  checkpoint.remove();
  return profile;
}

}  // namespace kvplan::calib
