#include "cli/launcher.h"

#include <charconv>
#include <cstdlib>
#include <optional>
#include <string>

#include "schemas/error.h"

namespace kvplan::cli {
namespace {

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  if (!value || !*value) return std::nullopt;
  return value;
}

int number(const char* name, std::optional<int> otherwise = {}) {
  const auto text = variable(name);
  if (!text) {
    if (otherwise) return *otherwise;
    throw ArgumentError(std::string("WORLD_SIZE says that several processes run, but ") + name +
                        " is not set; start them with torchrun, or set RANK, WORLD_SIZE, "
                        "MASTER_ADDR and MASTER_PORT");
  }
  int value = 0;
  const char* end = text->data() + text->size();
  if (const auto [rest, error] = std::from_chars(text->data(), end, value);
      error != std::errc() || rest != end || value < 0)
    throw ArgumentError(std::string("the environment variable ") + name +
                        ": expected a number from 0, found '" + *text + "'");
  return value;
}

}  // namespace

void add_launcher_options(CLI::App& command, LauncherOptions& options) {
  command
      .add_option("--peer-timeout", options.timeout_seconds,
                  "Seconds that processes of one run (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, "
                  "as torchrun sets them) wait for each other")
      ->check(CLI::Range(1, 7 * 24 * 3600))
      ->capture_default_str();
}

std::unique_ptr<forward::Peers> connect_peers(const LauncherOptions& options) {
  const int size = number("WORLD_SIZE", 1);
  if (size <= 1) return nullptr;
  forward::PeerAddress address{.rank = number("RANK"), .size = size};
  address.host = variable("MASTER_ADDR").value_or(address.host);
  address.port = number("MASTER_PORT");
  address.store_running = variable("TORCHELASTIC_USE_AGENT_STORE").value_or("") == "True";
  address.attempt = variable("TORCHELASTIC_RESTART_COUNT").value_or(address.attempt);
  address.timeout = std::chrono::seconds(options.timeout_seconds);
  return std::make_unique<forward::Peers>(address);
}

std::unique_ptr<forward::GpuWarmUp> start_gpus(const std::vector<forward::Device>& devices,
                                               const GlobalOptions& global) {
  if (global.dry_run || variable("WORLD_SIZE")) return nullptr;
  return std::make_unique<forward::GpuWarmUp>(devices);
}

bool is_first(const forward::Peers* peers) { return !peers || peers->rank() == 0; }

std::vector<forward::Device> own_devices(std::vector<forward::Device> devices,
                                         const forward::Peers* peers) {
  if (peers && devices == std::vector{forward::Device::kCuda})
    devices.front().gpu = number("LOCAL_RANK", 0);
  return devices;
}

}  // namespace kvplan::cli
