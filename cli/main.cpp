// The kvplan command line: parses, calls the libraries, prints; maps errors to exit codes.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cli/app_tree.h"
#include "cli/commands.h"
#include "schemas/error.h"
#include "schemas/spelling.h"

namespace {

using namespace kvplan;

int fail(int code, const char* what) {
  const std::string name = cli::coloured(cli::Colour::kRed, "kvplan:", STDERR_FILENO);
  std::fprintf(stderr, "%s %s\n", name.c_str(), what);
  return code;
}

/// Exit codes: docs/architecture.md.
int run(const cli::Action& action) {
  try {
    return action();
  } catch (const ArgumentError& e) {
    return fail(2, e.what());
  } catch (const InputError& e) {
    return fail(3, e.what());
  } catch (const InfeasibleError& e) {
    return fail(4, e.what());
  } catch (const MemoryError& e) {
    return fail(5, e.what());
  } catch (const EnvironmentError& e) {
    return fail(7, e.what());
  } catch (const InterruptedError& e) {
    return fail(128 + e.signal(), e.what());
  } catch (const std::bad_alloc&) {
    return fail(5,
                "out of memory; use a smaller --window or --batch, or a machine with more memory");
  } catch (const std::exception& e) {
    // LibTorch reports a failed allocation as a c10::Error, which is known here by its text alone.
    const std::string_view text = e.what();
    const bool allocation = text.find("allocate memory") != std::string_view::npos ||
                            text.find("CUDA out of memory") != std::string_view::npos;
    return fail(allocation ? 5 : 1, e.what());
  }
}

/// The flags and commands that a word at this place may be.
std::vector<std::string> known_words(const cli::AppInfo& app, const cli::CommandInfo& command,
                                     bool flag) {
  std::vector<std::string> known;
  if (!flag) {
    if (&command == &app.program)
      for (const auto& named : app.commands) known.push_back(named.name);
    return known;
  }
  for (const auto* flags : {&command, &app.program})
    for (const auto& info : flags->flags)
      known.insert(known.end(), info.names.begin(), info.names.end());
  return known;
}

/// What the first unknown word of the command line may have been meant to be.
std::string suggestion(const CLI::App& app, int argc, char** argv) {
  const auto info = cli::app_info(app);
  const auto* command = &info.program;
  for (int i = 1; i < argc; ++i) {
    const std::string word(argv[i], std::min(std::strlen(argv[i]), std::strcspn(argv[i], "=")));
    const bool flag = word.starts_with("--");
    if (word.starts_with('-') && !flag) continue;
    const auto known = known_words(info, *command, flag);
    if (command == &info.program) {
      const auto named = std::ranges::find(info.commands, word, &cli::CommandInfo::name);
      if (named != info.commands.end()) command = &*named;
    }
    if (known.empty() || std::ranges::find(known, word) != known.end()) continue;
    // Words without a near name may be values of flags.
    if (const std::string meant = spelling_suggestion(word, known); !meant.empty()) return meant;
  }
  return "";
}

/// The first word that no command or flag takes.
std::string stray_word(const CLI::App& app) {
  for (const std::string& word : app.remaining(/*recurse=*/true))
    if (!word.starts_with('-')) return word;
  return "";
}

/// What a parse error of CLI11 leaves unsaid.
std::string advice(const CLI::App& app, const CLI::ParseError& error, int argc, char** argv) {
  if (dynamic_cast<const CLI::ConfigError*>(&error))
    return "in a --config file a flag stands, without its dashes, below the name of its command, "
           "such as [plan]";
  const std::string meant = suggestion(app, argc, argv), word = stray_word(app);
  if (!meant.empty()) return meant.substr(2);
  if (app.get_subcommands().empty()) {
    std::string text = word.empty() ? "" : "there is no command '" + word + "'; ";
    text += "commands are";
    for (const auto& command : cli::app_info(app).commands) text += " " + command.name;
    return text;
  }
  constexpr std::string_view kIsRequired = " is required";
  const std::string_view what = error.what();
  const auto flag_end = what.find(kIsRequired);
  if (!word.empty() && what.starts_with("--") && flag_end != what.npos)
    return "'" + word + "' stands alone; did you mean " + std::string(what.substr(0, flag_end)) +
           " " + word + "?";
  return "";
}

/// "kvplan help", "kvplan help plan" as people type them.
std::vector<char*> with_help_flag(int argc, char** argv) {
  static char flag[] = "--help";
  std::vector<char*> words(argv, argv + argc);
  if (argc > 1 && std::string_view(argv[1]) == "help") {
    words.erase(words.begin() + 1);
    words.push_back(flag);
  }
  return words;
}

}  // namespace

int main(int argc, char** argv) {
  // With this workspace cuBLAS gives the same bits every time (calib/profiler.cpp asks for them).
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  CLI::App app{"Plans how the key/value cache of a transformer is quantised.", "kvplan"};
  app.set_version_flag("--version", cli::kProgram);
  app.require_subcommand(1);
  app.fallthrough();
  app.set_config("--config", "",
                 "Read flags from a TOML file with a section per command, [plan] and so on");
  app.allow_config_extras(CLI::config_extras_mode::error);
  cli::GlobalOptions global;
  cli::Action action;
  cli::add_inspect(app, global, action);
  cli::add_profile(app, global, action);
  cli::add_merge(app, global, action);
  cli::add_plan(app, global, action);
  cli::add_validate(app, global, action);
  cli::add_generate(app, global, action);
  cli::add_size(app, global, action);
  cli::add_compare(app, global, action);
  cli::add_sweep(app, global, action);
  cli::add_study(app, global, action);
  cli::add_export(app, global, action);
  cli::add_import(app, global, action);
  cli::add_report(app, global, action);
  cli::add_doctor(app, global, action);
  cli::add_completion(app, global, action);
  cli::add_man(app, global, action);
  try {
    const auto words = with_help_flag(argc, argv);
    app.parse(static_cast<int>(words.size()), words.data());
  } catch (const CLI::ParseError& e) {
    if (app.exit(e) == 0) return 0;
    const std::string more = advice(app, e, argc, argv);
    if (!more.empty()) std::fprintf(stderr, "kvplan: %s\n", more.c_str());
    return 2;
  }
  cli::install_signal_handlers();
  return run(action);
}
