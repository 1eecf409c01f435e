#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "calib/profiler.h"
#include "cli/commands.h"
#include "cli/describe.h"
#include "cli/dry_run.h"
#include "cli/launcher.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

struct ProfileFlags {
  ModelTextOptions input;
  std::int64_t tokens = 65536;
  int sinks = 4, coherent = 64;
  std::string shard;
  LauncherOptions launcher;
  std::filesystem::path out;
};

/// "I/N": keeps the I-th of N contiguous runs of windows (I from 0); window indices stay global.
void keep_shard(const std::string& shard, std::vector<tokenizers::TextWindow>& windows) {
  if (shard.empty()) return;
  std::int64_t i = -1, n = 0;
  char end = 0;
  if (std::sscanf(shard.c_str(), "%ld/%ld%c", &i, &n, &end) != 2 || i < 0 || n < 1 || i >= n) {
    throw ArgumentError("--shard: expected I/N with 0 <= I < N such as 0/4; found '" + shard + "'");
  }
  const auto count = static_cast<std::int64_t>(windows.size());
  if (n > count) {
    throw ArgumentError("--shard: " + std::to_string(n) + " shards of " + std::to_string(count) +
                        " windows; use at most as many shards as windows");
  }
  const std::vector<tokenizers::TextWindow> part(windows.begin() + i * count / n,
                                                 windows.begin() + (i + 1) * count / n);
  windows = part;
}

int run(const ProfileFlags& flags, const GlobalOptions& global) {
  if (flags.tokens < flags.input.window) {
    throw ArgumentError("--tokens " + std::to_string(flags.tokens) +
                        " is less than one --window of " + std::to_string(flags.input.window) +
                        " tokens");
  }
  require_absent(flags.out / "profile.json", global);
  const auto warm_up = start_gpus(flags.input.devices, global);
  auto input = open_model_text(flags.input, flags.tokens / flags.input.window);
  keep_shard(flags.shard, input.windows);
  const auto windows = static_cast<std::int64_t>(input.windows.size());
  if (windows * flags.input.window < flags.tokens && flags.shard.empty()) {
    log(global.verbosity(), "note: the text holds " + std::to_string(windows * flags.input.window) +
                                " tokens in whole windows, " + std::to_string(flags.tokens) +
                                " were asked for");
  }
  calib::ProfileOptions options;
  options.window = flags.input.window;
  options.batch = flags.input.batch;
  options.sink_tokens = flags.sinks;
  options.coherent_windows = flags.coherent;
  options.seed = global.seed;
  options.threads = global.threads;
  options.weights = flags.input.weights;
  options.memory_bytes = flags.input.memory_bytes;
  options.program = kProgram;
  if (global.dry_run) {
    options.devices = own_devices(flags.input.devices, nullptr);
    print_dry_run(
        "would profile " + std::to_string(windows) + " windows of " +
            std::to_string(flags.input.window) + " tokens into " + flags.out.string(),
        {{"command", "profile"},
         {"windows", windows},
         {"window", flags.input.window},
         {"out", flags.out.string()}},
        [&] {
          return estimates::estimate_profile(*input.model, input.windows, input.source_infos(),
                                             options);
        },
        global);
    return 0;
  }
  const auto peers = connect_peers(flags.launcher);
  options.peers = peers.get();
  options.devices = own_devices(flags.input.devices, peers.get());
  if (global.force && is_first(peers.get())) {
    const FolderLock lock(flags.out);  // the files of a run at work stay
    std::filesystem::remove(flags.out / "profile.json");
    std::filesystem::remove_all(flags.out / "checkpoint");
  }
  forward::in_lockstep(peers.get(),
                       [] { return false; });  // nobody begins before the old state is gone
  ProgressPrinter printer(is_first(peers.get()) ? global.verbosity() : Verbosity::kQuiet);
  const auto profile = calib::run_profile(*input.model, input.windows, input.source_infos(),
                                          options, flags.out, run_control(printer));
  if (is_first(peers.get())) std::cout << (global.json ? profile_json(profile) : describe(profile));
  return 0;
}

}  // namespace

void add_profile(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "profile", "Gather K/V statistics and Fisher matrices of a model on calibration text");
  auto flags = std::make_shared<ProfileFlags>();
  add_model_text_options(*command, flags->input);
  command->add_option("--tokens", flags->tokens, "Calibration tokens, in whole windows")
      ->capture_default_str();
  command->add_option("--batch", flags->input.batch, "Windows at once")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      ->add_option("--sinks", flags->sinks,
                   "First positions kept out of the statistics, fp16 at run time")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  command
      ->add_option("--coherent", flags->coherent,
                   "Windows whose coherent sums are kept (cost of width 0)")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  add_devices_option(*command, flags->input.devices);
  add_memory_option(*command, flags->input.memory_bytes);
  add_launcher_options(*command, flags->launcher);
  command->add_option("--shard", flags->shard,
                      "I/N: profile only the I-th of N runs of windows, for `merge`");
  command
      ->add_option("--out,-o", flags->out,
                   "Folder of the profile; an interrupted run continues there")
      ->required();
  add_global_options(*command, global);
  command->callback(
      [flags, &global, &action] { action = [flags, &global] { return run(*flags, global); }; });
}

}  // namespace kvplan::cli
