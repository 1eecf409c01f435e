// What is installed, what this machine has, what works on it and why the rest does not.

#include <sys/utsname.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <thread>

#include "cli/commands.h"
#include "forward/torch_build.h"
#ifdef KVPLAN_CUDA
#include "kernels/runtime.h"
#endif

namespace kvplan::cli {
namespace {

using nlohmann::json;

constexpr double kGib = 1024.0 * 1024 * 1024;
// The demo model's profile needs about this; below it the first steps fail.
constexpr double kLeastMemoryGib = 2;

/// Bytes of a line "Name:  123 kB" of /proc/meminfo.
std::optional<std::int64_t> meminfo(std::string_view name) {
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(name) || line[name.size()] != ':') continue;
    std::istringstream value(line.substr(name.size() + 1));
    std::int64_t kib = 0;
    if (value >> kib) return kib * 1024;
  }
  return std::nullopt;
}

/// The memory limit of this process's control group (version 2), if it has one.
std::optional<std::int64_t> group_limit() {
  std::ifstream in("/sys/fs/cgroup/memory.max");
  std::int64_t bytes = 0;
  if (in >> bytes) return bytes;
  return std::nullopt;
}

std::string processor_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "";
}

json optional_bytes(const std::optional<std::int64_t>& bytes) {
  return bytes ? json(*bytes) : json(nullptr);
}

/// One thing that kvplan can do, and what it lacks here.
struct Ability {
  const char* what;
  std::string lacks;  // empty: works
};

/// The GPU as the CUDA runtime sees it, or why it sees none.
struct Gpu {
  json info = nullptr;
  std::string lacks;
};

Gpu find_gpu() {
#ifdef KVPLAN_CUDA
  kvplan_device_info device;
  if (kvplan_query_device(0, &device) != KVPLAN_OK) return {nullptr, kvplan_last_error()};
  return {{{"name", device.name},
           {"compute_capability", device.compute_capability / 10.0},
           {"multiprocessors", device.multiprocessors},
           {"memory_bytes", device.memory_bytes},
           {"driver", device.driver_version}},
          ""};
#else
  return {nullptr, "this kvplan was built without CUDA; build it with -DKVPLAN_CUDA=ON (nvcc 13)"};
#endif
}

json machine_json() {
  utsname system{};
  uname(&system);
  std::error_code error;
  const auto here = std::filesystem::current_path(error);
  const auto space = std::filesystem::space(here, error);
  return {{"system", std::string(system.sysname) + " " + system.release + " " + system.machine},
          {"processor", processor_name()},
          {"threads", std::thread::hardware_concurrency()},
          {"memory_bytes", optional_bytes(meminfo("MemTotal"))},
          {"memory_available_bytes", optional_bytes(meminfo("MemAvailable"))},
          {"memory_limit_bytes", optional_bytes(group_limit())},
          {"folder", here.string()},
          {"folder_writable", access(here.c_str(), W_OK) == 0},
          {"folder_free_bytes", error ? json(nullptr) : json(space.available)}};
}

std::vector<Ability> abilities(const json& machine, const forward::TorchBuild& torch,
                               const Gpu& gpu) {
  std::string memory;
  if (machine["memory_available_bytes"].is_number() &&
      machine["memory_available_bytes"].get<double>() < kLeastMemoryGib * kGib)
    memory = "less than 2 GiB of memory are free; close other programs";
  const std::string write =
      machine["folder_writable"].get<bool>()
          ? ""
          : "this folder cannot be written; change to another, or give --out elsewhere";
  const std::string torch_cuda =
      torch.cuda ? ""
                 : "LibTorch finds no CUDA device: it was built without CUDA (the torch wheel for "
                   "CPUs), or there is no GPU or driver";
  return {{"inspect, plan, size, compare, report, export", write},
          {"profile, validate, generate, study on the CPU", memory.empty() ? write : memory},
          {"--device cuda: the model on a GPU", torch_cuda},
          {"--runtime cuda: the packed cache on a GPU", gpu.lacks}};
}

std::string gib(const json& bytes) {
  return bytes.is_null() ? "unknown" : significant(bytes.get<double>() / kGib, 3) + " GiB";
}

int run(const GlobalOptions& global) {
  const json machine = machine_json();
  const auto torch = forward::torch_build();
  const Gpu gpu = find_gpu();
  const auto all = abilities(machine, torch, gpu);
  const json versions = {
      {"kvplan", KVPLAN_VERSION},
      {"libtorch", torch.version},
      {"compiler", __VERSION__},
      {"formats", {{"kvplan.profile", 1}, {"kvplan.plan", 1}, {"kvplan.validation", 1}}}};
  if (global.json) {
    json works = json::array();
    for (const auto& [what, lacks] : all)
      works.push_back({{"what", what}, {"works", lacks.empty()}, {"lacks", lacks}});
    std::cout << json{{"versions", versions},
                      {"machine", machine},
                      {"libtorch_gpus", torch.gpus},
                      {"gpu", gpu.info},
                      {"abilities", works}}
                     .dump(1)
              << '\n';
    return 0;
  }
  std::cout << "kvplan " << KVPLAN_VERSION << ", LibTorch " << torch.version << ", compiled by "
            << __VERSION__ << '\n'
            << machine["system"].get<std::string>() << ", "
            << machine["processor"].get<std::string>() << ", " << machine["threads"]
            << " threads\nmemory " << gib(machine["memory_bytes"]) << ", free "
            << gib(machine["memory_available_bytes"]);
  if (!machine["memory_limit_bytes"].is_null())
    std::cout << ", limit of this control group " << gib(machine["memory_limit_bytes"]);
  std::cout << "\nfolder " << machine["folder"].get<std::string>() << ", free "
            << gib(machine["folder_free_bytes"]) << '\n';
  if (!gpu.info.is_null())
    std::cout << "GPU " << gpu.info["name"].get<std::string>() << ", compute capability "
              << gpu.info["compute_capability"] << ", " << gib(gpu.info["memory_bytes"]) << '\n';
  std::cout << '\n';
  for (const auto& [what, lacks] : all) {
    std::cout << (lacks.empty() ? coloured(Colour::kGreen, "works  ", STDOUT_FILENO)
                                : coloured(Colour::kYellow, "not    ", STDOUT_FILENO))
              << what << '\n';
    if (!lacks.empty()) std::cout << "       " << lacks << '\n';
  }
  return 0;
}

}  // namespace

void add_doctor(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command =
      app.add_subcommand("doctor", "Show versions and hardware, what works here and why not");
  add_global_options(*command, global);
  command->callback([&global, &action] { action = [&global] { return run(global); }; });
}

}  // namespace kvplan::cli
