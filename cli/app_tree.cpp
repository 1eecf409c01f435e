#include "cli/app_tree.h"

#include <sstream>

namespace kvplan::cli {
namespace {

/// The names that CLI11 lists in an option's type, as "TEXT:value in {cpu->0,cuda->1} OR {0,1}".
std::vector<std::string> choices_of(const std::string& type) {
  const auto begin = type.find('{'), end = type.find('}');
  std::vector<std::string> choices;
  if (begin == std::string::npos || end == std::string::npos || end < begin) return choices;
  std::istringstream list(type.substr(begin + 1, end - begin - 1));
  for (std::string item; std::getline(list, item, ',');)
    choices.push_back(item.substr(0, item.find("->")));
  return choices;
}

FlagInfo flag_info(const CLI::Option& option) {
  FlagInfo info;
  for (const auto& name : option.get_lnames()) info.names.push_back("--" + name);
  for (const auto& name : option.get_snames()) info.names.push_back("-" + name);
  const bool takes_value = option.get_type_size_max() > 0;
  if (takes_value) {
    info.choices = choices_of(option.get_type_name());
    const std::string type = option.get_type_name();
    info.argument =
        info.names.empty() ? option.get_name() : type.substr(0, type.find_first_of(" :"));
  }
  info.description = option.get_description();
  info.default_text = option.get_default_str();
  info.group = option.get_group();
  info.required = option.get_required();
  return info;
}

void add_flags(const CLI::App& app, CommandInfo& info) {
  for (const auto* option : app.get_options()) info.flags.push_back(flag_info(*option));
  // Option groups are subcommands without a name.
  for (const auto* inner : app.get_subcommands([](const CLI::App*) { return true; }))
    if (inner->get_name().empty()) add_flags(*inner, info);
}

CommandInfo command_info(const CLI::App& app) {
  CommandInfo info{app.get_name(), app.get_description(), {}};
  add_flags(app, info);
  return info;
}

}  // namespace

AppInfo app_info(const CLI::App& app) {
  AppInfo info;
  info.program = command_info(app);
  for (const auto* command : app.get_subcommands([](const CLI::App*) { return true; }))
    info.commands.push_back(command_info(*command));
  return info;
}

}  // namespace kvplan::cli
