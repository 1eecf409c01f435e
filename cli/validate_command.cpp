#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/commands.h"
#include "cli/describe.h"
#include "cli/dry_run.h"
#include "cli/launcher.h"
#include "cli/runtimes.h"
#include "cli/stack_plans.h"
#include "evaluation/evaluator.h"
#include "evaluation/gates.h"
#include "evaluation/passkey.h"
#include "evaluation/prompts.h"
#include "evaluation/text_results.h"
#include "quant/baselines.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

struct ValidateFlags {
  ModelTextOptions input;
  std::vector<std::filesystem::path> plans;
  std::vector<std::string> stacks;
  std::string baselines = "nearest", modes = "worst", runtimes = evaluation::kSimulation, gate;
  LauncherOptions launcher;
  std::int64_t windows = 24;
  std::filesystem::path out;
  bool passkey = false;
  evaluation::PasskeyOptions passkey_options;
  std::filesystem::path prompts;
  evaluation::PromptOptions prompt_options;
  bool allow_other_weights = false, allow_calibration_text = false, markdown = false;
};

/// Held-out means held out: refuses text that overlaps what the plan was calibrated on.
void require_held_out(const PlanBundle& bundle, const ModelText& input,
                      const std::filesystem::path& plan) {
  for (const auto& seen : bundle.plan.provenance.sources) {
    for (const auto& source : input.sources) {
      if (seen.sha256 == source.info.sha256 && seen.part_begin < source.info.part_end &&
          source.info.part_begin < seen.part_end) {
        throw InputError(
            plan.string(), "/provenance/sources",
            "was calibrated on " + seen.name + " [" + significant(seen.part_begin) + ":" +
                significant(seen.part_end) +
                "], which overlaps the text to validate on; choose another --part (such as " +
                significant(seen.part_end) +
                ":1) or text, or --allow-calibration-text to measure in sample");
      }
    }
  }
}

/// What the plans run through in mode decode.
std::vector<forward::CacheRuntime> parse_runtimes(const ValidateFlags& flags) {
  std::vector<forward::CacheRuntime> runtimes;
  for (const std::string& name : split_list(flags.runtimes)) {
    for (const auto& other : runtimes)
      if (other.name == name) throw ArgumentError("--runtime: " + name + " is named twice");
    if (name == evaluation::kSimulation) {
      runtimes.push_back({name, nullptr});
    } else if (name == "reference") {
      runtimes.push_back(forward::reference_runtime(name));
    } else if (name == "cuda") {
      runtimes.push_back(cuda_runtime());
    } else {
      throw ArgumentError(
          "--runtime: expected cpu, reference or cuda, separated by commas; found '" + name + "'");
    }
  }
  if (runtimes.empty()) throw ArgumentError("--runtime: expected cpu, reference or cuda");
  const auto modes = split_list(flags.modes);
  if (flags.runtimes != evaluation::kSimulation &&
      std::ranges::find(modes, "decode") == modes.end())
    throw ArgumentError("--runtime " + flags.runtimes +
                        " keeps full pages packed, which is mode decode: add --mode decode");
  return runtimes;
}

/// Everything that the checks beside perplexity need, made before any weight is read.
struct TaskInputs {
  std::vector<evaluation::PasskeyTask> passkey;
  std::optional<evaluation::PromptSet> prompts;

  TaskInputs(const ValidateFlags& flags, const ModelText& input, std::uint64_t seed) {
    if (!flags.passkey && flags.prompts.empty()) return;
    const auto tokenizer = tokenizers::open_tokenizer(flags.input.model);
    const auto& model = input.model->config();
    if (flags.passkey) {
      auto options = flags.passkey_options;
      options.seed = seed;
      passkey = evaluation::make_passkey_tasks(model, *tokenizer, input.sources, options);
    }
    if (!flags.prompts.empty())
      prompts = evaluation::load_prompts(flags.prompts, *tokenizer, model, flags.prompt_options);
  }
};

void add_passkey_options(CLI::App& command, ValidateFlags& f) {
  constexpr const char* kGroup = "Task checks";
  auto* passkey = command.add_flag(
      "--passkey", f.passkey,
      "Hide a key in the text and ask for it: log-probability and exact match against fp16");
  passkey->group(kGroup);
  command
      .add_option("--passkey-contexts", f.passkey_options.contexts,
                  "Tokens of the whole text with its question, separated by commas; default: 512, "
                  "1024 and 2048 as far as the model's context goes")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20))
      ->needs(passkey)
      ->group(kGroup);
  command
      .add_option("--passkey-depths", f.passkey_options.depths,
                  "Where the key lies: 0 at the begin, 1 at the end")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->needs(passkey)
      ->group(kGroup);
  command
      .add_option("--passkey-trials", f.passkey_options.trials,
                  "Keys and haystacks for each context and depth")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str()
      ->needs(passkey)
      ->group(kGroup);
}

