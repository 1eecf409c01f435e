#include <iostream>
#include <optional>

#include "cli/commands.h"
#include "cli/report/report.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/validation.h"

namespace kvplan::cli {
namespace {

namespace fs = std::filesystem;

struct ReportFlags {
  fs::path profile, out;
  std::vector<fs::path> plans, validations;
};

/// Points of the front whose bit maps the page holds.
constexpr std::size_t kFrontMaps = 64;

int run(const ReportFlags& flags, const GlobalOptions& global) {
  if (flags.profile.empty() && flags.plans.empty())
    throw ArgumentError("report: give --profile, --plan or both");
  require_absent(flags.out, global);
  std::optional<Profile> profile;
  std::string profile_sha;
  if (!flags.profile.empty()) {
    profile = read_profile(flags.profile);
    profile_sha = profile_sha256(flags.profile);
  }
  bool front_shown = false;  // the page draws the front of the first plan that has one
  std::vector<Validation> validations;
  for (const auto& path : flags.validations) validations.push_back(read_validation(path));
  std::vector<ReportPlan> plans;
  for (const auto& path : flags.plans) {
    const auto bundle = read_plan(path);
    // Absolute: the folder has a name also when it is given as "." or "plan/".
    const auto given = fs::absolute(path).lexically_normal();
    const auto folder = (fs::is_directory(given) ? given / "" : given).parent_path();
    auto candidates = validations;
    if (fs::exists(folder / "validation.json"))
      candidates.push_back(read_validation(folder / "validation.json"));
    ReportPlan entry{folder.filename().string(), plan_json(bundle), "", {}};
    if (!front_shown && profile && bundle.plan.provenance.profile_sha256 == profile_sha)
      entry.front = front_maps(*profile, bundle.plan, kFrontMaps, global.threads);
    front_shown = front_shown || !bundle.plan.front.empty();
    for (const auto& validation : candidates) {
      if (validation.plan_sha256 == bundle.sha256)
        entry.validation_json = validation_json(validation);
    }
    plans.push_back(std::move(entry));
  }
  const auto html = report_html(profile ? profile_json(*profile) : "", plans);
  if (!global.dry_run) write_file_atomically(flags.out, html);
  if (global.json) {
    std::cout << R"({"report":")" << flags.out.string() << R"(","bytes":)" << html.size() << "}\n";
  } else {
    std::cout << flags.out.string() << '\n';
  }
  return 0;
}

}  // namespace

void add_report(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "report", "One self-contained HTML page of a profile, plans and validations");
  auto f = std::make_shared<ReportFlags>();
  command->add_option("--profile", f->profile, "Profile folder");
  command->add_option("--plan,-p", f->plans,
                      "Plan folders; a validation.json inside is taken along");
  command->add_option("--validation", f->validations,
                      "Further validation files; matched to the plans by SHA-256");
  command->add_option("--out,-o", f->out, "HTML file")->required();
  add_global_options(*command, global);
  command->callback([f, &global, &action] { action = [f, &global] { return run(*f, global); }; });
}

}  // namespace kvplan::cli
