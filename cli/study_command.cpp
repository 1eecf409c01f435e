#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/dry_run.h"
#include "cli/report/report.h"
#include "evaluation/evaluator.h"
#include "quant/baselines.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "studies/document.h"
#include "studies/model_lab.h"
#include "studies/scored_caches.h"
#include "studies/study.h"

namespace kvplan::cli {
namespace {

namespace fs = std::filesystem;

struct StudyFlags {
  std::vector<std::string> ids;
  ModelTextOptions input;
  std::string calibration_part = "0:0.5";
  std::int64_t windows = 24, tokens = 16384;
  fs::path out;
  bool list = false, all = false, markdown = false, strict = false;
};

std::vector<const studies::Study*> chosen_studies(const StudyFlags& flags) {
  std::vector<const studies::Study*> chosen;
  if (flags.all) {
    for (const auto& study : studies::all_studies()) chosen.push_back(&study);
    return chosen;
  }
  for (const auto& id : flags.ids) {
    const auto found = std::ranges::find_if(studies::all_studies(),
                                            [&](const auto& study) { return study.info.id == id; });
    if (found == studies::all_studies().end())
      throw ArgumentError("study: there is no study '" + id + "'; --list shows all");
    chosen.push_back(&*found);
  }
  if (chosen.empty())
    throw ArgumentError("study: name studies such as A7 B3, or give --all or --list");
  return chosen;
}

int list() {
  TextTable table({"id", "study", "model", "expected"});
  for (const auto& study : studies::all_studies()) {
    const auto& info = study.info;
    table.add_row({info.id, info.title,
                   info.needs_model  ? "needed"
                   : info.uses_model ? "used if given"
                                     : "no",
                   studies::verdict_letter(info.expected)});
  }
  std::cout << table.text();
  return 0;
}

/// Model, texts and windows of the studies that measure on a model.
struct LabInput {
  ModelText calibration, held_out;
};

LabInput open_lab_input(const StudyFlags& flags) {
  if (flags.input.text.empty()) throw ArgumentError("study: --model needs --text as well");
  ModelTextOptions calibration = flags.input;
  calibration.part = flags.calibration_part;
  LabInput input{
      open_model_text(calibration, std::max<std::int64_t>(1, flags.tokens / flags.input.window)),
      open_model_text(flags.input, flags.windows)};
  if (input.calibration.part_begin < input.held_out.part_end &&
      input.held_out.part_begin < input.calibration.part_end)
    throw ArgumentError("study: --calibration-part " + flags.calibration_part + " and --part " +
                        flags.input.part + " overlap; held-out text must not be calibrated on");
  return input;
}

std::string described(const ModelText& input, const ModelTextOptions& options) {
  std::string text;
  for (const auto& source : input.sources) text += (text.empty() ? "" : ", ") + source.info.name;
  return text + ", part " + options.part + ", " + std::to_string(input.windows.size()) +
         " windows of " + std::to_string(options.window) + " tokens";
}

void print_table(const std::vector<studies::Outcome>& outcomes) {
  TextTable table(
      {"id", "study", "verdict", "expected", "claim", "explanation", "reference", "seconds"});
  int count[4] = {};
  for (const auto& outcome : outcomes) {
    const auto share = [&](studies::Role role) {
      int passed = 0, all = 0;
      for (const auto& check : outcome.result.checks()) {
        if (check.role != role) continue;
        ++all;
        passed += check.passed() ? 1 : 0;
      }
      return all == 0 ? std::string("-") : std::to_string(passed) + "/" + std::to_string(all);
    };
    ++count[static_cast<int>(outcome.verdict)];
    table.add_row({outcome.study->info.id, outcome.study->info.title,
                   studies::verdict_letter(outcome.verdict),
                   studies::verdict_letter(outcome.study->info.expected),
                   share(studies::Role::kClaim), share(studies::Role::kExplanation),
                   share(studies::Role::kReference), fixed(outcome.seconds, 1)});
  }
  std::cout << table.text() << '\n'
            << count[0] << " confirmed, " << count[1] << " explained, " << count[2] << " refuted, "
            << count[3] << " not run. Columns claim, explanation and reference: checks passed.\n";
  for (const auto& outcome : outcomes) {
    for (const auto& check : outcome.result.checks()) {
      if (check.role == studies::Role::kReference && !check.passed())
        std::cout << "finding: " << outcome.study->info.id << ", " << check.name << ": measured "
                  << significant(check.measured, 4) << ", expected " << significant(check.low, 4)
                  << " to " << significant(check.high, 4) << '\n';
    }
  }
}

/// A verdict other than the expected one, or a reference figure that was missed.
bool surprising(const studies::Outcome& outcome) {
  return outcome.verdict != studies::Verdict::kNotRun &&
         (outcome.verdict != outcome.study->info.expected ||
          outcome.result.missed_references() > 0);
}

/// A profile and the scores of as many caches as the studies ask for; one published codec stands
/// for all.
estimates::WorkEstimate estimate_lab(const StudyFlags& flags, const LabInput& input, int caches,
                                     const GlobalOptions& global) {
  const models::ModelReader& model = *input.held_out.model;
  estimates::WorkEstimate sum;
  const auto add = [&](const estimates::WorkEstimate& work) {
    sum.seconds += work.seconds;
    sum.cpu_seconds += work.cpu_seconds;
    sum.memory_bytes = std::max(sum.memory_bytes, work.memory_bytes);
  };
  if (!fs::exists(flags.out / "profile" / "profile.json")) {
    calib::ProfileOptions options;
    options.window = flags.input.window;
    options.threads = global.threads;
    options.weights = flags.input.weights;
    add(estimates::estimate_profile(model, input.calibration.windows,
                                    input.calibration.source_infos(), options));
  }
  const PlanBundle codec =
      quant::baseline_plan("turboquant:3", model.spec(), 4, flags.input.window, global.seed,
                           models::rotary_frequencies(model.config()));
  std::vector<evaluation::Candidate> candidates;
  for (int i = 0; i < caches; ++i) candidates.push_back({"cache " + std::to_string(i), &codec});
  evaluation::EvaluateOptions options;
  options.window = flags.input.window;
  options.threads = global.threads;
  options.weights = flags.input.weights;
  add(estimates::estimate_evaluation(model, input.held_out.windows, candidates, options));
  return sum;
}

void dry_run(const StudyFlags& flags, const std::vector<const studies::Study*>& chosen,
             const LabInput* input, const GlobalOptions& global) {
  int caches = 0;
  nlohmann::json others = nlohmann::json::array();
  std::string names;
  for (const auto* study : chosen) {
    const auto count = studies::scored_caches(study->info.id);
    if (count) {
      caches += *count;
    } else {
      others.push_back(study->info.id);
      names += " " + study->info.id;
    }
  }
  const std::string what = "would run " + std::to_string(chosen.size()) + " studies" +
                           (input ? " on " + described(input->held_out, flags.input) : "");
  const nlohmann::json facts = {
      {"command", "study"}, {"studies", chosen.size()}, {"not_estimated", others}};
  if (input && caches > 0) {
    print_dry_run(
        what + (names.empty() ? "" : ", of which there is no estimate for" + names), facts,
        [&] { return estimate_lab(flags, *input, caches, global); }, global);
  } else if (global.json) {
    std::cout << facts.dump(1) << '\n';
  } else {
    std::cout << what << "; there is no estimate for them\n";
  }
}

int run(const StudyFlags& flags, const GlobalOptions& global) {
  if (flags.list) return list();
  const auto chosen = chosen_studies(flags);
  if (!flags.out.empty()) require_absent(flags.out / "study.json", global);
  std::optional<LabInput> input;
  if (!flags.input.model.empty()) {
    if (flags.out.empty())
      throw ArgumentError("study: --model needs --out, where profile and scores are kept");
    input = open_lab_input(flags);
  }
  if (global.dry_run) {
    dry_run(flags, chosen, input ? &*input : nullptr, global);
    return 0;
  }
  ProgressPrinter printer(global.verbosity());
  const auto control = run_control(printer);
  studies::StudyRun about{kProgram, global.seed, "", ""};
  std::unique_ptr<tokenizers::Tokenizer> tokenizer;
  std::optional<studies::ModelLab> lab;
  studies::StudyContext context;
  context.seed = global.seed;
  if (input) {
    const auto& spec = input->held_out.model->spec();
    about.model = flags.input.model.filename().string() + ": " + spec.architecture + ", " +
                  std::to_string(spec.num_layers) + " layers, " + std::to_string(spec.kv_heads) +
                  " KV heads of " + std::to_string(spec.head_dim);
    about.text = described(input->held_out, flags.input);
    tokenizer = tokenizers::open_tokenizer(flags.input.model);
    lab.emplace(*input->held_out.model, input->calibration.windows,
                input->calibration.source_infos(), input->held_out.windows,
                studies::ModelLab::Options{.window = flags.input.window,
                                           .calibration_tokens = flags.tokens,
                                           .threads = global.threads,
                                           .seed = global.seed,
                                           .folder = flags.out,
                                           .weights = flags.input.weights,
                                           .tokenizer = tokenizer.get()},
                control);
    context.lab = &*lab;
  }
  const auto outcomes = studies::run_studies(chosen, context, global.threads, control);
  const std::string document = studies::study_json(outcomes, about);
  if (!flags.out.empty()) {
    fs::create_directories(flags.out);
    write_file_atomically(flags.out / "study.html", study_html(document));
    write_file_atomically(flags.out / "study.json", document);
  }
  if (global.json) {
    std::cout << document;
  } else if (flags.markdown) {
    std::cout << studies::study_markdown(outcomes, about);
  } else {
    print_table(outcomes);
  }
  return flags.strict && std::ranges::any_of(outcomes, surprising) ? 6 : 0;
}

}  // namespace

void add_study(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "study", "Run published claims about KV-cache quantisation as experiments");
  auto f = std::make_shared<StudyFlags>();
  command->add_option("id", f->ids, "Studies, such as T1 A7 F2");
  command->add_flag("--list", f->list, "Show all studies");
  command->add_flag("--all", f->all, "Run every study");
  f->input.part = "0.5:1";
  add_model_text_options(*command, f->input, false);
  command
      ->add_option("--calibration-part", f->calibration_part,
                   "Token fractions A:B that the profile is made on")
      ->capture_default_str();
  command->add_option("--tokens", f->tokens, "Calibration tokens")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  command->add_option("--windows", f->windows, "Held-out windows to score; 0: all")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  command->add_option("--out,-o", f->out,
                      "Folder of study.json and study.html; with --model also profile and scores");
  command->add_flag("--markdown", f->markdown, "Print the whole page as Markdown");
  command->add_flag(
      "--strict", f->strict,
      "Exit code 6 when a verdict or a reference figure differs from the expected one");
  add_global_options(*command, global);
  command->callback([f, &global, &action] { action = [f, &global] { return run(*f, global); }; });
}

}  // namespace kvplan::cli
