#include <iostream>

#include "cli/commands.h"
#include "cli/describe.h"
#include "exporters/import.h"
#include "models/model.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

struct ImportFlags {
  std::string format, scheme;
  std::filesystem::path file, model, out;
};

/// A model with its weights, or a config.json alone.
exporters::ImportOptions model_options(const std::filesystem::path& path) {
  exporters::ImportOptions options;
  if (path.extension() == ".json") {
    options.model =
        exporters::model_of_config(read_text_file(path), path.string(), options.context);
    return options;
  }
  const auto model = models::open_model(path);
  options.model = model->spec();
  options.context = model->config().max_context;
  return options;
}

int run(const ImportFlags& flags, const GlobalOptions& global) {
  require_absent(flags.out, global);
  auto options = model_options(flags.model);
  options.scheme = flags.scheme;
  PlanBundle bundle = exporters::import_plan(flags.format, flags.file, options);
  bundle.plan.provenance.program = kProgram;
  if (!global.dry_run) write_plan(bundle, flags.out, global.force);
  std::cout << (global.json ? plan_json(bundle) : describe(bundle));
  return 0;
}

}  // namespace

void add_import(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command =
      app.add_subcommand("import", "Read a plan of another tool, to validate and compare it");
  auto f = std::make_shared<ImportFlags>();
  command->add_option("format", f->format, "kvtuner or modelopt")
      ->required()
      ->check(CLI::IsMember({"kvtuner", "modelopt"}));
  command
      ->add_option("file", f->file,
                   "KVTuner's YAML, or ModelOpt's hf_quant_config.json or config.json")
      ->required();
  command
      ->add_option("--model-config,--model,-m", f->model,
                   "The model: GGUF file, Hugging Face folder, or a config.json alone (its plan "
                   "names no weights: validate it with --allow-other-weights)")
      ->required();
  command
      ->add_option("--scheme", f->scheme,
                   "kvtuner: kivi or pertoken (default: from the file's name)")
      ->check(CLI::IsMember({"kivi", "pertoken"}));
  command->add_option("--out,-o", f->out, "Folder of the plan")->required();
  add_global_options(*command, global);
  command->callback([f, &global, &action] { action = [f, &global] { return run(*f, global); }; });
}

}  // namespace kvplan::cli
