#include "schemas/migrations.h"

#include <utility>

namespace kvplan {
namespace {

using nlohmann::json;

void add_absent(json& object, const char* name, json value) {
  if (object.is_object() && !object.contains(name)) object[name] = std::move(value);
}

bool is_version(const json& document, int version) {
  return document.is_object() && document.contains("version") && document["version"] == version;
}

}  // namespace

void migrate_plan(json& document) {
  if (!is_version(document, 1)) return;
  // Before codecs had variants and plans were tried out.
  add_absent(document, "variant",
             {{"sketch", "none"},
              {"sketch_rows", 0},
              {"sketch_sides", "k"},
              {"outlier_code", "absmax"},
              {"outlier_bits", 8},
              {"norm_block", 0}});
  add_absent(document, "trials", json::array());
}

void migrate_validation(json& document) {
  if (!is_version(document, 1)) return;
  // Before tasks were measured and candidates could run on several runtimes.
  for (const char* list : {"by_text", "passkey", "prompts"})
    add_absent(document, list, json::array());
  add_absent(document, "prompt_source", nullptr);
  const auto candidates = document.find("candidates");
  if (candidates == document.end() || !candidates->is_array()) return;
  for (json& candidate : *candidates) add_absent(candidate, "runtime", "cpu");
}

}  // namespace kvplan
