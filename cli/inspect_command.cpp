#include <iostream>

#include "cli/commands.h"
#include "cli/describe.h"
#include "cli/json_output.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

int run(const std::filesystem::path& path, const GlobalOptions& global) {
  namespace fs = std::filesystem;
  if (!fs::exists(path)) throw InputError(path.string(), "", "no such file or folder");
  if (fs::exists(path / "profile.json") || path.filename() == "profile.json") {
    const auto profile = read_profile(fs::is_directory(path) ? path : path.parent_path());
    std::cout << (global.json ? profile_json(profile) : describe(profile));
  } else if (fs::exists(path / "plan.json") || path.filename() == "plan.json") {
    const auto bundle = read_plan(path);
    std::cout << (global.json ? plan_json(bundle) : describe(bundle));
    const auto measured = (fs::is_directory(path) ? path : path.parent_path()) / "validation.json";
    if (!global.json && fs::exists(measured)) {
      const auto validation = read_validation(measured);
      if (validation.plan_sha256 == bundle.sha256)
        std::cout << '\n' << validated_context(bundle.plan, validation);
    }
  } else if (path.filename() == "validation.json") {
    const auto validation = read_validation(path);
    std::cout << (global.json ? validation_json(validation) : describe(validation));
  } else if (fs::is_directory(path) && !fs::exists(path / "config.json")) {
    throw InputError(
        path.string(), "",
        "expected a model (config.json), profile (profile.json) or plan (plan.json) in "
        "this folder, found none of them");
  } else {
    const auto model = models::open_model(path);
    std::cout << (global.json ? model_json(*model) : describe(*model));
  }
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand("inspect", "Show a model, profile, plan or validation");
  auto path = std::make_shared<std::filesystem::path>();
  command
      ->add_option("path", *path,
                   "GGUF file, model folder, profile folder, plan folder or validation.json")
      ->required();
  add_global_options(*command, global);
  command->callback(
      [path, &global, &action] { action = [path, &global] { return run(*path, global); }; });
}

}  // namespace kvplan::cli
