#include "studies/model_lab.h"

#include <algorithm>
#include <map>
#include <optional>
#include <span>
#include <tuple>

#include "calib/profiler.h"
#include "evaluation/evaluation_state.h"
#include "evaluation/passkey.h"
#include "evaluation/prompts.h"
#include "planner/allocator.h"
#include "planner/budget.h"
#include "planner/policies.h"
#include "quant/baselines.h"
#include "quant/codec.h"
#include "quant/fit.h"
#include "quant/moments.h"
#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/sha256.h"

namespace kvplan::studies {
namespace {

namespace fs = std::filesystem;

constexpr int kSinks = 4;
constexpr int kPageTokens = 64;
constexpr const char* kProgram = "kvplan study";
/// Candidates that share a reference pass. Finished batches survive an interruption whatever is
/// asked for next.
constexpr std::size_t kBatch = 16;

/// Positions window/4 .. window-2 (evaluation/evaluator.h).
std::int64_t scored_positions(int window) { return window - 1 - window / 4; }

template <class Fields>
void require_profile_of(const Fields& expected, const Fields& found, const fs::path& folder) {
  if (found != expected)
    throw EnvironmentError(folder.string(),
                           "holds a profile of another text, window or seed; choose another folder "
                           "or remove it");
}

LabScores figures(const PlanBundle& bundle, evaluation::EvaluationState state,
                  const evaluation::EvaluateOptions& options) {
  CandidateResult result =
      evaluation::summarise(state.passes.front(), state.reference_nll, nullptr, options);
  return {.effective_bits = quant::measured_effective_bits(bundle),
          .perplexity = result.perplexity,
          .perplexity_rise = result.perplexity_rise,
          .perplexity_rise_interval = result.perplexity_rise_interval,
          .kl = result.kl,
          .same_top1 = result.same_top1,
          .kl_by_position = std::move(result.kl_by_position),
          .tokens = std::move(state.passes.front())};
}

std::vector<evaluation::Candidate> candidates_of(const ModelLab::NamedBundles& bundles) {
  std::vector<evaluation::Candidate> candidates;
  for (const auto& [name, bundle] : bundles) candidates.push_back({name, &bundle});
  return candidates;
}

}  // namespace

struct ModelLab::Impl {
  const models::ModelReader& model;
  std::vector<tokenizers::TextWindow> calibration;
  std::vector<ProfileSource> sources;
  std::vector<tokenizers::TextWindow> held_out;
  Options options;
  RunControl control;

  std::vector<std::string> window_hashes;  // of held_out
  std::vector<double> inv_freq;
  std::map<std::string, LabScores> scores;   // by key
  std::map<std::uint64_t, quant::Fit> fits;  // by seed
  std::optional<Profile> profile;
  std::optional<evaluation::TokenScores> reference;
  std::vector<calib::LayerCapture> capture;

  std::int64_t window_count(const Measure& measure) const {
    const std::int64_t all = std::ssize(held_out);
    return measure.windows > 0 ? std::min(measure.windows, all) : all;
  }

  /// Stands for everything that scores depend on; `plan`: plan.json, or empty for the fp16 cache.
  std::string key(const std::string& plan, const Measure& measure) const {
    std::string text = std::string(kProgram) + " scores 1\n" + model.spec().kv_weights_sha256 +
                       "\n" + forward::weight_type_name(options.weights) + "\n" + measure.mode +
                       "\n";
    for (std::int64_t w = 0; w < window_count(measure); ++w)
      text += window_hashes[static_cast<std::size_t>(w)] + "\n";
    return sha256(text + plan);
  }

  evaluation::EvaluateOptions evaluate_options(const Measure& measure) const {
    evaluation::EvaluateOptions evaluate;
    evaluate.window = options.window;
    evaluate.modes = {measure.mode};
    evaluate.threads = options.threads;
    evaluate.weights = options.weights;
    evaluate.bootstrap_seed = options.seed;
    return evaluate;
  }

  fs::path score_file(const std::string& score_key) const {
    return options.folder / "scores" / (score_key + ".safetensors");
  }

  /// What was measured before under a key, by this lab or another of the same folder.
  std::optional<evaluation::EvaluationState> stored(const std::string& score_key,
                                                    std::size_t passes,
                                                    const Measure& measure) const {
    evaluation::EvaluationState state(passes, scored_positions(options.window));
    evaluation::resume_state(state, score_key, score_file(score_key));
    if (state.windows() != window_count(measure)) return std::nullopt;
    return state;
  }

  evaluation::EvaluationState measured(const std::vector<evaluation::Candidate>& candidates,
                                       const Measure& measure) const {
    auto evaluate = evaluate_options(measure);
    make_folder(options.folder / "scores");
    evaluate.partial_file = options.folder / "scores" / "partial.safetensors";
    const std::vector<tokenizers::TextWindow> windows(held_out.begin(),
                                                      held_out.begin() + window_count(measure));
    auto state = evaluation::score_tokens(model, windows, candidates, evaluate, control);
    fs::remove(evaluate.partial_file);
    return state;
  }

