#include <iostream>

#include "cli/commands.h"
#include "cli/describe.h"
#include "quant/moments.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"

namespace kvplan::cli {
namespace {

struct MergeFlags {
  std::vector<std::string> parts;
  std::vector<double> weights;
  std::filesystem::path out;
};

int run(const MergeFlags& flags, const GlobalOptions& global) {
  if (!flags.weights.empty() && flags.weights.size() != flags.parts.size()) {
    throw ArgumentError("--weight: expected one per profile (" +
                        std::to_string(flags.parts.size()) + "), found " +
                        std::to_string(flags.weights.size()));
  }
  require_absent(flags.out / "profile.json", global);
  std::vector<Profile> parts;
  for (const auto& part : flags.parts) parts.push_back(read_profile(part));
  Profile merged = merge_profiles(parts, flags.weights, flags.parts);
  merged.program = kProgram;
  merged.summary = quant::summarise(merged);
  if (global.dry_run) {
    std::cout << "would write " << merged.windows.size() << " windows into " << flags.out.string()
              << '\n';
    return 0;
  }
  const FolderLock lock(flags.out);
  write_profile(merged, flags.out);
  std::cout << (global.json ? profile_json(merged) : describe(merged));
  return 0;
}

}  // namespace

void add_merge(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand("merge", "Add up profiles of shards or of several texts");
  auto flags = std::make_shared<MergeFlags>();
  command->add_option("profiles", flags->parts, "Profile folders, in any order")->required();
  command->add_option("--weight", flags->weights, "Weight of each profile's sums (default 1)");
  command->add_option("--out,-o", flags->out, "Folder of the merged profile")->required();
  add_global_options(*command, global);
  command->callback(
      [flags, &global, &action] { action = [flags, &global] { return run(*flags, global); }; });
}

}  // namespace kvplan::cli
