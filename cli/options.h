#pragma once
// Flags that several commands share, and what they parse into.

#include <CLI/CLI.hpp>
#include <chrono>
#include <filesystem>
#include <string>
#include <vector>

#include "cli/console.h"
#include "forward/device.h"
#include "models/model.h"
#include "schemas/run_control.h"
#include "tokenizers/text.h"

namespace kvplan::cli {

struct GlobalOptions {
  bool json = false, quiet = false, verbose = false, force = false, dry_run = false;
  int threads = 0;  // 0: all cores
  std::uint64_t seed = 0;
  std::chrono::steady_clock::time_point begun = std::chrono::steady_clock::now();
  Verbosity verbosity() const {
    return quiet ? Verbosity::kQuiet : verbose ? Verbosity::kVerbose : Verbosity::kNormal;
  }
};

void add_global_options(CLI::App& command, GlobalOptions& options);

struct ModelTextOptions {
  std::filesystem::path model;
  std::vector<std::filesystem::path> text;
  std::string part = "0:1";
  int window = 1024;
  int batch = 1;
  forward::WeightType weights = forward::WeightType::kFloat32;
  std::vector<forward::Device> devices = {forward::Device::kCpu};
  std::int64_t memory_bytes = 0;  // 0: no limit
};

/// Refuses what is no finite number above 0.
CLI::Validator positive_number();

/// --dtype.
void add_dtype_option(CLI::App& command, forward::WeightType& weights);

/// --device cpu|cuda|cuda:N.
void add_device_option(CLI::App& command, forward::Device& device);

/// --device with several GPUs, separated by commas; `devices` keeps its value without the flag.
void add_devices_option(CLI::App& command, std::vector<forward::Device>& devices);

/// --memory SIZE.
void add_memory_option(CLI::App& command, std::int64_t& bytes);

void add_model_text_options(CLI::App& command, ModelTextOptions& options, bool required = true);

/// A model with its text cut into windows.
struct ModelText {
  std::unique_ptr<models::ModelReader> model;
  std::vector<tokenizers::TokenSource> sources;
  double part_begin = 0, part_end = 1;
  std::vector<tokenizers::TextWindow> windows;
  std::vector<ProfileSource> source_infos() const;
};

/// Opens and checks everything before any weight is read. max_windows 0: all.
ModelText open_model_text(const ModelTextOptions& options, std::int64_t max_windows);

/// Progress to stderr; stops at the first SIGINT or SIGTERM.
RunControl run_control(ProgressPrinter& printer);

/// Installs the handlers that run_control watches; a second signal ends the process at once.
void install_signal_handlers();

/// "a,b,c" -> {"a","b","c"}; empty text gives none.
std::vector<std::string> split_list(const std::string& text);

/// Refuses to overwrite: EnvironmentError if `path` exists and neither --force nor --dry-run is
/// given.
void require_absent(const std::filesystem::path& path, const GlobalOptions& options);

inline constexpr const char* kProgram = "kvplan " KVPLAN_VERSION;

}  // namespace kvplan::cli
