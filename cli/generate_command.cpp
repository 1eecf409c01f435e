#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/commands.h"
#include "cli/runtimes.h"
#include "forward/device.h"
#include "generation/generate.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "tokenizers/special_tokens.h"
#include "tokenizers/text_stream.h"
#include "tokenizers/tokenizer.h"

namespace kvplan::cli {
namespace {

constexpr std::size_t kMaxPromptBytes = std::size_t{64} << 20;

struct GenerateFlags {
  std::filesystem::path model, plan, prompt_file;
  forward::WeightType weights = forward::WeightType::kFloat32;
  forward::Device device = forward::Device::kCpu;
  std::string prompt, runtime = "cpu";
  std::int64_t max_tokens = 128;
  bool allow_other_weights = false;
};

double per_second(std::int64_t count, double seconds) {
  return seconds > 0 ? static_cast<double>(count) / seconds : 0;
}

nlohmann::json to_json(const generation::Generation& g, const std::string& text,
                       std::int64_t prompt_tokens, const std::string& runtime,
                       const PlanBundle* plan) {
  return {{"format", "kvplan.generation"},
          {"version", 1},
          {"text", text},
          {"tokens", g.tokens},
          {"prompt_tokens", prompt_tokens},
          {"stopped", g.stopped},
          {"runtime", runtime},
          {"plan_sha256", plan ? nlohmann::json(plan->sha256) : nlohmann::json(nullptr)},
          {"cached_tokens", g.cached_tokens},
          {"cache_bytes", g.cache_bytes},
          {"fp16_bytes", g.fp16_bytes},
          {"effective_bits", g.effective_bits},
          {"prefill_seconds", g.prefill_seconds},
          {"decode_seconds", g.decode_seconds},
          {"prefill_tokens_per_second", per_second(prompt_tokens, g.prefill_seconds)},
          {"decode_tokens_per_second", per_second(g.decode_steps, g.decode_seconds)}};
}

std::string summary(const generation::Generation& g, std::int64_t prompt_tokens,
                    const std::string& runtime) {
  const auto ratio = static_cast<double>(g.fp16_bytes) / static_cast<double>(g.cache_bytes);
  return std::to_string(prompt_tokens) + " prompt tokens, " + std::to_string(g.tokens.size()) +
         " generated" + (g.stopped ? " (the model ended the text)" : "") + "\ncache of " +
         std::to_string(g.cached_tokens) + " tokens: " + std::to_string(g.cache_bytes) +
         " bytes, fp16 " + std::to_string(g.fp16_bytes) + " (" + fixed(ratio, 2) + "x), " +
         fixed(g.effective_bits, 2) + " effective bits\nprefill " +
         significant(per_second(prompt_tokens, g.prefill_seconds)) + " tokens/s, decode " +
         significant(per_second(g.decode_steps, g.decode_seconds)) + " tokens/s, runtime " +
         runtime;
}

int run(const GenerateFlags& flags, const GlobalOptions& global) {
  generation::GenerateOptions options;
  options.runtime =
      flags.runtime == "cuda" ? cuda_runtime() : forward::reference_runtime(flags.runtime);
  options.max_tokens = flags.max_tokens;
  options.threads = global.threads;
  options.weights = flags.weights;
  options.device = flags.device;
  std::optional<PlanBundle> plan;
  if (!flags.plan.empty()) plan = read_plan(flags.plan);
  const std::string text =
      flags.prompt_file.empty() ? flags.prompt : read_text_file(flags.prompt_file, kMaxPromptBytes);
  const auto model = models::open_model(flags.model);
  if (plan) {
    require_same_model(plan->plan.model, model->spec(), flags.plan.string(),
                       flags.allow_other_weights);
    options.plan = &*plan;
  }
  const auto tokenizer = tokenizers::open_tokenizer(flags.model);
  const auto special = tokenizers::read_special_tokens(flags.model, model->config().vocab_size);
  options.stop_tokens = special.end_of_text;
  std::vector<std::int32_t> prompt = tokenizer->encode(text, /*parse_special=*/true);
  if (!std::equal(special.before_text.begin(), special.before_text.end(), prompt.begin(),
                  prompt.begin() + std::min(std::ssize(special.before_text), std::ssize(prompt))))
    prompt.insert(prompt.begin(), special.before_text.begin(), special.before_text.end());
  if (prompt.empty())
    throw ArgumentError(
        "the prompt is empty; give at least one character with --prompt or in "
        "--prompt-file");
  const auto prompt_tokens = static_cast<std::int64_t>(prompt.size());
  const std::string runtime = plan ? flags.runtime : "fp16";
  if (global.dry_run) {
    std::cout << "would continue " << prompt_tokens << " prompt tokens by up to "
              << flags.max_tokens << ", runtime " << runtime << '\n';
    return 0;
  }

  tokenizers::TextStream stream(*tokenizer, prompt.back());
  std::string continuation;
  const auto show = [&](const std::string& piece) {
    continuation += piece;
    if (!global.json) std::cout << piece << std::flush;
  };
  ProgressPrinter printer(Verbosity::kQuiet);
  const generation::Generation generation = generation::generate(
      *model, prompt, options, [&](std::int32_t token) { show(stream.add(token)); },
      run_control(printer));
  show(stream.finish());
  if (global.json) {
    std::cout << to_json(generation, continuation, prompt_tokens, runtime, options.plan).dump(2);
  }
  std::cout << '\n' << std::flush;
  log(global.verbosity(), summary(generation, prompt_tokens, runtime));
  return 0;
}

}  // namespace

void add_generate(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "generate", "Continue a text, greedily, with the cache stored as a plan says");
  auto f = std::make_shared<GenerateFlags>();
  command->add_option("--model,-m", f->model, "GGUF file, or Hugging Face folder with config.json")
      ->required();
  command->add_option("--plan,-p", f->plan, "Plan folder; without it the cache is fp16");
  auto* prompt = command->add_option_group("Prompt (one)");
  prompt->add_option("--prompt", f->prompt,
                     "Text to continue; special tokens in it are recognised");
  prompt->add_option("--prompt-file", f->prompt_file, "File with the text to continue");
  prompt->require_option(1);
  command->add_option("--max-tokens", f->max_tokens, "Tokens to generate at most")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_option("--runtime", f->runtime,
                   "What holds a plan's pages and attends to them: cpu (the reference) or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  add_dtype_option(*command, f->weights);
  add_device_option(*command, f->device);
  command->add_flag("--allow-other-weights", f->allow_other_weights,
                    "Apply a plan of the same architecture with other k/v weights");
  add_global_options(*command, global);
  command->callback([f, &global, &action] { action = [f, &global] { return run(*f, global); }; });
}

}  // namespace kvplan::cli