  quant::PlanHeader header(const BudgetSpec& budget, const std::string& policy) const {
    quant::PlanHeader header;
    header.budget = budget;
    header.policy = policy;
    header.page_tokens = kPageTokens;
    header.profile_sha256 = profile_sha256(options.folder / "profile");
    header.program = kProgram;
    return header;
  }

  planner::CacheGeometry geometry() const {
    return {.elements = elements_per_token(model.spec()),
            .context = options.window,
            .batch = 1,
            .sink_tokens = kSinks,
            .page_tokens = kPageTokens};
  }

  quant::FitOptions fit_options(const std::string& codec) const {
    quant::FitOptions fit = quant::default_fit_options(codec);
    fit.context = options.window;
    fit.threads = options.threads;
    return fit;
  }
};

ModelLab::ModelLab(const models::ModelReader& model,
                   std::vector<tokenizers::TextWindow> calibration,
                   std::vector<ProfileSource> calibration_sources,
                   std::vector<tokenizers::TextWindow> held_out, Options options,
                   const RunControl& control)
    : impl_(new Impl{.model = model,
                     .calibration = std::move(calibration),
                     .sources = std::move(calibration_sources),
                     .held_out = std::move(held_out),
                     .options = std::move(options),
                     .control = control,
                     .window_hashes = {},
                     .inv_freq = models::rotary_frequencies(model.config()),
                     .scores = {},
                     .fits = {},
                     .profile = {},
                     .reference = {},
                     .capture = {}}) {
  const Options& given = impl_->options;
  if (given.folder.empty())
    throw ArgumentError("studies of a model need a folder that keeps the profile and the scores");
  if (impl_->held_out.empty() || impl_->calibration.empty())
    throw ArgumentError(
        "studies of a model need text to calibrate on and text to score on; found " +
        std::to_string(impl_->calibration.size()) + " and " +
        std::to_string(impl_->held_out.size()) + " windows");
  const std::int64_t wanted = std::max<std::int64_t>(1, given.calibration_tokens / given.window);
  if (wanted < std::ssize(impl_->calibration))
    impl_->calibration.resize(static_cast<std::size_t>(wanted));
  for (const auto& window : impl_->held_out)
    impl_->window_hashes.push_back(sha256(std::as_bytes(std::span(window.tokens))));
}

ModelLab::~ModelLab() = default;

const models::ModelReader& ModelLab::model() const { return impl_->model; }
const ModelSpec& ModelLab::spec() const { return impl_->model.spec(); }
const std::vector<tokenizers::TextWindow>& ModelLab::held_out() const { return impl_->held_out; }

const evaluation::TokenScores& ModelLab::reference_nll() const {
  if (!impl_->reference) {
    const Measure all;
    const std::string key = impl_->key("", all);
    auto state = impl_->stored(key, 0, all);
    if (!state) {
      state = impl_->measured({}, all);
      evaluation::save_state(*state, key, impl_->score_file(key));
    }
    impl_->reference = std::move(state->reference_nll);
  }
  return *impl_->reference;
}

const Profile& ModelLab::profile() {
  if (impl_->profile) return *impl_->profile;
  const fs::path folder = impl_->options.folder / "profile";
  if (!fs::exists(folder / "profile.json")) {
    calib::ProfileOptions options;
    options.window = impl_->options.window;
    options.sink_tokens = kSinks;
    options.seed = impl_->options.seed;
    options.threads = impl_->options.threads;
    options.weights = impl_->options.weights;
    options.program = kProgram;
    impl_->profile = calib::run_profile(impl_->model, impl_->calibration, impl_->sources, options,
                                        folder, impl_->control);
    return *impl_->profile;
  }
  Profile found = read_profile(folder);
  require_same_model(spec(), found.model, (folder / "profile.json").string());
  std::vector<ProfileWindow> windows;
  for (const auto& window : impl_->calibration)
    windows.push_back({window.index, std::ssize(window.tokens), window.source});
  std::ranges::sort(windows, {}, &ProfileWindow::index);
  require_profile_of(std::tie(impl_->options.window, impl_->options.seed, windows, impl_->sources),
                     std::tie(found.window, found.seed, found.windows, found.sources), folder);
  impl_->profile = std::move(found);
  return *impl_->profile;
}

const LabScores& ModelLab::scores(const std::string& name, const PlanBundle& bundle,
                                  const Measure& measure) {
  prepare({{name, bundle}}, measure);
  return impl_->scores.at(impl_->key(plan_json(bundle), measure));
}

void ModelLab::prepare(const NamedBundles& bundles, const Measure& measure) {
  const auto options = impl_->evaluate_options(measure);
  std::map<std::string, const std::pair<std::string, PlanBundle>*> missing;  // by key
  for (const auto& named : bundles) {
    const std::string key = impl_->key(plan_json(named.second), measure);
    if (impl_->scores.contains(key)) continue;
    if (auto state = impl_->stored(key, 1, measure)) {
      impl_->scores.emplace(key, figures(named.second, std::move(*state), options));
    } else {
      missing.emplace(key, &named);
    }
  }
  for (auto next = missing.begin(); next != missing.end();) {
    std::vector<std::string> keys;
    std::vector<evaluation::Candidate> candidates;
    for (; next != missing.end() && keys.size() < kBatch; ++next) {
      const auto& [key, named] = *next;
      keys.push_back(key);
      // The beginning of the key keeps names apart that studies gave twice.
      candidates.push_back({named->first + " (" + key.substr(0, 8) + ")", &named->second});
    }
    evaluation::EvaluationState batch = impl_->measured(candidates, measure);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      evaluation::EvaluationState one(1, batch.reference_nll.scored);
      one.reference_nll = batch.reference_nll;
      one.passes.front() = std::move(batch.passes[i]);
      evaluation::save_state(one, keys[i], impl_->score_file(keys[i]));
      impl_->scores.emplace(keys[i], figures(*candidates[i].bundle, std::move(one), options));
    }
  }
}

