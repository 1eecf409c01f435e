// Completions for bash, zsh and fish, written from the commands and flags of the program.

#include <algorithm>
#include <iostream>
#include <sstream>

#include "cli/app_tree.h"
#include "cli/commands.h"

namespace kvplan::cli {
namespace {

enum class Shell { kBash, kZsh, kFish };

std::string joined(const std::vector<std::string>& words, const char* between) {
  std::string out;
  for (const auto& word : words) out += (out.empty() ? "" : between) + word;
  return out;
}

/// In single quotes, where bash, zsh and fish read the same but for the quote and backslash.
std::string quoted(const std::string& text, Shell shell) {
  std::string out = "'";
  for (const char c : text) {
    if (c == '\'') {
      out += shell == Shell::kFish ? "\\'" : "'\\''";
    } else if (c == '\\' && shell == Shell::kFish) {
      out += "\\\\";
    } else {
      out += c;
    }
  }
  return out + "'";
}

std::string flag_names(const CommandInfo& command) {
  std::string out;
  for (const auto& flag : command.flags)
    for (const auto& name : flag.names) out += (out.empty() ? "" : " ") + name;
  return out;
}

/// Choices after a flag that has some, else flags after "-", else files.
std::string bash_text(const AppInfo& app) {
  std::ostringstream out;
  std::vector<std::string> commands;
  for (const auto& command : app.commands) commands.push_back(command.name);
  out << "# bash completion of kvplan, made by `kvplan completion bash`\n"
         "_kvplan() {\n"
         "  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} command= "
         "word\n"
         "  local commands="
      << quoted(joined(commands, " "), Shell::kBash)
      << "\n"
         "  for word in \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"; do\n"
         "    case \" $commands \" in *\" $word \"*) command=$word; break ;; esac\n"
         "  done\n"
         "  local flags= choices=\n"
         "  case $command in\n";
  for (const auto& command : app.commands) {
    out << "    " << command.name << ")\n      flags=" << quoted(flag_names(command), Shell::kBash)
        << "\n      case $previous in\n";
    for (const auto& flag : command.flags) {
      if (flag.choices.empty() || flag.names.empty()) continue;
      out << "        " << joined(flag.names, "|")
          << ") choices=" << quoted(joined(flag.choices, " "), Shell::kBash) << " ;;\n";
    }
    out << "        *) ;;\n      esac\n";
    for (const auto& flag : command.flags) {
      if (flag.choices.empty() || !flag.names.empty()) continue;
      out << "      [[ $current != -* ]] && choices="
          << quoted(joined(flag.choices, " "), Shell::kBash) << "\n";
    }
    out << "      ;;\n";
  }
  out << "    *) flags=" << quoted(flag_names(app.program), Shell::kBash)
      << "; [[ $current != -* ]] && choices=$commands ;;\n"
         "  esac\n"
         "  if [[ -n $choices ]]; then\n"
         "    COMPREPLY=($(compgen -W \"$choices\" -- \"$current\"))\n"
         "  elif [[ $current == -* ]]; then\n"
         "    COMPREPLY=($(compgen -W \"$flags\" -- \"$current\"))\n"
         "  else\n"
         "    COMPREPLY=($(compgen -f -- \"$current\"))\n"
         "  fi\n"
         "}\n"
         "complete -o filenames -F _kvplan kvplan\n";
  return out.str();
}

/// The text of one argument of zsh's _arguments: brackets and colons end its parts.
std::string zsh_escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '[' || c == ']' || c == ':' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

std::string zsh_value(const FlagInfo& flag) {
  if (flag.argument.empty()) return "";
  const std::string action =
      flag.choices.empty() ? "_files" : "(" + joined(flag.choices, " ") + ")";
  return ":" + zsh_escaped(flag.argument) + ":" + action;
}

std::string zsh_arguments(const CommandInfo& command) {
  std::string out;
  const auto add = [&](const std::string& spec) { out += " \\\n    " + quoted(spec, Shell::kZsh); };
  for (const auto& flag : command.flags) {
    if (flag.names.empty()) add("*" + zsh_value(flag));
    for (const auto& name : flag.names)
      add("*" + name + "[" + zsh_escaped(flag.description) + "]" + zsh_value(flag));
  }
  return out;
}

std::string zsh_text(const AppInfo& app) {
  std::ostringstream out;
  out << "#compdef kvplan\n# zsh completion of kvplan, made by `kvplan completion zsh`\n_kvplan() "
         "{\n"
         "  local -a commands\n  commands=(\n";
  for (const auto& command : app.commands)
    out << "    " << quoted(command.name + ":" + command.description, Shell::kZsh) << "\n";
  out << "  )\n"
         "  local line state\n"
         "  _arguments -C"
      << zsh_arguments(app.program)
      << " \\\n    '1:command:->command' '*::argument:->argument'\n"
         "  case $state in\n"
         "    command) _describe command commands ;;\n"
         "    argument)\n      case $line[1] in\n";
  for (const auto& command : app.commands) {
    out << "  " << command.name << ")\n    _arguments" << zsh_arguments(command) << " ;;\n";
  }
  out << "      esac ;;\n  esac\n}\ncompdef _kvplan kvplan\n";
  return out.str();
}

std::string fish_text(const AppInfo& app) {
  std::ostringstream out;
  out << "# fish completion of kvplan, made by `kvplan completion fish`\n";
  const auto add = [&](const std::string& condition, const FlagInfo& flag) {
    out << "complete -c kvplan -n " << quoted(condition, Shell::kFish);
    for (const auto& name : flag.names)
      out << (name.starts_with("--") ? " -l " : " -s ") << name.substr(name.find_first_not_of('-'));
    if (!flag.choices.empty()) {
      out << (flag.names.empty() ? " -f -a " : " -x -a ")
          << quoted(joined(flag.choices, " "), Shell::kFish);
    } else if (!flag.names.empty() && !flag.argument.empty()) {
      out << " -r";
    }
    out << " -d " << quoted(flag.description, Shell::kFish) << "\n";
  };
  for (const auto& flag : app.program.flags)
    if (!flag.names.empty()) add("__fish_use_subcommand", flag);
  for (const auto& command : app.commands) {
    out << "complete -c kvplan -f -n __fish_use_subcommand -a " << command.name << " -d "
        << quoted(command.description, Shell::kFish) << "\n";
    for (const auto& flag : command.flags)
      if (!flag.names.empty() || !flag.choices.empty())
        add("__fish_seen_subcommand_from " + command.name, flag);
  }
  return out.str();
}

}  // namespace

void add_completion(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand("completion", "Print the completion script of a shell");
  auto shell = std::make_shared<std::string>();
  command->add_option("shell", *shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "fish", "zsh"}));
  add_global_options(*command, global);
  command->callback([shell, &app, &action] {
    action = [shell, &app] {
      const AppInfo info = app_info(app);
      std::cout << (*shell == "bash"  ? bash_text(info)
                    : *shell == "zsh" ? zsh_text(info)
                                      : fish_text(info));
      return 0;
    };
  });
}

}  // namespace kvplan::cli
