// The kvplan command line: parses, calls the libraries, prints; maps errors to exit codes.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <new>

#include "cli/commands.h"
#include "schemas/error.h"

namespace {

using namespace kvplan;

int fail(int code, const char* what) {
  std::fprintf(stderr, "kvplan: %s\n", what);
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

}  // namespace

int main(int argc, char** argv) {
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
  cli::add_report(app, global, action);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  cli::install_signal_handlers();
  return run(action);
}
