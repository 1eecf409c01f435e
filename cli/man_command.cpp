// Manual pages (roff, man macros), one for the program and one for each command, written from their
// definition.

#include <cctype>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/app_tree.h"
#include "cli/commands.h"
#include "schemas/atomic_file.h"

namespace kvplan::cli {
namespace {

/// Text as roff reads it: no hyphenation of "-", no request at the start of a line.
std::string roff(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\\') {
      out += "\\e";
    } else if (c == '-') {
      out += "\\-";
    } else {
      if ((c == '.' || c == '\'') && (out.empty() || out.back() == '\n')) out += "\\&";
      out += c;
    }
  }
  return out;
}

std::string upper(std::string text) {
  for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return text;
}

void write_flags(std::ostream& out, const CommandInfo& command) {
  std::string group;
  for (const auto& flag : command.flags) {
    if (flag.group != group) {
      group = flag.group;
      out << ".SH " << upper(roff(flag.names.empty() ? "arguments" : group)) << "\n";
    }
    out << ".TP\n";
    if (flag.names.empty()) out << "\\fI" << roff(flag.argument) << "\\fR";
    for (std::size_t i = 0; i < flag.names.size(); ++i)
      out << (i ? ", " : "") << "\\fB" << roff(flag.names[i]) << "\\fR";
    if (!flag.names.empty() && !flag.argument.empty())
      out << " \\fI" << roff(flag.argument) << "\\fR";
    out << "\n" << roff(flag.description);
    if (!flag.default_text.empty()) out << " (default: " << roff(flag.default_text) << ")";
    if (flag.required) out << " (required)";
    out << "\n";
  }
}

std::string title(const std::string& name) {
  return ".TH " + upper(roff(name)) + " 1 \"\" \"" + kProgram + "\" \"kvplan manual\"\n";
}

std::string program_page(const AppInfo& app) {
  std::ostringstream out;
  out << title("kvplan") << ".SH NAME\nkvplan \\- " << roff(app.program.description)
      << "\n.SH SYNOPSIS\n\\fBkvplan\\fR \\fICOMMAND\\fR [\\fIFLAGS\\fR]\n.SH COMMANDS\n";
  for (const auto& command : app.commands)
    out << ".TP\n\\fBkvplan\\-" << roff(command.name) << "\\fR(1)\n"
        << roff(command.description) << "\n";
  write_flags(out, app.program);
  out << ".SH EXIT STATUS\n";
  const std::pair<const char*, const char*> statuses[] = {
      {"0", "done"},
      {"1", "a bug of kvplan"},
      {"2", "usage"},
      {"3", "bad or refused input file"},
      {"4", "no plan fits the budget"},
      {"5", "out of memory"},
      {"6", "a requested condition failed (--gate, --strict)"},
      {"7", "environment: cannot write, disk full, lock held, device missing"},
      {"130, 143", "interrupted; state saved"}};
  for (const auto& [status, meaning] : statuses)
    out << ".TP\n\\fB" << status << "\\fR\n" << roff(meaning) << "\n";
  return out.str();
}

std::string command_page(const CommandInfo& command) {
  std::ostringstream out;
  out << title("kvplan-" + command.name) << ".SH NAME\nkvplan\\-" << roff(command.name) << " \\- "
      << roff(command.description) << "\n.SH SYNOPSIS\n\\fBkvplan " << roff(command.name) << "\\fR";
  for (const auto& flag : command.flags) {
    if (!flag.required) continue;
    out << ' ';
    if (!flag.names.empty()) out << "\\fB" << roff(flag.names.front()) << "\\fR ";
    out << "\\fI" << roff(flag.argument) << "\\fR";
  }
  out << " [\\fIFLAGS\\fR]\n";
  write_flags(out, command);
  out << ".SH SEE ALSO\n\\fBkvplan\\fR(1)\n";
  return out.str();
}

int run(const CLI::App& app, const std::filesystem::path& folder, const GlobalOptions& global) {
  const AppInfo info = app_info(app);
  std::vector<std::pair<std::string, std::string>> pages = {{"kvplan.1", program_page(info)}};
  for (const auto& command : info.commands)
    pages.emplace_back("kvplan-" + command.name + ".1", command_page(command));
  nlohmann::json names = nlohmann::json::array();
  if (!global.dry_run) make_folder(folder);
  for (const auto& [name, text] : pages) {
    if (!global.dry_run) write_file_atomically(folder / name, text);
    names.push_back((folder / name).string());
  }
  if (global.json) {
    std::cout << nlohmann::json{{"pages", names}}.dump(1) << '\n';
  } else {
    for (const auto& name : names) std::cout << name.get<std::string>() << '\n';
  }
  return 0;
}

}  // namespace

void add_man(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand("man", "Write the manual pages into a folder");
  auto folder = std::make_shared<std::filesystem::path>();
  command->add_option("folder", *folder, "Folder of the pages, such as share/man/man1")->required();
  add_global_options(*command, global);
  command->callback([folder, &app, &global, &action] {
    action = [folder, &app, &global] { return run(app, *folder, global); };
  });
}

}  // namespace kvplan::cli
