#include "cli/options.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <string_view>

#include "schemas/error.h"

namespace kvplan::cli {
namespace {

volatile std::sig_atomic_t received_signal = 0;

void on_signal(int signal) {
  received_signal = signal;
  std::signal(signal, SIG_DFL);
}

/// A mapped file that could not be read: an error of the disk, or the file became shorter. No
/// exception may leave a signal handler.
[[noreturn]] void on_read_error(int) {
  constexpr std::string_view kMessage =
      "kvplan: a file could not be read: the disk failed, or the file became shorter while in "
      "use; state saved before is kept\n";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kMessage.data(), kMessage.size());
  ::_exit(7);
}

/// "A:B" with 0 <= A < B <= 1.
std::pair<double, double> parse_part(const std::string& part) {
  std::istringstream in(part);
  double begin = -1, end = -1;
  char colon = 0;
  if (!(in >> begin >> colon >> end) || colon != ':' || !in.eof() || begin < 0 || end > 1 ||
      begin >= end) {
    throw ArgumentError(
        "--part: expected A:B, token fractions with 0 <= A < B <= 1 such as 0:0.5; found '" + part +
        "'");
  }
  return {begin, end};
}

/// "cpu", "cuda" (the first GPU) or "cuda:N".
forward::Device parse_device(const std::string& text) {
  if (text == "cpu") return forward::Device::kCpu;
  if (text == "cuda") return forward::Device::kCuda;
  int gpu = -1;
  char end = 0;
  if (std::sscanf(text.c_str(), "cuda:%d%c", &gpu, &end) != 1 || gpu < 0)
    throw CLI::ValidationError("--device", "expected cpu, cuda or cuda:N, found '" + text + "'");
  return {gpu};
}

}  // namespace

void add_global_options(CLI::App& command, GlobalOptions& o) {
  command.add_flag("--json", o.json, "Print one JSON document on stdout instead of text")
      ->group("Everywhere");
  command.add_flag("--quiet,-q", o.quiet, "No progress and no notes on stderr")
      ->group("Everywhere");
  command.add_flag("--verbose,-v", o.verbose, "More notes on stderr")
      ->excludes("--quiet")
      ->group("Everywhere");
  command.add_flag("--force", o.force, "Overwrite an existing output")->group("Everywhere");
  command
      .add_flag("--dry-run", o.dry_run, "Check every input, say what would be done, write nothing")
      ->group("Everywhere");
  command.add_option("--threads", o.threads, "CPU threads; 0: all cores. Never changes a plan")
      ->check(CLI::Range(0, 4096))
      ->group("Everywhere");
  command.add_option("--seed", o.seed, "Seed of every random draw of this command")
      ->group("Everywhere");
}

CLI::Validator positive_number() {
  return {[](std::string& text) {
            const char* const begin = text.c_str();
            char* end = nullptr;
            const double x = std::strtod(begin, &end);
            const bool good = end != begin && *end == 0 && std::isfinite(x) && x > 0;
            return good ? std::string() : "expected a number above 0, found '" + text + "'";
          },
          "POSITIVE"};
}

void add_dtype_option(CLI::App& command, forward::WeightType& weights) {
  std::map<std::string, forward::WeightType> types;
  for (const auto type : {forward::WeightType::kFloat32, forward::WeightType::kBFloat16,
                          forward::WeightType::kFloat16}) {
    types[forward::weight_type_name(type)] = type;
  }
  command
      .add_option_function<std::string>(
          "--dtype", [&weights, types](const std::string& name) { weights = types.at(name); },
          "Layer matrices in memory: fp32, bf16 or fp16; arithmetic is fp32")
      ->check(CLI::IsMember({"fp32", "bf16", "fp16"}))
      ->default_str("fp32");
}

void add_device_option(CLI::App& command, forward::Device& device) {
  command
      .add_option_function<std::string>(
          "--device", [&device](const std::string& text) { device = parse_device(text); },
          "Where LibTorch holds the weights and does its part: cpu, cuda or cuda:N")
      ->default_str("cpu");
}

