#include "studies/document.h"

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

namespace kvplan::studies {
namespace {

using nlohmann::json;

const char* role_name(Role role) {
  switch (role) {
    case Role::kClaim:
      return "claim";
    case Role::kExplanation:
      return "explanation";
    case Role::kReference:
      break;
  }
  return "reference";
}

json finite_or_null(double x) { return std::isfinite(x) ? json(x) : json(nullptr); }

json check_to_json(const Check& check) {
  return {{"role", role_name(check.role)},
          {"name", check.name},
          {"measured", finite_or_null(check.measured)},
          {"expected", check.expected ? finite_or_null(*check.expected) : json(nullptr)},
          {"low", finite_or_null(check.low)},
          {"high", finite_or_null(check.high)},
          {"unit", check.unit},
          {"passed", check.passed()}};
}

json outcome_to_json(const Outcome& outcome) {
  const StudyInfo& info = outcome.study->info;
  json checks = json::array(), tables = json::array();
  for (const Check& check : outcome.result.checks()) checks.push_back(check_to_json(check));
  for (const StudyTable& table : outcome.result.tables())
    tables.push_back({{"title", table.title}, {"header", table.header}, {"rows", table.rows}});
  return {{"id", info.id},
          {"title", info.title},
          {"claim", info.claim},
          {"source", info.source},
          {"explanation", info.explanation},
          {"expected_verdict", verdict_letter(info.expected)},
          {"verdict", verdict_letter(outcome.verdict)},
          {"not_run_reason", outcome.not_run_reason},
          {"missed_references", outcome.result.missed_references()},
          {"checks", checks},
          {"tables", tables},
          {"notes", outcome.result.notes()}};
}

std::string number(double x) {
  if (std::isinf(x)) return x < 0 ? "−∞" : "∞";
  char text[32];
  const double size = std::abs(x);
  std::snprintf(text, sizeof text, x == std::round(x) && size < 1e7 ? "%.0f" : "%.4g", x);
  return text;
}

std::string range(const Check& check) {
  if (check.expected && check.low == check.high) return number(*check.expected);
  if (check.expected) return number(*check.expected) + " ± " + number(check.high - *check.expected);
  if (std::isinf(check.low)) return "≤ " + number(check.high);
  if (std::isinf(check.high)) return "≥ " + number(check.low);
  return number(check.low) + " … " + number(check.high);
}

void add_row(std::string& out, const std::vector<std::string>& cells) {
  for (const std::string& cell : cells) {
    out += "| ";
    for (const char c : cell) out += c == '|' ? std::string("\\|") : std::string(1, c);
    out += ' ';
  }
  out += "|\n";
}

void add_header(std::string& out, const std::vector<std::string>& cells) {
  add_row(out, cells);
  for (std::size_t i = 0; i < cells.size(); ++i) out += i == 0 ? "|---" : "|---:";
  out += "|\n";
}

std::string summary_word(const Outcome& outcome) {
  switch (outcome.verdict) {
    case Verdict::kConfirmed:
      return "confirmed";
    case Verdict::kExplained:
      return "explained";
    case Verdict::kRefuted:
      return "refuted";
    case Verdict::kNotRun:
      break;
  }
  return "not run: " + outcome.not_run_reason;
}

void add_study(std::string& out, const Outcome& outcome) {
  const StudyInfo& info = outcome.study->info;
  out += "\n### " + info.id + " " + info.title + ": " + summary_word(outcome) + "\n\n";
  out += "**Claim.** " + info.claim + "  \n**Source.** " + info.source + "  \n**Why.** " +
         info.explanation + "\n";
  if (outcome.verdict != Verdict::kNotRun && outcome.verdict != info.expected)
    out += "\n**Finding:** the verdict expected was " + std::string(verdict_letter(info.expected)) +
           ".\n";
  if (!outcome.result.checks().empty()) {
    out += '\n';
    add_header(out, {"check", "role", "measured", "passes at", ""});
    for (const Check& check : outcome.result.checks())
      add_row(out, {check.name, role_name(check.role),
                    number(check.measured) + (check.unit.empty() ? "" : " " + check.unit),
                    range(check), check.passed() ? "yes" : "**no**"});
  }
  for (const StudyTable& table : outcome.result.tables()) {
    out += "\n" + table.title + "\n\n";
    add_header(out, table.header);
    for (const auto& row : table.rows) add_row(out, row);
  }
  for (const std::string& note : outcome.result.notes()) out += "\n" + note + "\n";
}

}  // namespace

std::string study_json(const std::vector<Outcome>& outcomes, const StudyRun& run) {
  json studies = json::array();
  for (const Outcome& outcome : outcomes) studies.push_back(outcome_to_json(outcome));
  const json document = {{"format", "kvplan.study"}, {"version", 1},       {"program", run.program},
                         {"seed", run.seed},         {"model", run.model}, {"text", run.text},
                         {"studies", studies}};
  return document.dump(1, ' ', false, json::error_handler_t::replace) + "\n";
}

std::string study_markdown(const std::vector<Outcome>& outcomes, const StudyRun& run) {
  std::string out =
      "Made by `kvplan study` (" + run.program + ", seed " + std::to_string(run.seed) +
      (run.model.empty() ? ", without a model" : "; " + run.model + "; " + run.text) + ").\n\n";
  add_header(out, {"id", "study", "verdict", "expected", "checks passed"});
  for (const Outcome& outcome : outcomes) {
    int passed = 0;
    for (const Check& check : outcome.result.checks()) passed += check.passed() ? 1 : 0;
    add_row(out,
            {outcome.study->info.id, outcome.study->info.title, summary_word(outcome),
             verdict_letter(outcome.study->info.expected),
             std::to_string(passed) + " of " + std::to_string(outcome.result.checks().size())});
  }
  for (const Outcome& outcome : outcomes) add_study(out, outcome);
  return out;
}

}  // namespace kvplan::studies