PlanBundle ModelLab::baseline(const std::string& name, std::uint64_t rotation_seed) {
  return quant::baseline_plan(name, spec(), kSinks, impl_->options.window, rotation_seed,
                              impl_->inv_freq, &profile());
}

PlanBundle ModelLab::only(const PlanBundle& bundle,
                          const std::function<bool(int layer, Side side)>& keep) {
  if (bundle.plan.codec != "calibrated" && bundle.plan.codec != "rotated")
    throw ArgumentError("layers can be left at fp16 in calibrated and rotated plans, not in " +
                        bundle.plan.codec);
  PlanBundle partial = bundle;
  Plan& plan = partial.plan;
  for (LayerPlan& layer : plan.layers)
    for (const Side side : kSides)
      if (!keep(layer.index, side)) {
        layer.side(side).bits = kFp16Width;
        for (HeadPlan& head : layer.side(side).heads) {
          std::ranges::fill(head.widths, kFp16Width);
          head.outliers.clear();
        }
      }
  plan.predicted_kl = 0;
  plan.effective_bits = quant::measured_effective_bits(partial);
  return partial;
}

PlanBundle ModelLab::plan(double bits, std::uint64_t seed) {
  auto fit = impl_->fits.find(seed);
  if (fit == impl_->fits.end()) {
    quant::FitOptions options = impl_->fit_options("calibrated");
    options.seed = seed;
    fit = impl_->fits.emplace(seed, quant::Fit(profile(), options)).first;
  }
  const auto header = impl_->header({"bits", bits}, "fisher");
  const auto geometry = impl_->geometry();
  const CostTable& costs = fit->second.costs();
  PlanBundle bundle = fit->second.assemble(
      planner::allocate(costs, planner::budget_bits(header.budget, geometry)), header);
  bundle.plan.effective_bits_at_context =
      planner::effective_bits_at_context(bundle.plan.effective_bits, geometry);
  return bundle;
}

PlanBundle ModelLab::outlier_plan() {
  constexpr int kBits = 3;
  const auto channels = planner::outlier83_channels(
      profile().summary, quant::key_channel_rms(profile()), spec().kv_heads, spec().head_dim);
  std::vector<quant::Fit::LayerWidths> widths;
  for (const auto& layer : channels)
    widths.push_back({.k = kBits, .v = kBits, .outliers_k = layer, .outliers_v = {}});
  const quant::Fit fit(profile(), impl_->fit_options("rotated"));
  return fit.assemble(widths, impl_->header({"none", 0}, "outlier83"));
}

std::vector<PasskeyResult> ModelLab::passkey(const NamedBundles& bundles) {
  const Options& given = impl_->options;
  if (!given.tokenizer) return {};
  tokenizers::TokenSource haystack;
  haystack.info.name = "held-out windows";
  for (const auto& window : held_out())
    haystack.tokens.insert(haystack.tokens.end(), window.tokens.begin(), window.tokens.end());
  evaluation::PasskeyOptions options;
  options.contexts = {given.window};
  options.depths = {0, .5, 1};
  options.seed = given.seed;
  const auto tasks =
      evaluation::make_passkey_tasks(model().config(), *given.tokenizer, {haystack}, options);
  return evaluation::check_passkey(model(), tasks, candidates_of(bundles),
                                   impl_->evaluate_options({}), impl_->control);
}

std::vector<PromptResult> ModelLab::continuations(const NamedBundles& bundles, std::size_t prompts,
                                                  int tokens) {
  constexpr std::size_t kPromptTokens = 64;
  evaluation::PromptSet set;
  set.source.max_tokens = tokens;
  for (const auto& window : held_out()) {
    if (set.prompts.size() == prompts) break;
    evaluation::Prompt& prompt = set.prompts.emplace_back();
    prompt.where = "window " + std::to_string(window.index);
    prompt.tokens = window.tokens;
    prompt.tokens.resize(std::min(kPromptTokens, window.tokens.size()));
  }
  return evaluation::check_prompts(model(), set, candidates_of(bundles),
                                   impl_->evaluate_options({}), impl_->control);
}

const std::vector<calib::LayerCapture>& ModelLab::capture() {
  if (impl_->capture.empty())
    impl_->capture =
        calib::capture_window(impl_->model, impl_->held_out.front(), impl_->options.threads);
  return impl_->capture;
}

}  // namespace kvplan::studies
