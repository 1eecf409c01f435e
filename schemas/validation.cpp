#include "schemas/validation.h"

#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/json_fields.h"
#include "schemas/migrations.h"

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

json estimate_to_json(const MeanEstimate& estimate) {
  return {{"mean", estimate.mean}, {"standard_error", estimate.standard_error}};
}

json estimate_or_null(const std::optional<MeanEstimate>& estimate) {
  return estimate ? estimate_to_json(*estimate) : json(nullptr);
}

json text_result_to_json(const TextResult& result) {
  return {{"name", result.name},
          {"mode", result.mode},
          {"text", result.text},
          {"windows", result.windows},
          {"perplexity", result.perplexity},
          {"perplexity_rise", result.perplexity_rise},
          {"kl", estimate_to_json(result.kl)}};
}

json passkey_to_json(const PasskeyResult& result) {
  return {{"name", result.name},
          {"mode", result.mode},
          {"context", result.context},
          {"depth", result.depth},
          {"trials", result.trials},
          {"log_probability", estimate_to_json(result.log_probability)},
          {"log_probability_change", estimate_to_json(result.log_probability_change)},
          {"exact_match", estimate_to_json(result.exact_match)}};
}

json prompt_result_to_json(const PromptResult& result) {
  return {
      {"name", result.name},
      {"mode", result.mode},
      {"category", result.category},
      {"prompts", result.prompts},
      {"tokens", result.tokens},
      {"greedy_agreement", estimate_to_json(result.greedy_agreement)},
      {"first_divergence", estimate_to_json(result.first_divergence)},
      {"identical", estimate_to_json(result.identical)},
      {"kl", estimate_to_json(result.kl)},
      {"answers", result.answers},
      {"answer_log_probability", estimate_or_null(result.answer_log_probability)},
      {"answer_log_probability_change", estimate_or_null(result.answer_log_probability_change)}};
}

json prompt_source_to_json(const PromptSource& source) {
  return {{"name", source.name},
          {"sha256", source.sha256},
          {"max_tokens", source.max_tokens},
          {"stop", source.stop}};
}

template <class Result>
json list_to_json(const std::vector<Result>& results, json (*to_json)(const Result&)) {
  json list = json::array();
  for (const Result& result : results) list.push_back(to_json(result));
  return list;
}

