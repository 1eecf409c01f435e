#include "evaluation/gates.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "schemas/error.h"

namespace kvplan::evaluation {
namespace {

struct Metric {
  const char* name;
  double (*of)(const CandidateResult&);
};

constexpr std::array<Metric, 9> kMetrics = {{
    {"kl", [](const CandidateResult& c) { return c.kl.mean; }},
    {"kl_p95", [](const CandidateResult& c) { return c.kl.p95; }},
    {"kl_p99", [](const CandidateResult& c) { return c.kl.p99; }},
    {"kl_max", [](const CandidateResult& c) { return c.kl.max; }},
    {"kl_cvar95", [](const CandidateResult& c) { return c.kl.cvar95; }},
    {"ppl", [](const CandidateResult& c) { return c.perplexity; }},
    {"ppl_rise", [](const CandidateResult& c) { return c.perplexity_rise; }},
    {"same_top1", [](const CandidateResult& c) { return c.same_top1; }},
    {"bits", [](const CandidateResult& c) { return c.effective_bits; }},
}};

const Metric* find_metric(std::string_view name) {
  const auto it = std::find_if(kMetrics.begin(), kMetrics.end(),
                               [&](const Metric& m) { return name == m.name; });
  return it == kMetrics.end() ? nullptr : &*it;
}

Gate parse_gate(std::string_view text) {
  const auto op = text.find_first_of("<>");
  const bool has_operator =
      op != std::string_view::npos && op + 1 < text.size() && text[op + 1] == '=';
  const auto name = text.substr(0, has_operator ? op : text.size());
  const auto number = has_operator ? text.substr(op + 2) : std::string_view{};
  double bound = 0;
  const auto parsed = std::from_chars(number.data(), number.data() + number.size(), bound);
  if (!find_metric(name) || number.empty() || parsed.ec != std::errc{} ||
      parsed.ptr != number.data() + number.size()) {
    std::string names;
    for (const auto& m : kMetrics) names += std::string(names.empty() ? "" : ", ") + m.name;
    throw ArgumentError("--gate: expected METRIC<=NUMBER or METRIC>=NUMBER with METRIC one of " +
                        names + "; found '" + std::string(text) + "'");
  }
  return {std::string(text), std::string(name), text[op] == '<', bound};
}

}  // namespace

std::vector<Gate> parse_gates(std::string_view text) {
  std::vector<Gate> gates;
  while (!text.empty()) {
    const auto comma = text.find(',');
    gates.push_back(parse_gate(text.substr(0, comma)));
    text.remove_prefix(comma == std::string_view::npos ? text.size() : comma + 1);
  }
  return gates;
}

std::vector<GateResult> apply_gates(const std::vector<Gate>& gates, const Validation& validation,
                                    const std::string& name) {
  std::vector<GateResult> results;
  for (const auto& gate : gates) {
    std::vector<double> values;
    for (const auto& c : validation.candidates) {
      if (c.name == name) values.push_back(find_metric(gate.metric)->of(c));
    }
    if (values.empty()) throw ArgumentError("--gate: no measurement of " + name);
    const double worst = gate.at_most ? *std::max_element(values.begin(), values.end())
                                      : *std::min_element(values.begin(), values.end());
    results.push_back(
        {gate.expression, worst, gate.at_most ? worst <= gate.bound : worst >= gate.bound});
  }
  return results;
}

}  // namespace kvplan::evaluation
