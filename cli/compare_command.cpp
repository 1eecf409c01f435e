#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/commands.h"
#include "schemas/error.h"
#include "schemas/plan.h"
#include "schemas/validation.h"

namespace kvplan::cli {
namespace {

namespace fs = std::filesystem;

/// A plan with what was measured of it, if there is a validation.json beside it.
struct MeasuredPlan {
  std::string name;
  PlanBundle bundle;
  std::optional<Validation> validation;

  const CandidateResult* measured(const std::string& mode) const {
    if (!validation) return nullptr;
    for (const auto& c : validation->candidates) {
      if (c.name == "plan" && c.mode == mode) return &c;
    }
    return nullptr;
  }
};

MeasuredPlan load(const fs::path& path) {
  const auto folder = fs::is_directory(path) ? path : path.parent_path();
  MeasuredPlan out{folder.filename().string(), read_plan(path), std::nullopt};
  if (fs::exists(folder / "validation.json")) {
    auto validation = read_validation(folder / "validation.json");
    if (validation.plan_sha256 != out.bundle.sha256) {
      throw InputError((folder / "validation.json").string(), "/plan_sha256",
                       "was measured on another plan than the one beside it");
    }
    out.validation = std::move(validation);
  }
  return out;
}

bool same_text(const Validation& a, const Validation& b) {
  return a.text_sha256 == b.text_sha256 && a.part_begin == b.part_begin &&
         a.part_end == b.part_end && a.window == b.window && a.windows == b.windows;
}

nlohmann::json to_json(const MeasuredPlan& s) {
  const Plan& p = s.bundle.plan;
  nlohmann::json layers = nlohmann::json::array();
  for (const auto& l : p.layers)
    layers.push_back({{"index", l.index}, {"k", l.k.bits}, {"v", l.v.bits}});
  nlohmann::json j = {{"name", s.name},
                      {"plan_sha256", s.bundle.sha256},
                      {"policy", p.policy},
                      {"codec", p.codec},
                      {"effective_bits", p.effective_bits},
                      {"bytes_per_token", p.bytes_per_token},
                      {"context", p.context},
                      {"predicted_kl", p.predicted_kl},
                      {"layers", layers}};
  for (const char* mode : {"worst", "decode"}) {
    if (const auto* c = s.measured(mode)) {
      j["measured"][mode] = {{"kl", c->kl.mean},
                             {"kl_standard_error", c->kl.standard_error},
                             {"perplexity_rise", c->perplexity_rise},
                             {"same_top1", c->same_top1}};
    }
  }
  return j;
}

std::string measured_text(const CandidateResult* c) {
  return c ? significant(c->kl.mean) + " ± " + significant(c->kl.standard_error, 2)
           : "not measured";
}

int run(const std::vector<fs::path>& paths, const GlobalOptions& global) {
  const MeasuredPlan a = load(paths[0]), b = load(paths[1]);
  require_same_model(a.bundle.plan.model, b.bundle.plan.model, paths[1].string());
  const bool comparable = a.validation && b.validation && same_text(*a.validation, *b.validation);
  if (global.json) {
    std::cout
        << nlohmann::json{{"a", to_json(a)}, {"b", to_json(b)}, {"same_text", comparable}}.dump(2)
        << '\n';
    return 0;
  }
  const Plan &p = a.bundle.plan, &q = b.bundle.plan;
  TextTable head({"", a.name, b.name});
  head.add_row({"policy", p.policy, q.policy});
  head.add_row({"codec", p.codec, q.codec});
  head.add_row({"effective bits", fixed(p.effective_bits, 4), fixed(q.effective_bits, 4)});
  head.add_row(
      {"bytes per token", std::to_string(p.bytes_per_token), std::to_string(q.bytes_per_token)});
  head.add_row({"context", std::to_string(p.context), std::to_string(q.context)});
  head.add_row({"predicted KL", significant(p.predicted_kl), significant(q.predicted_kl)});
  for (const char* mode : {"worst", "decode"}) {
    if (a.measured(mode) || b.measured(mode)) {
      head.add_row({std::string("measured KL, ") + mode, measured_text(a.measured(mode)),
                    measured_text(b.measured(mode))});
    }
  }
  std::cout << head.text();
  if (a.validation && b.validation && !comparable)
    std::cout << "note: the two were measured on different text; do not compare their KL\n";
  TextTable layers({"layer", "K " + a.name, "K " + b.name, "V " + a.name, "V " + b.name, "K change",
                    "V change"});
  for (std::size_t l = 0; l < p.layers.size(); ++l) {
    const auto &x = p.layers[l], &y = q.layers[l];
    layers.add_row({std::to_string(x.index), fixed(x.k.bits, 2), fixed(y.k.bits, 2),
                    fixed(x.v.bits, 2), fixed(y.v.bits, 2), fixed(y.k.bits - x.k.bits, 2),
                    fixed(y.v.bits - x.v.bits, 2)});
  }
  std::cout << '\n' << layers.text();
  return 0;
}

}  // namespace

void add_compare(CLI::App& app, GlobalOptions& global, Action& action) {
  auto* command = app.add_subcommand(
      "compare", "Two plans side by side, with the validations inside their folders");
  auto paths = std::make_shared<std::vector<fs::path>>();
  command->add_option("plans", *paths, "Two plan folders")->required()->expected(2);
  add_global_options(*command, global);
  command->callback(
      [paths, &global, &action] { action = [paths, &global] { return run(*paths, global); }; });
}

}  // namespace kvplan::cli