void add_prompt_options(CLI::App& command, ValidateFlags& f) {
  constexpr const char* kGroup = "Task checks";
  auto* prompts = command.add_option(
      "--prompts", f.prompts,
      "Compare continuations with the greedy ones of fp16: .jsonl with \"prompt\" and perhaps "
      "\"answer\" and \"category\", or text with a blank line between prompts");
  prompts->group(kGroup);
  command.add_option("--max-tokens", f.prompt_options.max_tokens, "Tokens of a continuation")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str()
      ->needs(prompts)
      ->group(kGroup);
  command
      .add_option("--stop", f.prompt_options.stop,
                  "Text of the token that ends a continuation, such as '<|im_end|>'")
      ->needs(prompts)
      ->group(kGroup);
}

int run(const ValidateFlags& flags, const GlobalOptions& global) {
  const auto gates = evaluation::parse_gates(flags.gate);
  const auto runtimes = parse_runtimes(flags);
  const auto out = flags.out.empty() ? flags.plans.front() / "validation.json" : flags.out;
  require_absent(out, global);
  std::vector<PlanBundle> bundles;
  for (const auto& path : flags.plans) bundles.push_back(read_plan(path));
  const auto warm_up = start_gpus(flags.input.devices, global);
  const auto input = open_model_text(flags.input, flags.windows);
  std::vector<evaluation::Candidate> candidates;
  for (std::size_t i = 0; i < bundles.size(); ++i) {
    require_same_model(bundles[i].plan.model, input.model->spec(), flags.plans[i].string(),
                       flags.allow_other_weights);
    if (!flags.allow_calibration_text) require_held_out(bundles[i], input, flags.plans[i]);
    candidates.push_back({i == 0 ? "plan" : flags.plans[i].filename().string(), nullptr, runtimes});
  }
  const Plan plan = bundles.front().plan;
  const auto names = flags.baselines == "nearest"
                         ? quant::nearest_baselines(plan.effective_bits, plan.model)
                         : split_list(flags.baselines == "none" ? "" : flags.baselines);
  for (const auto& name : names) {
    bundles.push_back(quant::baseline_plan(name, input.model->spec(), plan.sink_tokens,
                                           plan.context, global.seed,
                                           models::rotary_frequencies(input.model->config())));
    candidates.push_back({name, nullptr});
  }
  for (const auto& stack : flags.stacks) {
    bundles.push_back(plan_on_stack(bundles.front(), stack));
    candidates.push_back({stack, nullptr});
  }
  for (std::size_t i = 0; i < bundles.size(); ++i) candidates[i].bundle = &bundles[i];
  const TaskInputs tasks(flags, input, global.seed);
  evaluation::EvaluateOptions options;
  options.window = flags.input.window;
  options.modes = split_list(flags.modes);
  options.threads = global.threads;
  options.weights = flags.input.weights;
  if (global.dry_run) {
    options.devices = own_devices(flags.input.devices, nullptr);
    const std::size_t prompts = tasks.prompts ? tasks.prompts->prompts.size() : 0;
    std::string what = "would evaluate " + std::to_string(candidates.size() + 1) +
                       " candidates on " + std::to_string(input.windows.size()) + " windows of " +
                       std::to_string(flags.input.window) + " tokens and write " + out.string();
    if (!tasks.passkey.empty() || prompts > 0)
      what += ", and check " + std::to_string(tasks.passkey.size()) + " passkeys and " +
              std::to_string(prompts) + " prompts, which are not in the estimate";
    print_dry_run(
        what,
        {{"command", "validate"},
         {"candidates", candidates.size() + 1},
         {"windows", input.windows.size()},
         {"window", flags.input.window},
         {"passkeys", tasks.passkey.size()},
         {"prompts", prompts},
         {"out", out.string()}},
        [&] {
          return estimates::estimate_evaluation(*input.model, input.windows, candidates, options);
        },
        global);
    return 0;
  }
  const auto peers = connect_peers(flags.launcher);
  options.peers = peers.get();
  options.devices = own_devices(flags.input.devices, peers.get());
  options.memory_bytes = flags.input.memory_bytes;
  options.spill_folder = out.has_parent_path() ? out.parent_path() : ".";
  options.bootstrap_seed = global.seed;
  options.plan_name = "plan";
  options.partial_file = out.string() + ".partial";
  ProgressPrinter printer(is_first(peers.get()) ? global.verbosity() : Verbosity::kQuiet);
  Validation validation =
      evaluation::evaluate(*input.model, input.windows, candidates, options, run_control(printer));
  validation.plan_sha256 = bundles.front().sha256;
  validation.model_sha256 = input.model->spec().kv_weights_sha256;
  validation.part_begin = input.part_begin;
  validation.part_end = input.part_end;
  validation.runtime = flags.runtimes;
  validation.program = kProgram;
  validation.seed = global.seed;
  for (const auto& source : input.sources) {
    validation.text_names.push_back(source.info.name);
    validation.text_sha256.push_back(source.info.sha256);
  }
  if (input.sources.size() > 1) {
    // The partial file holds all scores by now, so nothing runs again.
    const auto scores =
        evaluation::score_tokens(*input.model, input.windows, candidates, options, RunControl{});
    validation.by_text = evaluation::results_by_text(scores, input.windows, validation.text_names,
                                                     candidates, options);
  }
  if (!is_first(peers.get())) {
    std::filesystem::remove(evaluation::own_partial_file(options));
    return 0;
  }
  if (!tasks.passkey.empty())
    validation.passkey = evaluation::check_passkey(*input.model, tasks.passkey, candidates, options,
                                                   run_control(printer));
  if (tasks.prompts) {
    validation.prompt_source = tasks.prompts->source;
    validation.prompts = evaluation::check_prompts(*input.model, *tasks.prompts, candidates,
                                                   options, run_control(printer));
  }
  validation.gates = evaluation::apply_gates(gates, validation, "plan");
  write_validation(validation, out);
  std::filesystem::remove(evaluation::own_partial_file(options));
  std::cout << (global.json ? validation_json(validation) : describe(validation, flags.markdown));
  for (const auto& gate : validation.gates) {
    if (!gate.passed) return 6;
  }
  return 0;
}

}  // namespace

