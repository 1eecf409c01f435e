#pragma once
// The commands and flags of the program as plain values, read from its CLI11 definition: what shell
// completions and manual pages are written from.

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace kvplan::cli {

struct FlagInfo {
  std::vector<std::string> names;  // "--out", "-o"; empty for a positional argument
  std::string argument;            // name of a positional argument, else of the value; "" for none
  std::vector<std::string> choices;
  std::string description, default_text, group;
  bool required = false;
};

struct CommandInfo {
  std::string name, description;
  std::vector<FlagInfo> flags;
};

struct AppInfo {
  CommandInfo program;                // flags of the program itself
  std::vector<CommandInfo> commands;  // in the order of `kvplan --help`
};

AppInfo app_info(const CLI::App& app);

}  // namespace kvplan::cli
