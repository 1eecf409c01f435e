#include <iostream>

#include "cli/commands.h"
#include "exporters/export.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

struct ExportFlags {
  std::string target;
  std::filesystem::path plan, out;
  bool strict = false;
  exporters::ExportOptions options;
  std::string command;  // for the manifest
};

constexpr const char* kReportFile = "loss-report.json";
constexpr const char* kManifestFile = "manifest.json";

int run(const ExportFlags& flags, const GlobalOptions& global) {
  require_absent(flags.out, global);
  const PlanBundle bundle = read_plan(flags.plan);
  exporters::ExportOptions options = flags.options;
  options.file = flags.plan.string();
  const auto result = exporters::export_plan(flags.target, bundle, options);
  const exporters::LossReport& report = result.projection.report;
  const std::string json = loss_report_json(report);
  std::cout << (global.json ? json : loss_report_text(report));
  if (flags.strict && !report.lossless()) return 6;
  if (global.dry_run) return 0;
  make_folder(flags.out);
  for (const auto& file : result.files) write_file_atomically(flags.out / file.name, file.bytes);
  write_file_atomically(flags.out / kReportFile, json);
  write_file_atomically(flags.out / kManifestFile,
                        manifest_json(result, bundle, kProgram, flags.command));
  return 0;
}

}  // namespace

void add_export(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "export", "Write a plan as the files that a serving stack loads, and what that loses");
  auto f = std::make_shared<ExportFlags>();
  command
      ->add_option("target", f->target,
                   "vllm, sglang, kv-scales, modelopt, llamacpp, kvtuner, hf or lmdeploy")
      ->required()
      ->check(CLI::IsMember(std::vector<std::string>(std::begin(exporters::kTargets),
                                                     std::end(exporters::kTargets))));
  command->add_option("--plan,-p", f->plan, "Plan folder or its plan.json")->required();
  command->add_option("--out,-o", f->out, "Folder of the files")->required();
  command->add_option("--target-version", f->options.target_version,
                      "Version of the stack, where it is another than the one known to work");
  command->add_flag("--strict", f->strict, "Write nothing and exit with 6 if anything is lost");
  command->add_flag("--allow-lower", f->options.allow_lower,
                    "Take widths below the plan's, within its bytes");
  command->add_option("--model,-m", f->options.model,
                      "kv-scales, sglang, modelopt: the original Hugging Face folder");
  command->add_flag("--per-head", f->options.per_head,
                    "kv-scales: a scale per KV head; kvtuner: widths per KV head");
  command->add_option("--tp", f->options.tensor_parallel, "sglang: ranks of tensor parallelism")
      ->check(CLI::Range(1, 1024));
  command
      ->add_option("--dtypes", f->options.stack.dtypes,
                   "vllm: dtypes to choose from (default: all but nvfp4)")
      ->delimiter(',');
  command
      ->add_option("--dialect", f->options.stack.dialect, "llamacpp: mainline, ik, thetom or buun")
      ->check(CLI::IsMember({"mainline", "ik", "thetom", "buun"}))
      ->capture_default_str();
  command->add_option("--mean-centre", f->options.mean_centre,
                      "llamacpp: also write the means of keys as this GGUF file");
  command->add_option("--backend", f->options.stack.backend, "kvtuner: vanilla or hqq")
      ->check(CLI::IsMember({"vanilla", "hqq"}))
      ->capture_default_str();
  command->add_option("--scheme", f->options.stack.scheme, "kvtuner: kivi or pertoken")
      ->check(CLI::IsMember({"kivi", "pertoken"}))
      ->capture_default_str();
  command->add_flag("--fp8", f->options.stack.fp8, "lmdeploy: fp8 instead of int8");
  add_global_options(*command, global);
  command->callback([f, command, &global, &action] {
    f->command = "kvplan export " + f->target;
    for (const CLI::Option* option : command->get_options()) {
      if (option->count() == 0 || option->get_positional()) continue;
      f->command += " " + option->get_name();
      if (option->get_type_size() == 0) continue;
      for (const std::string& value : option->results()) f->command += " " + value;
    }
    action = [f, &global] { return run(*f, global); };
  });
}

}  // namespace kvplan::cli
