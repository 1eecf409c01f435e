#include "schemas/plan.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>
#include <utility>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/json_fields.h"
#include "schemas/migrations.h"
#include "schemas/model_json.h"
#include "schemas/plan_tensors.h"
#include "schemas/sha256.h"
#include "schemas/source_json.h"

namespace kvplan {
namespace {

using nlohmann::json;

constexpr std::string_view kFormat = "kvplan.plan";
constexpr std::int64_t kVersion = 1;
constexpr const char* kTensorsFile = "plan.safetensors";

constexpr int kMaxWidth = 8;
constexpr int kMaxRounds = 64;
constexpr double kMaxEffectiveBits =
    32;  // 16 for fp16, more only for a few bits of payload under large side information
constexpr double kShareTolerance = 1e-6;

constexpr std::array<std::string_view, 5> kBudgetKinds = {"bits", "bytes_per_token", "gib",
                                                          "max_kl", "none"};
constexpr auto kCodecs = std::to_array<std::string_view>(
    {"calibrated", "rotated", "kivi", "int", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl",
     "fp8_e4m3", "fp8_e5m2", "nvfp4", "mxfp4", "fp16"});
constexpr std::array<std::string_view, 4> kCodes = {"scalar", "tcq", "polar", "polar_edge"};
constexpr std::array<std::string_view, 4> kCodebooks = {"lloyd_max", "lloyd_max_beta",
                                                        "lloyd_max_byte", "uniform"};
constexpr std::array<std::string_view, 4> kScaleRules = {"one", "norm_corrected", "biased",
                                                         "unbiased"};
constexpr std::array<std::string_view, 3> kNorms = {"log8", "fp16", "fp16_std"};
constexpr std::array<std::string_view, 4> kRotations = {"none", "hadamard", "signed_hadamard",
                                                        "haar"};
constexpr std::array<std::string_view, 2> kRotationScopes = {"model", "head"};
constexpr std::array<std::string_view, 3> kRotationSides = {"k", "v", "kv"};
constexpr std::array<std::string_view, 4> kSketches = {"none", "gaussian", "rademacher",
                                                       "orthogonal"};
constexpr std::array<std::string_view, 2> kOutlierCodes = {"absmax", "rotated"};
constexpr int kMaxSketchRows = 1 << 13;
constexpr int kMaxSinkTokens = 1 << 16;
constexpr int kMaxPageTokens = 1 << 16;
constexpr std::array<std::string_view, 2> kLayerKinds = {"full", "sliding"};

json optional_number(const std::optional<double>& number) {
  return number ? json(*number) : json(nullptr);
}

json side_to_json(const SidePlan& side) {
  json heads = json::array();
  for (const HeadPlan& head : side.heads)
    heads.push_back({{"widths", head.widths}, {"outliers", head.outliers}});
  json out = {{"bits", side.bits}, {"heads", heads}};
  if (!side.codec.empty()) out["codec"] = side.codec;
  return out;
}

/// Nobody predicted anything for an imported plan.
json prediction(const Plan& plan, double value) {
  return plan.origin ? json(nullptr) : json(value);
}

json layer_to_json(const LayerPlan& layer, const Plan& plan) {
  return {{"index", layer.index},
          {"kind", layer.kind},
          {"predicted_kl_share", prediction(plan, layer.predicted_kl_share)},
          {"rotated_cost",
           {{"k", optional_number(layer.rotated_cost_k)},
            {"v", optional_number(layer.rotated_cost_v)}}},
          {"k", side_to_json(layer.k)},
          {"v", side_to_json(layer.v)}};
}

json plan_to_json(const Plan& plan, const std::string& tensors_sha256) {
  json layers = json::array();
  for (const LayerPlan& layer : plan.layers) layers.push_back(layer_to_json(layer, plan));
  json front = json::array();
  for (const FrontPoint& point : plan.front) {
    front.push_back(
        {{"effective_bits", point.effective_bits}, {"predicted_kl", point.predicted_kl}});
  }
  json trials = json::array();
  for (const PlanTrial& trial : plan.trials) {
    trials.push_back({{"name", trial.name},
                      {"kl", trial.kl},
                      {"worst_fold_kl", trial.worst_fold_kl},
                      {"perplexity_rise", trial.perplexity_rise},
                      {"held_out_kl", trial.held_out_kl},
                      {"held_out_perplexity_rise", trial.held_out_perplexity_rise},
                      {"chosen", trial.chosen}});
  }
  json sources = json::array();
  for (const ProfileSource& source : plan.provenance.sources)
    sources.push_back(source_to_json(source));
  json codebooks = json::object();
  for (const auto& [width, name] : plan.codebooks) codebooks[std::to_string(width)] = name;
  json out = {{"format", kFormat},
              {"version", kVersion},
              {"model", model_to_json(plan.model)},
              {"context", plan.context},
              {"sink_tokens", plan.sink_tokens},
              {"page_tokens", plan.page_tokens},
              {"window", plan.window},
              {"seed", plan.seed},
              {"budget", {{"kind", plan.budget.kind}, {"value", plan.budget.value}}},
              {"effective_bits", plan.effective_bits},
              {"effective_bits_at_context", plan.effective_bits_at_context},
              {"bytes_per_token", plan.bytes_per_token},
              {"static_bytes", plan.static_bytes},
              {"policy", plan.policy},
              {"codec", plan.codec},
              {"code", plan.code},
              {"codebooks", codebooks},
              {"group_size", plan.group_size},
              {"scale_rule", plan.scale_rule},
              {"norm", plan.norm},
              {"centre", plan.centre},
              {"rotation",
               {{"kind", plan.rotation.kind},
                {"rounds", plan.rotation.rounds},
                {"scope", plan.rotation.scope},
                {"seed", plan.rotation.seed},
                {"sides", plan.rotation.sides}}},
              {"variant",
               {{"sketch", plan.variant.sketch},
                {"sketch_rows", plan.variant.sketch_rows},
                {"sketch_sides", plan.variant.sketch_sides},
                {"outlier_code", plan.variant.outlier_code},
                {"outlier_bits", plan.variant.outlier_bits},
                {"norm_block", plan.variant.norm_block}}},
              {"predicted_kl", prediction(plan, plan.predicted_kl)},
              {"layers", layers},
              {"front", front},
              {"trials", trials},
              {"provenance",
               {{"profile_sha256", text_or_null(plan.provenance.profile_sha256)},
                {"program", plan.provenance.program},
                {"calibration_tokens", plan.provenance.calibration_tokens},
                {"sources", sources}}},
              {"tensors", {{"file", kTensorsFile}, {"sha256", tensors_sha256}}}};
  if (plan.origin)
    out["origin"] = {{"file_sha256", plan.origin->file_sha256}, {"tool", plan.origin->tool}};
  return out;
}

HeadPlan head_from_json(JsonObject object, const Plan& plan) {
  HeadPlan head;
  head.widths = object.integers("widths", 0, kFp16Width);
  const auto groups = static_cast<std::size_t>(plan.model.head_dim / plan.group_size);
  if (head.widths.size() != groups) {
    object.refuse("widths", "expected " + std::to_string(groups) +
                                " widths (head_dim / group_size), found " +
                                std::to_string(head.widths.size()));
  }
  const bool fp16 = head.widths.front() == kFp16Width;
  for (const int width : head.widths) {
    if (fp16 ? width != kFp16Width : width > kMaxWidth) {
      object.refuse("widths",
                    "expected widths of 0..8 bits, or 16 (fp16) for the whole head, found " +
                        std::to_string(width));
    }
  }
  if (!std::is_sorted(head.widths.rbegin(), head.widths.rend())) {
    object.refuse("widths", "expected descending widths (storage order)");
  }
  head.outliers = object.integers("outliers", 0, plan.model.head_dim - 1);
  if (!head.outliers.empty() && plan.codec != "rotated") {
    object.refuse("outliers", "only the rotated codec has outlier channels, found some under \"" +
                                  plan.codec + "\"");
  }
  if (std::adjacent_find(head.outliers.begin(), head.outliers.end(), std::greater_equal<>()) !=
      head.outliers.end()) {
    object.refuse("outliers", "expected ascending channels, each once");
  }
  object.finish();
  return head;
}

bool stored_as_fp16(const HeadPlan& head) { return head.widths.front() == kFp16Width; }

SidePlan side_from_json(JsonObject object, const Plan& plan) {
  SidePlan side;
  side.bits = object.number("bits", 0, kFp16Width);
  for (JsonObject& head : object.objects("heads"))
    side.heads.push_back(head_from_json(std::move(head), plan));
  if (object.has("codec")) side.codec = object.text("codec");
  if (side.heads.size() != static_cast<std::size_t>(plan.model.kv_heads)) {
    object.refuse("heads", "expected one entry for each of " + std::to_string(plan.model.kv_heads) +
                               " KV heads, found " + std::to_string(side.heads.size()));
  }
  const auto fp16_heads = std::count_if(side.heads.begin(), side.heads.end(), stored_as_fp16);
  if (fp16_heads != 0 && fp16_heads != plan.model.kv_heads) {
    object.refuse("heads", "expected width 16 (fp16) for all heads of the side or for none");
  }
  object.finish();
  return side;
}

/// A number, or null in imported plans, where it reads as 0.
double prediction_from_json(JsonObject& object, const std::string& name, const Plan& plan,
                            double most) {
  if (plan.origin && !object.number_or_null(name, 0)) return 0;
  return object.number(name, 0, most);
}

LayerPlan layer_from_json(JsonObject object, const Plan& plan, int index) {
  LayerPlan layer;
  layer.index = object.small_integer("index", index, index);
  layer.kind = object.choice("kind", kLayerKinds);
  if (index < plan.model.num_layers && layer.kind != layer_kind(plan.model, index))
    object.refuse("kind", std::string("expected ") + layer_kind(plan.model, index) +
                              ", as the model's windows say, found " + layer.kind);
  layer.predicted_kl_share =
      prediction_from_json(object, "predicted_kl_share", plan, 1 + kShareTolerance);
  JsonObject cost = object.object("rotated_cost");
  layer.rotated_cost_k = cost.number_or_null("k", 0);
  layer.rotated_cost_v = cost.number_or_null("v", 0);
  cost.finish();
  layer.k = side_from_json(object.object("k"), plan);
  layer.v = side_from_json(object.object("v"), plan);
  object.finish();
  return layer;
}

std::map<int, std::string> codebooks_from_json(JsonObject object) {
  std::map<int, std::string> codebooks;
  for (const std::string& width : object.names()) {
    const bool valid = width.size() == 1 && width[0] >= '1' && width[0] <= '0' + kMaxWidth;
    if (!valid) object.refuse(width, "expected a width of 1..8 bits");
    codebooks.emplace(width[0] - '0', object.choice(width, kCodebooks));
  }
  return codebooks;
}

RotationSpec rotation_from_json(JsonObject object) {
  RotationSpec rotation;
  rotation.kind = object.choice("kind", kRotations);
  rotation.rounds = object.small_integer("rounds", 1, kMaxRounds);
  rotation.scope = object.choice("scope", kRotationScopes);
  rotation.seed = object.unsigned_integer("seed");
  rotation.sides = object.choice("sides", kRotationSides);
  object.finish();
  return rotation;
}

RotatedVariant variant_from_json(JsonObject object, const Plan& plan) {
  RotatedVariant variant;
  variant.sketch = object.choice("sketch", kSketches);
  variant.sketch_rows = object.small_integer("sketch_rows", 0, kMaxSketchRows);
  if ((variant.sketch == "none") != (variant.sketch_rows == 0))
    object.refuse("sketch_rows", "expected rows with a sketch and 0 without, found " +
                                     std::to_string(variant.sketch_rows) + " under sketch \"" +
                                     variant.sketch + "\"");
  variant.sketch_sides = object.choice("sketch_sides", kRotationSides);
  variant.outlier_code = object.choice("outlier_code", kOutlierCodes);
  variant.outlier_bits = object.small_integer("outlier_bits", 1, kMaxWidth);
  variant.norm_block = object.small_integer("norm_block", 0, plan.model.head_dim);
  if (variant.norm_block > 0 && plan.model.head_dim % variant.norm_block != 0)
    object.refuse("norm_block", "expected 0 or a divisor of head_dim " +
                                    std::to_string(plan.model.head_dim) + ", found " +
                                    std::to_string(variant.norm_block));
  if (plan.codec != "rotated" && variant != RotatedVariant{})
    object.refuse("",
                  "only the rotated codec has variants, found some under \"" + plan.codec + "\"");
  object.finish();
  return variant;
}

PlanTrial trial_from_json(JsonObject object) {
  PlanTrial trial;
  trial.name = object.text("name");
  trial.kl = object.number("kl");
  trial.worst_fold_kl = object.number("worst_fold_kl");
  trial.perplexity_rise = object.number("perplexity_rise", -1);
  trial.held_out_kl = object.number("held_out_kl");
  trial.held_out_perplexity_rise = object.number("held_out_perplexity_rise", -1);
  trial.chosen = object.boolean("chosen");
  object.finish();
  return trial;
}

PlanOrigin origin_from_json(JsonObject object) {
  PlanOrigin origin;
  origin.file_sha256 = object.sha256("file_sha256");
  origin.tool = object.text("tool");
  object.finish();
  return origin;
}

PlanProvenance provenance_from_json(JsonObject object) {
  PlanProvenance provenance;
  provenance.profile_sha256 = object.sha256_or_null("profile_sha256");
  provenance.program = object.text("program");
  provenance.calibration_tokens = object.integer("calibration_tokens");
  for (JsonObject& source : object.objects("sources"))
    provenance.sources.push_back(source_from_json(std::move(source)));
  object.finish();
  return provenance;
}

/// Widths of codebook codecs that no codebook is named for cannot be decoded.
void require_codebooks(const JsonObject& object, const Plan& plan) {
  if (plan.codec != "calibrated" && plan.codec != "rotated") return;
  for (const LayerPlan& layer : plan.layers) {
    for (const Side side : kSides) {
      for (const HeadPlan& head : layer.side(side).heads) {
        for (const int width : head.widths) {
          if (width == 0 || width == kFp16Width || plan.codebooks.contains(width)) continue;
          object.refuse("codebooks", "no codebook for width " + std::to_string(width) +
                                         ", used in layer " + std::to_string(layer.index) +
                                         " side " + side_name(side));
        }
      }
    }
  }
}

struct PlanDocument {
  Plan plan;
  std::string tensors_sha256;
};

PlanDocument plan_from_json(const json& document, const std::string& file) {
  JsonObject object(document, file);
  object.require_format(kFormat, kVersion);
  PlanDocument out;
  Plan& plan = out.plan;
  plan.model = model_from_json(object.object("model"));
  plan.context = object.integer("context");
  plan.sink_tokens = object.small_integer("sink_tokens", 0, kMaxSinkTokens);
  plan.page_tokens = object.small_integer("page_tokens", 1, kMaxPageTokens);
  plan.window = object.small_integer("window", 0);
  plan.seed = object.unsigned_integer("seed");
  JsonObject budget = object.object("budget");
  plan.budget.kind = budget.choice("kind", kBudgetKinds);
  plan.budget.value = budget.number("value", 0);
  budget.finish();
  plan.effective_bits = object.number("effective_bits", 0, kMaxEffectiveBits);
  plan.effective_bits_at_context = object.number("effective_bits_at_context", 0, kMaxEffectiveBits);
  plan.bytes_per_token = object.integer("bytes_per_token");
  plan.static_bytes = object.integer("static_bytes");
  plan.policy = object.text("policy");
  plan.codec = object.choice("codec", kCodecs);
  plan.code = object.choice("code", kCodes);
  plan.codebooks = codebooks_from_json(object.object("codebooks"));
  plan.group_size = object.small_integer("group_size", 1, plan.model.head_dim);
  if (plan.model.head_dim % plan.group_size != 0) {
    object.refuse("group_size", "expected a divisor of head_dim " +
                                    std::to_string(plan.model.head_dim) + ", found " +
                                    std::to_string(plan.group_size));
  }
  plan.scale_rule = object.choice("scale_rule", kScaleRules);
  plan.norm = object.choice("norm", kNorms);
  plan.centre = object.boolean("centre");
  plan.rotation = rotation_from_json(object.object("rotation"));
  plan.variant = variant_from_json(object.object("variant"), plan);
  if (object.has("origin")) plan.origin = origin_from_json(object.object("origin"));
  plan.predicted_kl =
      prediction_from_json(object, "predicted_kl", plan, std::numeric_limits<double>::max());
  for (JsonObject& layer : object.objects("layers")) {
    plan.layers.push_back(
        layer_from_json(std::move(layer), plan, static_cast<int>(plan.layers.size())));
  }
  if (plan.layers.size() != static_cast<std::size_t>(plan.model.num_layers)) {
    object.refuse("layers", "expected " + std::to_string(plan.model.num_layers) +
                                " layers, found " + std::to_string(plan.layers.size()));
  }
  require_codebooks(object, plan);
  for (JsonObject& point : object.objects("front")) {
    plan.front.push_back(
        {point.number("effective_bits", 0, kMaxEffectiveBits), point.number("predicted_kl", 0)});
    point.finish();
  }
  for (JsonObject& trial : object.objects("trials"))
    plan.trials.push_back(trial_from_json(std::move(trial)));
  plan.provenance = provenance_from_json(object.object("provenance"));
  JsonObject tensors = object.object("tensors");
  constexpr std::array<std::string_view, 1> kFiles = {
      kTensorsFile};  // a fixed name cannot lead out of the folder
  tensors.choice("file", kFiles);
  out.tensors_sha256 = tensors.sha256("sha256");
  tensors.finish();
  object.finish();
  return out;
}

/// The text of plan.json. What the reader would refuse is never written: InternalError.
std::string checked_text(const PlanBundle& bundle, const std::string& tensors_sha256) {
  const json document = plan_to_json(bundle.plan, tensors_sha256);
  try {
    plan_from_json(document, "plan.json");
  } catch (const InputError& error) {
    throw InternalError(std::string("plan not written: ") + error.what());
  }
  return document_text(document);
}

}  // namespace

std::string plan_json(const PlanBundle& bundle) {
  return checked_text(bundle, collect_plan_tensors(bundle).sha256());
}

void write_plan(const PlanBundle& bundle, const std::filesystem::path& folder, bool force) {
  const SafetensorsWriter tensors = collect_plan_tensors(bundle);
  const std::string text = checked_text(bundle, tensors.sha256());
  std::error_code error;
  if (std::filesystem::exists(folder, error)) {
    if (!force)
      throw EnvironmentError(folder.string(), "exists already; take another folder or --force");
    make_folder(folder);
    tensors.write(folder / kTensorsFile);
    write_file_atomically(folder / "plan.json", text);
    return;
  }
  // A new folder appears under its name only once it is complete.
  const std::filesystem::path target = folder.has_filename() ? folder : folder.parent_path();
  const std::filesystem::path temporary = target.string() + ".tmp-" + std::to_string(::getpid());
  make_folder(temporary);
  try {
    tensors.write(temporary / kTensorsFile);
    write_file_atomically(temporary / "plan.json", text);
    std::filesystem::rename(temporary, target, error);
    if (error)
      throw EnvironmentError(folder.string(),
                             "cannot rename the temporary folder: " + error.message());
  } catch (...) {
    std::filesystem::remove_all(temporary, error);
    throw;
  }
}

PlanBundle read_plan(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::path file =
      std::filesystem::is_directory(path, error) ? path / "plan.json" : path;
  const std::string text = read_text_file(file, kMaxDocumentBytes);
  json parsed = parse_json(text, file.string(), kMaxDocumentDepth);
  migrate_plan(parsed);
  PlanDocument document = plan_from_json(parsed, file.string());
  PlanBundle bundle;
  bundle.plan = std::move(document.plan);
  bundle.tensors =
      read_plan_tensors(bundle.plan, file.parent_path() / kTensorsFile, document.tensors_sha256);
  bundle.sha256 = sha256(text);
  return bundle;
}

}  // namespace kvplan