void add_devices_option(CLI::App& command, std::vector<forward::Device>& devices) {
  command
      .add_option_function<std::string>(
          "--device",
          [&devices](const std::string& text) {
            devices.clear();
            for (const std::string& name : split_list(text)) {
              devices.push_back(parse_device(name));
              const bool mixed =
                  devices.size() > 1 && (devices.front().is_cpu() || devices.back().is_cpu());
              if (mixed || std::ranges::count(devices, devices.back()) > 1)
                throw CLI::ValidationError("--device", "names " + name + " beside other devices");
            }
          },
          "Where the model runs: cpu, cuda, or several GPUs that share the windows, such as "
          "cuda:0,cuda:1")
      ->default_str("cpu");
}

void add_memory_option(CLI::App& command, std::int64_t& bytes) {
  command
      .add_option_function<std::uint64_t>(
          "--memory",
          [&bytes](const std::uint64_t& size) {
            bytes = static_cast<std::int64_t>(std::min(size, std::uint64_t{1} << 60));
          },
          "Memory to stay below, such as 2GiB: that of the process, or with --device cuda of each "
          "GPU. Layers that do not fit are read from the model's file as they are used")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/false))
      ->check(positive_number());
}

void add_model_text_options(CLI::App& command, ModelTextOptions& o, bool required) {
  command.add_option("--model,-m", o.model, "GGUF file, or Hugging Face folder with config.json")
      ->required(required);
  command
      .add_option("--text,-t", o.text,
                  "Text files: UTF-8, or .jsonl with a \"text\" field; several files take turns")
      ->required(required);
  command.add_option("--part", o.part, "Token fractions A:B of every text file")
      ->capture_default_str();
  command.add_option("--window", o.window, "Tokens per window")
      ->check(CLI::Range(16, 1 << 20))
      ->capture_default_str();
  add_dtype_option(command, o.weights);
}

std::vector<ProfileSource> ModelText::source_infos() const {
  std::vector<ProfileSource> infos;
  for (const auto& source : sources) infos.push_back(source.info);
  return infos;
}

ModelText open_model_text(const ModelTextOptions& o, std::int64_t max_windows) {
  ModelText out;
  std::tie(out.part_begin, out.part_end) = parse_part(o.part);
  if (!std::filesystem::exists(o.model))
    throw InputError(
        o.model.string(), "",
        "no such file or folder; --model takes a GGUF file or a Hugging Face folder on "
        "this machine (kvplan downloads nothing)");
  out.model = models::open_model(o.model);
  const auto tokenizer = tokenizers::open_tokenizer(o.model);
  const auto vocabulary = out.model->config().vocab_size;
  for (const auto& file : o.text) {
    out.sources.push_back(tokenizers::load_text(file, *tokenizer, out.part_begin, out.part_end));
    for (const auto id : out.sources.back().tokens) {
      if (id < 0 || id >= vocabulary) {
        throw InputError(o.model.string(), "tokenizer",
                         "token id " + std::to_string(id) + " in " + file.string() +
                             " is outside the model's vocabulary of " + std::to_string(vocabulary) +
                             "; this tokenizer belongs to another model");
      }
    }
  }
  out.windows = tokenizers::make_windows(out.sources, o.window, max_windows);
  return out;
}

RunControl run_control(ProgressPrinter& printer) {
  return {[&printer](const Progress& p) { printer(p); },
          [] { return static_cast<int>(received_signal); }};
}

void install_signal_handlers() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGBUS, on_read_error);
}

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream in(text);
  for (std::string item; std::getline(in, item, ',');) {
    if (!item.empty()) out.push_back(item);
  }
  return out;
}

void require_absent(const std::filesystem::path& path, const GlobalOptions& o) {
  if (!o.force && std::filesystem::exists(path)) {
    throw EnvironmentError(path.string(),
                           "exists already; give another --out, or --force to overwrite it");
  }
}

}  // namespace kvplan::cli