json candidate_to_json(const CandidateResult& candidate) {
  const KlStatistics& kl = candidate.kl;
  return {{"name", candidate.name},
          {"mode", candidate.mode},
          {"runtime", candidate.runtime},
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
  json texts = json::array(), gates = json::array();
  for (std::size_t i = 0; i < validation.text_names.size(); ++i) {
    texts.push_back({{"name", validation.text_names[i]}, {"sha256", validation.text_sha256[i]}});
  }
  for (const GateResult& gate : validation.gates) {
    gates.push_back(
        {{"expression", gate.expression}, {"measured", gate.measured}, {"passed", gate.passed}});
  }
  return {
      {"format", kFormat},
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
      {"seed", validation.seed},
      {"runtime", validation.runtime},
      {"program", validation.program},
      {"candidates", list_to_json(validation.candidates, candidate_to_json)},
      {"gates", gates},
      {"by_text", list_to_json(validation.by_text, text_result_to_json)},
      {"passkey", list_to_json(validation.passkey, passkey_to_json)},
      {"prompt_source",
       validation.prompt_source ? prompt_source_to_json(*validation.prompt_source) : json(nullptr)},
      {"prompts", list_to_json(validation.prompts, prompt_result_to_json)}};
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
  candidate.runtime = object.text("runtime");
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

struct Range {
  double least = std::numeric_limits<double>::lowest(), most = std::numeric_limits<double>::max();
};
constexpr Range kShare = {0, 1}, kNotNegative = {.least = 0}, kLogProbability = {.most = 0};

MeanEstimate estimate_from_json(JsonObject object, const Range& range) {
  MeanEstimate estimate;
  estimate.mean = object.number("mean", range.least, range.most);
  estimate.standard_error = object.number("standard_error", 0);
  object.finish();
  return estimate;
}

std::optional<MeanEstimate> estimate_from_json_or_null(std::optional<JsonObject> object,
                                                       const Range& range) {
  if (!object) return std::nullopt;
  return estimate_from_json(std::move(*object), range);
}

TextResult text_result_from_json(JsonObject object) {
  TextResult result;
  result.name = object.text("name");
  result.mode = object.choice("mode", kModes);
  result.text = object.text("text");
  result.windows = object.small_integer("windows", 1);
  result.perplexity = object.number("perplexity", 0);
  result.perplexity_rise = object.number("perplexity_rise", -1);
  result.kl = estimate_from_json(object.object("kl"), {});
  object.finish();
  return result;
}

PasskeyResult passkey_from_json(JsonObject object) {
  PasskeyResult result;
  result.name = object.text("name");
  result.mode = object.choice("mode", kModes);
  result.context = object.small_integer("context", 1);
  result.depth = object.number("depth", 0, 1);
  result.trials = object.small_integer("trials", 1);
  result.log_probability = estimate_from_json(object.object("log_probability"), kLogProbability);
  result.log_probability_change = estimate_from_json(object.object("log_probability_change"), {});
  result.exact_match = estimate_from_json(object.object("exact_match"), kShare);
  object.finish();
  return result;
}

PromptResult prompt_result_from_json(JsonObject object) {
  PromptResult result;
  result.name = object.text("name");
  result.mode = object.choice("mode", kModes);
  result.category = object.text("category");
  result.prompts = object.small_integer("prompts", 1);
  result.tokens = object.integer("tokens", 1);
  result.greedy_agreement = estimate_from_json(object.object("greedy_agreement"), kShare);
  result.first_divergence = estimate_from_json(object.object("first_divergence"), kNotNegative);
  result.identical = estimate_from_json(object.object("identical"), kShare);
  result.kl = estimate_from_json(object.object("kl"), {});
  result.answers = object.small_integer("answers", 0, result.prompts);
  result.answer_log_probability =
      estimate_from_json_or_null(object.object_or_null("answer_log_probability"), kLogProbability);
  result.answer_log_probability_change =
      estimate_from_json_or_null(object.object_or_null("answer_log_probability_change"), {});
  object.finish();
  return result;
}

PromptSource prompt_source_from_json(JsonObject object) {
  PromptSource source;
  source.name = object.text("name");
  source.sha256 = object.sha256("sha256");
  source.max_tokens = object.small_integer("max_tokens", 1);
  source.stop = object.text("stop");
  object.finish();
  return source;
}

template <class Result>
std::vector<Result> list_from_json(std::vector<JsonObject> objects,
                                   Result (*from_json)(JsonObject)) {
  std::vector<Result> results;
  for (JsonObject& object : objects) results.push_back(from_json(std::move(object)));
  return results;
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
  validation.seed = object.unsigned_integer("seed");
  validation.runtime = object.text("runtime");
  validation.program = object.text("program");
  validation.candidates = list_from_json(object.objects("candidates"), candidate_from_json);
  for (JsonObject& gate : object.objects("gates")) {
    validation.gates.push_back(
        {gate.text("expression"), gate.number("measured"), gate.boolean("passed")});
    gate.finish();
  }
  validation.by_text = list_from_json(object.objects("by_text"), text_result_from_json);
  validation.passkey = list_from_json(object.objects("passkey"), passkey_from_json);
  if (auto source = object.object_or_null("prompt_source"))
    validation.prompt_source = prompt_source_from_json(std::move(*source));
  validation.prompts = list_from_json(object.objects("prompts"), prompt_result_from_json);
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
  json document = read_document(file.string());
  migrate_validation(document);
  return validation_from_json(document, file.string());
}

}  // namespace kvplan
