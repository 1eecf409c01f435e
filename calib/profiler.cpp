#include "calib/profiler.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <functional>
#include <list>
#include <span>
#include <sstream>
#include <utility>

#include "calib/checkpoint.h"
#include "calib/fisher_pass.h"
#include "calib/window_statistics.h"
#include "forward/activation_store.h"
#include "forward/device_threads.h"
#include "forward/memory_plan.h"
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

void check_arguments(const std::vector<tokenizers::TextWindow>& windows,
                     const ProfileOptions& options) {
  require(!windows.empty(),
          "expected at least one calibration window, found none; give more text or a larger part "
          "of it");
  require(!options.devices.empty(), "expected at least one device, found none");
  require(options.batch >= 1, "batch must be at least 1, found " + std::to_string(options.batch));
  require(options.sink_tokens >= 0,
          "sinks must not be negative, found " + std::to_string(options.sink_tokens));
  require(options.coherent_windows >= 0, "coherent windows must not be negative, found " +
                                             std::to_string(options.coherent_windows));
  require(options.window > options.sink_tokens, "window (" + std::to_string(options.window) +
                                                    " tokens) must be larger than sinks (" +
                                                    std::to_string(options.sink_tokens) + ")");
  std::int64_t previous = -1;
  for (const tokenizers::TextWindow& window : windows) {
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

std::string text_sha256(std::span<const tokenizers::TextWindow> windows,
                        const std::vector<ProfileSource>& sources) {
  std::ostringstream text;
  text.precision(17);
  for (const ProfileSource& s : sources) {
    text << s.name << '\n'
         << s.sha256 << ' ' << s.tokens << ' ' << s.part_begin << ' ' << s.part_end << ' '
         << s.weight << '\n';
  }
  for (const tokenizers::TextWindow& window : windows) {
    text << window.index << ' ' << window.source << ' '
         << sha256(std::as_bytes(std::span<const std::int32_t>(window.tokens))) << '\n';
  }
  return sha256(text.str());
}

RunKey run_key(const models::ModelReader& model, std::span<const tokenizers::TextWindow> windows,
               const std::vector<ProfileSource>& sources, const ProfileOptions& options) {
  return {{"model", model.spec().kv_weights_sha256},
          {"text", text_sha256(windows, sources)},
          {"window", std::to_string(options.window)},
          {"dtype", forward::weight_type_name(options.weights)},
          {"sinks", std::to_string(options.sink_tokens)},
          {"coherent", std::to_string(options.coherent_windows)},
          {"seed", std::to_string(options.seed)}};
}

/// Mean squared error of the key projection under 3-bit absmax quantisation: the published weight
/// heuristic, a baseline policy.
double weight_mse(const models::ModelReader& model, int layer) {
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
Profile blank_profile(const models::ModelReader& model,
                      std::span<const tokenizers::TextWindow> windows,
                      const std::vector<ProfileSource>& sources, const ProfileOptions& options) {
  const models::ModelConfig& config = model.config();
  Profile profile;
  profile.model = model.spec();
  profile.window = options.window;
  profile.sink_tokens = options.sink_tokens;
  profile.coherent_windows = options.coherent_windows;
  profile.seed = options.seed;
  profile.sources = sources;
  profile.program = options.program;
  for (const tokenizers::TextWindow& window : windows) {
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
    layer.inv_freq = models::rotary_frequencies(config, l, options.window);
    layer.weight_mse = weight_mse(model, l);
    layer.k.cross = layer.v.cross = Array<float>({rows, heads, d, d});
    layer.k.phase = Array<float>({rows, heads, d, config.rotary_dim + 1});
    layer.v.phase = Array<float>({rows, heads, d, 1});
  }
  return profile;
}

/// One pass over some batches on one device.
class DeviceProfiler {
 public:
  DeviceProfiler(const models::ModelReader& model, const ProfileOptions& options,
                 forward::Device device, const forward::MemoryPlan& plan, const fs::path& folder,
                 const RunControl& control)
      : decoder_(model, options.weights, device,
                 plan.stream ? forward::Residency::kStream : forward::Residency::kAll),
        activations_(plan.memory_bytes, folder),
        pass_{decoder_, model.path().string(), options.seed, control, activations_},
        statistics_(decoder_, options.sink_tokens) {}

  /// Sums and coherent rows of `batches`, which lie in `windows`: sums[i] and, where there is one,
  /// row first_row + i of `profile` belong to windows[i].
  void run(std::span<const WindowBatch> batches, std::span<const tokenizers::TextWindow> windows,
           std::size_t first_row, std::vector<WindowSums>& sums, Profile& profile) {
    const auto coherent = static_cast<std::size_t>(profile.coherent_windows);
    pass_.run(batches, [&](WindowBatch batch, int layer, const LayerTrace& trace) {
      const auto first = static_cast<std::size_t>(batch.data() - windows.data()),
                 l = static_cast<std::size_t>(layer);
      std::vector<LayerProfile> found = statistics_.sums(layer, trace);
      for (std::size_t i = 0; i < batch.size(); ++i) sums[first + i][l] = std::move(found[i]);
      const std::size_t row = first_row + first;
      if (row < coherent)
        statistics_.store_coherent(layer, trace, std::min(batch.size(), coherent - row), row,
                                   profile.layers[l]);
    });
  }

 private:
  forward::Decoder decoder_;
  forward::ActivationStore activations_;
  FisherPass pass_;
  TraceStatistics statistics_;
};

forward::Workload profile_workload(const models::ModelReader& model, const ProfileOptions& options,
                                   const Profile& profile) {
  const models::ModelConfig& config = model.config();
  const std::int64_t tokens = std::int64_t{options.batch} * options.window,
                     windows = std::ssize(profile.windows);
  const std::int64_t activation = tokens * config.hidden_size * std::int64_t{sizeof(float)};
  std::int64_t sums = 0, rows = 0;  // of a window, of the coherent windows
  for (const LayerProfile& layer : profile.layers) {
    for_each_sum(
        layer, layer,
        [&](const auto& x, const auto&) {
          sums += std::ssize(x.data) * std::int64_t{sizeof(double)};
        },
        [&](const auto& x, const auto&) {
          sums += std::ssize(x.data) * std::int64_t{sizeof(float)};
        });
    for (const Side side : kSides)
      rows += (std::ssize(layer.side(side).cross.data) + std::ssize(layer.side(side).phase.data)) *
              std::int64_t{sizeof(float)};
  }
  // Keys before and after rotary, values, gradients and what they are turned or squared into.
  constexpr std::int64_t kStatisticsCopies = 7;
  const std::int64_t statistics =
      kStatisticsCopies * tokens * config.kv_heads * config.head_dim * std::int64_t{sizeof(double)};
  const std::int64_t nodes = std::bit_width(static_cast<std::uint64_t>(windows)) + 1;
  return {.units = (windows + options.batch - 1) / options.batch,
          // A checkpoint holds a second copy of the nodes for a moment.
          .fixed_bytes = forward::kProcessBytes + rows + 2 * nodes * sums +
                         forward::layer_bytes(config, tokens, /*gradients=*/true) + statistics +
                         head_bytes(config, !options.devices.front().is_cpu()),
          .unit_bytes = options.batch * sums + 2 * activation,
          .boundary_bytes = (config.num_layers + 1) * activation};
}

/// The part of a run that falls to this process.
struct Part {
  std::span<const tokenizers::TextWindow> windows;
  std::size_t done = 0;
};

/// Profiles the windows of `part` from part.done on into `tree` and `profile`, saving as it goes.
void profile_windows(const models::ModelReader& model, Part& part, const ProfileOptions& options,
                     const fs::path& folder, const RunControl& control,
                     ProfileCheckpoint& checkpoint, WindowTree& tree, Profile& profile) {
  using Clock = std::chrono::steady_clock;
  const auto batch = static_cast<std::size_t>(options.batch);
  const std::size_t total = part.windows.size();
  const forward::MemoryPlan plan =
      forward::plan_memory(options.memory_bytes, forward::weight_bytes(model, options.weights),
                           profile_workload(model, options, profile));
  std::list<DeviceProfiler> devices;
  for (const forward::Device device : options.devices)
    devices.emplace_back(model, options, device, plan, folder, control);
  const std::size_t step = batch * static_cast<std::size_t>(plan.units) * devices.size();

  const auto report = [&] {
    control.report({"profile", static_cast<std::int64_t>(part.done),
                    static_cast<std::int64_t>(total), "windows"});
  };
  const auto save = [&] { checkpoint.save(part.done, tree, profile); };
  report();
  auto last_save = Clock::now();
  const auto next_group = [&] {
    if (part.done == total) return false;
    const auto group = part.windows.subspan(part.done, std::min(step, total - part.done));
    std::vector<WindowSums> sums(group.size(), WindowSums(profile.layers.size()));
    std::vector<std::vector<WindowBatch>> batches(devices.size());
    for (std::size_t begin = 0; begin < group.size(); begin += batch)
      batches[begin / batch % devices.size()].push_back(
          group.subspan(begin, std::min(batch, group.size() - begin)));
    auto device = devices.begin();
    std::vector<std::function<void()>> work;
    for (const auto& share : batches) {
      work.emplace_back([&, device] { device->run(share, group, part.done, sums, profile); });
      ++device;
    }
    forward::run_together(work);
    for (std::size_t i = 0; i < group.size(); ++i) tree.add(group[i].index, std::move(sums[i]));
    part.done += group.size();
    report();
    if (Clock::now() - last_save >= std::chrono::seconds(options.checkpoint_seconds)) {
      save();
      last_save = Clock::now();
    }
    return part.done < total;
  };
  try {
    forward::in_lockstep(options.peers, next_group);
  } catch (const InterruptedError& interrupted) {
    save();
    throw InterruptedError(interrupted.signal(),
                           "profile: stopped after " + std::to_string(part.done) + " of " +
                               std::to_string(total) +
                               " windows; the same command continues from here");
  } catch (const EnvironmentError&) {  // a peer is gone
    if (options.peers) save();
    throw;
  }
}

/// Puts the sums into `profile`.
void finish(Profile& profile, WindowSums total) {
  for (std::size_t l = 0; l < total.size(); ++l) {
    for_each_sum(
        profile.layers[l], total[l], [](auto& out, auto& sum) { out = std::move(sum); },
        [](auto& out, auto& maximum) { out = std::move(maximum); });
  }
  profile.summary = quant::summarise(profile);
}

/// While it lives LibTorch takes algorithms on GPUs that give the same bits every time, and refuses
/// operations that have none. cuBLAS wants CUBLAS_WORKSPACE_CONFIG set for that.
class SameBits {
 public:
  explicit SameBits(const std::vector<forward::Device>& devices)
      : before_(at::globalContext().deterministicAlgorithms()),
        filled_before_(at::globalContext().deterministicFillUninitializedMemory()) {
    if (std::ranges::all_of(devices, &forward::Device::is_cpu)) return;
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  }
  ~SameBits() {
    at::globalContext().setDeterministicAlgorithms(before_, false);
    at::globalContext().setDeterministicFillUninitializedMemory(filled_before_);
  }
  SameBits(const SameBits&) = delete;
  SameBits& operator=(const SameBits&) = delete;

 private:
  bool before_, filled_before_;
};

std::string part_name(const forward::Peers& peers) {
  return "rank-" + std::to_string(peers.rank()) + "-of-" + std::to_string(peers.size());
}

/// Where this process keeps its state. InputError when the run was begun by another number of
/// processes.
fs::path checkpoint_folder(const fs::path& folder, const forward::Peers* peers) {
  const fs::path root = folder / "checkpoint";
  const std::string suffix = peers ? "-of-" + std::to_string(peers->size()) : "";
  if (fs::is_directory(root))
    for (const auto& entry : fs::directory_iterator(root)) {
      const std::string name = entry.path().filename().string();
      if (peers ? !name.ends_with(suffix) : name.starts_with("rank-"))
        throw InputError(
            entry.path().string(), "",
            std::string("expected a checkpoint of ") +
                (peers ? std::to_string(peers->size()) + " processes" : "one process") +
                ", found one of another number; start as many as before, or anew with "
                "--force");
    }
  return peers ? root / part_name(*peers) : root;
}

}  // namespace

Profile run_profile(const models::ModelReader& model,
                    const std::vector<tokenizers::TextWindow>& windows,
                    const std::vector<ProfileSource>& sources, const ProfileOptions& options,
                    const fs::path& folder, const RunControl& control) {
  check_arguments(windows, options);
  const SameBits same_bits(options.devices);
  forward::Peers* const peers = options.peers;
  const bool first = !peers || peers->rank() == 0;
  const fs::path checkpoint_at = checkpoint_folder(folder, peers);
  const FolderLock lock(first ? folder : checkpoint_at);
  if (fs::exists(folder / "profile.json")) {
    throw EnvironmentError(
        folder.string(),
        "already holds a finished profile; choose another --out or replace it with --force");
  }
  if (options.threads > 0) at::set_num_threads(options.threads);

  const int rank = peers ? peers->rank() : 0, size = peers ? peers->size() : 1;
  const auto share = [&](int of_rank) {
    return forward::share_of(of_rank, size, windows.size(),
                             static_cast<std::size_t>(options.batch));
  };
  const auto coherent = static_cast<std::size_t>(options.coherent_windows);
  const auto [begin, end] = share(rank);
  Part part{std::span(windows).subspan(begin, end - begin)};
  ProfileOptions own = options;
  own.coherent_windows = static_cast<int>(coherent - std::min(coherent, begin));
  // Rank 0 has the first windows: its profile has room for the rows of all others behind its own.
  Profile profile = blank_profile(model, first ? std::span(windows) : part.windows, sources, own);
  const WindowSums zero = empty_sums(model.config());
  ProfileCheckpoint checkpoint(checkpoint_at, run_key(model, part.windows, sources, own));
  WindowTree tree(begin == 0 ? WindowTree::kNone : windows[begin - 1].index,
                  end == windows.size() ? WindowTree::kNone : windows[end].index);
  part.done = checkpoint.load(zero, tree, profile);
  profile_windows(model, part, options, folder, control, checkpoint, tree, profile);

  forward::in_lockstep(peers, [&] {
    if (!first) {
      const auto rows =
          std::min(part.windows.size(), static_cast<std::size_t>(own.coherent_windows));
      peers->send_to_first(pack_part(tree, profile, rows));
      return false;
    }
    WindowTree whole;
    for (const WindowTree::Node& node : tree.nodes()) whole.add(node.index, node.sums);
    for (int other = 1; other < size; ++other)
      unpack_part(peers->receive_from(other), zero, std::min(coherent, share(other).first), whole,
                  profile);
    finish(profile, std::move(whole).total());
    write_profile(profile, folder);
    return false;
  });
  checkpoint.remove();
  std::error_code not_empty;
  if (peers) fs::remove(folder / "checkpoint", not_empty);
  return profile;
}

}  // namespace kvplan::calib
