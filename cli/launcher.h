#pragma once
// The processes of one command as torchrun and other launchers start them: RANK, WORLD_SIZE,
// MASTER_ADDR, MASTER_PORT and LOCAL_RANK in the environment.

#include <CLI/CLI.hpp>
#include <memory>
#include <vector>

#include "cli/options.h"
#include "forward/device.h"
#include "forward/gpu_warm_up.h"
#include "forward/peers.h"

namespace kvplan::cli {

struct LauncherOptions {
  int timeout_seconds = 1800;
};

/// --peer-timeout.
void add_launcher_options(CLI::App& command, LauncherOptions& options);

/// Waits for the other processes; null when this one is alone (no WORLD_SIZE, or 1). ArgumentError:
/// a variable is missing or no number (says which).
std::unique_ptr<forward::Peers> connect_peers(const LauncherOptions& options);

/// Lets the GPUs start while the command reads its input; nothing in a dry run, and nothing for a
/// process of several, which has yet to learn its own.
std::unique_ptr<forward::GpuWarmUp> start_gpus(const std::vector<forward::Device>& devices,
                                               const GlobalOptions& global);

/// Whether this process prints results and writes files.
bool is_first(const forward::Peers* peers);

/// With peers "cuda" means the GPU of LOCAL_RANK.
std::vector<forward::Device> own_devices(std::vector<forward::Device> devices,
                                         const forward::Peers* peers);

}  // namespace kvplan::cli