void add_validate(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "validate", "Perplexity and KL of a plan and baselines on text that calibration never saw");
  auto f = std::make_shared<ValidateFlags>();
  add_model_text_options(*command, f->input);
  command
      ->add_option(
          "--plan,-p", f->plans,
          "Plan folders; the first is the plan under test, the others are compared with it")
      ->required();
  command
      ->add_option("--baselines", f->baselines,
                   "nearest (q8_0, q4_0, TurboQuant and KIVI at the nearest bits), none, or a list "
                   "such as q4_0,turboquant:3,kivi:2")
      ->capture_default_str();
  command->add_option(
      "--as", f->stacks,
      "Also what a serving stack would do with the export of the plan: vllm, vllm:DTYPE, "
      "llamacpp, llamacpp:DIALECT, kvtuner, hf, lmdeploy, modelopt, sglang, kv-scales, or "
      "llamacpp:K,V with two types; may be repeated");
  command
      ->add_option("--windows", f->windows,
                   "Windows to evaluate, from the beginning of the part; 0: all")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  command
      ->add_option(
          "--mode", f->modes,
          "worst (every vector quantised as produced), decode (last open page fp16), or both")
      ->check([](const std::string& text) {
        const auto modes = split_list(text);
        const bool good = !modes.empty() && std::ranges::all_of(modes, [](const auto& mode) {
          return mode == "worst" || mode == "decode";
        });
        return good ? std::string()
                    : "expected worst, decode or worst,decode, found '" + text + "'";
      })
      ->capture_default_str();
  command
      ->add_option(
          "--runtime", f->runtimes,
          "What the plans run through in mode decode: cpu (round trips through the codecs), "
          "reference (packed pages on the CPU), cuda (the GPU), or several with commas")
      ->capture_default_str();
  add_devices_option(*command, f->input.devices);
  add_memory_option(*command, f->input.memory_bytes);
  add_launcher_options(*command, f->launcher);
  command->add_option("--gate", f->gate,
                      "Fail with exit code 6 unless, for example, 'kl<=.05,ppl_rise<=.03'");
  add_passkey_options(*command, *f);
  add_prompt_options(*command, *f);
  command->add_flag("--markdown", f->markdown, "Print the table as Markdown");
  command->add_flag("--allow-other-weights", f->allow_other_weights,
                    "Apply a plan of the same architecture with other k/v weights");
  command->add_flag("--allow-calibration-text", f->allow_calibration_text,
                    "Measure on text that the plan was calibrated on");
  command->add_option("--out,-o", f->out,
                      "Where validation.json goes (default: in the plan's folder)");
  add_global_options(*command, global);
  command->callback([f, &global, &action] { action = [f, &global] { return run(*f, global); }; });
}

}  // namespace kvplan::cli
