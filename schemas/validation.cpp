#include "schemas/validation.h"

#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <tuple>
#include <utility>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/json_fields.h"

namespace kvplan {
namespace {

using nlohmann::json;

constexpr std::string_view kFormat = "kvplan.validation";
constexpr std::int64_t kVersion = 1;
constexpr std::array<std::string_view, 2> kModes = {"worst", "decode"};
constexpr double kMaxEffectiveBits = 32;

json interval_to_json(const Interval& interval) {
  return {{"low", interval.low}, {"high", interval.high}};
}

json candidate_to_json(const CandidateResult& candidate) {
  const KlStatistics& kl = candidate.kl;
  return {{"name", candidate.name},
          {"mode", candidate.mode},
          {"effective_bits", candidate.effective_bits},
          {"perplexity", candidate.perplexity},
          {"perplexity_rise", candidate.perplexity_rise},
          {"perplexity_rise_interval", interval_to_json(candidate.perplexity_rise_interval)},
          {"kl",
           {{"mean", kl.mean},
            {"standard_error", kl.standard_error},
            {"p50", kl.p50},
            {"p95", kl.p95},
            {"p99", kl.p99},
            {"max", kl.max},
            {"cvar95", kl.cvar95}}},
          {"kl_minus_plan", interval_to_json(candidate.kl_minus_plan)},
          {"same_top1", candidate.same_top1},
          {"kl_by_position", candidate.kl_by_position},
          {"predicted_kl", candidate.predicted_kl ? json(*candidate.predicted_kl) : json(nullptr)}};
}

json validation_to_json(const Validation& validation) {
  if (validation.text_names.size() != validation.text_sha256.size()) {
    throw InternalError("validation names " + std::to_string(validation.text_names.size()) +
                        " texts and " + std::to_string(validation.text_sha256.size()) + " SHA-256");
  }
  json texts = json::array(), candidates = json::array(), gates = json::array();
  for (std::size_t i = 0; i < validation.text_names.size(); ++i) {
    texts.push_back({{"name", validation.text_names[i]}, {"sha256", validation.text_sha256[i]}});
  }
  for (const CandidateResult& candidate : validation.candidates)
    candidates.push_back(candidate_to_json(candidate));
  for (const GateResult& gate : validation.gates) {
    gates.push_back(
        {{"expression", gate.expression}, {"measured", gate.measured}, {"passed", gate.passed}});
  }
  return {{"format", kFormat},
          {"version", kVersion},
          {"plan_sha256", text_or_null(validation.plan_sha256)},
          {"model_sha256", text_or_null(validation.model_sha256)},
          {"texts", texts},
          {"part", {validation.part_begin, validation.part_end}},
          {"window", validation.window},
          {"windows", validation.windows},
          {"first_scored", validation.first_scored},
          {"scored_tokens", validation.scored_tokens},
          {"bos", validation.bos},
          {"runtime", validation.runtime},
          {"program", validation.program},
          {"candidates", candidates},
          {"gates", gates}};
}

Interval interval_from_json(JsonObject object) {
  Interval interval;
  interval.low = object.number("low");
  interval.high = object.number("high", interval.low);
  object.finish();
  return interval;
}

KlStatistics kl_from_json(JsonObject object) {
  KlStatistics kl;
  kl.mean = object.number("mean");
  kl.standard_error = object.number("standard_error", 0);
  kl.p50 = object.number("p50");
  kl.p95 = object.number("p95");
  kl.p99 = object.number("p99");
  kl.max = object.number("max");
  kl.cvar95 = object.number("cvar95");
  object.finish();
  return kl;
}

CandidateResult candidate_from_json(JsonObject object) {
  CandidateResult candidate;
  candidate.name = object.text("name");
  candidate.mode = object.choice("mode", kModes);
  candidate.effective_bits = object.number("effective_bits", 0, kMaxEffectiveBits);
  candidate.perplexity = object.number("perplexity", 0);
  candidate.perplexity_rise = object.number("perplexity_rise", -1);
  candidate.perplexity_rise_interval =
      interval_from_json(object.object("perplexity_rise_interval"));
  candidate.kl = kl_from_json(object.object("kl"));
  candidate.kl_minus_plan = interval_from_json(object.object("kl_minus_plan"));
  candidate.same_top1 = object.number("same_top1", 0, 1);
  candidate.kl_by_position = object.numbers("kl_by_position");
  candidate.predicted_kl = object.number_or_null("predicted_kl", 0);
  object.finish();
  return candidate;
}

Validation validation_from_json(const json& document, const std::string& file) {
  JsonObject object(document, file);
  object.require_format(kFormat, kVersion);
  Validation validation;
  validation.plan_sha256 = object.sha256_or_null("plan_sha256");
  validation.model_sha256 = object.sha256_or_null("model_sha256");
  for (JsonObject& text : object.objects("texts")) {
    validation.text_names.push_back(text.text("name"));
    validation.text_sha256.push_back(text.sha256("sha256"));
    text.finish();
  }
  std::tie(validation.part_begin, validation.part_end) = object.part("part");
  validation.window = object.small_integer("window", 0);
  validation.windows = object.small_integer("windows", 0);
  validation.first_scored = object.small_integer("first_scored", 0);
  validation.scored_tokens = object.integer("scored_tokens");
  validation.bos = object.boolean("bos");
  validation.runtime = object.text("runtime");
  validation.program = object.text("program");
  for (JsonObject& candidate : object.objects("candidates")) {
    validation.candidates.push_back(candidate_from_json(std::move(candidate)));
  }
  for (JsonObject& gate : object.objects("gates")) {
    validation.gates.push_back(
        {gate.text("expression"), gate.number("measured"), gate.boolean("passed")});
    gate.finish();
  }
  object.finish();
  return validation;
}

}  // namespace

std::string validation_json(const Validation& validation) {
  const json document = validation_to_json(validation);
  try {
    validation_from_json(document, "validation.json");
  } catch (const InputError& error) {
    throw InternalError(std::string("validation not written: ") + error.what());
  }
  return document_text(document);
}

void write_validation(const Validation& validation, const std::filesystem::path& file) {
  write_file_atomically(file, validation_json(validation));
}

Validation read_validation(const std::filesystem::path& file) {
  return validation_from_json(read_document(file.string()), file.string());
}

}  // namespace kvplan
