#pragma once
// One function per verb: declares its flags and what runs when it is chosen.

#include <functional>

#include "cli/options.h"

namespace kvplan::cli {

/// The chosen command's action; returns the exit code.
using Action = std::function<int()>;

void add_inspect(CLI::App& app, GlobalOptions& global, Action& action);
void add_profile(CLI::App& app, GlobalOptions& global, Action& action);
void add_merge(CLI::App& app, GlobalOptions& global, Action& action);
void add_plan(CLI::App& app, GlobalOptions& global, Action& action);
void add_generate(CLI::App& app, GlobalOptions& global, Action& action);
void add_size(CLI::App& app, GlobalOptions& global, Action& action);
void add_validate(CLI::App& app, GlobalOptions& global, Action& action);
void add_compare(CLI::App& app, GlobalOptions& global, Action& action);
void add_sweep(CLI::App& app, GlobalOptions& global, Action& action);
void add_study(CLI::App& app, GlobalOptions& global, Action& action);
void add_export(CLI::App& app, GlobalOptions& global, Action& action);
void add_import(CLI::App& app, GlobalOptions& global, Action& action);
void add_report(CLI::App& app, GlobalOptions& global, Action& action);
void add_doctor(CLI::App& app, GlobalOptions& global, Action& action);
void add_completion(CLI::App& app, GlobalOptions& global, Action& action);
void add_man(CLI::App& app, GlobalOptions& global, Action& action);

}  // namespace kvplan::cli
