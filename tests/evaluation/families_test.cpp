// From a checkpoint of each family to the validation of its plan.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "calib/profiler.h"
#include "evaluation/evaluator.h"
#include "quant/fit.h"
#include "quant/random.h"
#include "tests/models/fixtures.h"
#include "tests/temporary_folder.h"

namespace kvplan::evaluation {
namespace {

constexpr int kWindow = 80;  // beyond the windows and original contexts; one page of 64 and more
constexpr int kSinks = 2;

std::vector<tokenizers::TextWindow> random_windows(std::int64_t first, std::int64_t count,
                                                   int vocab) {
  std::vector<tokenizers::TextWindow> windows;
  for (std::int64_t index = first; index < first + count; ++index) {
    quant::RandomStream draws(4, quant::StreamPurpose::kTest, static_cast<std::uint32_t>(index));
    tokenizers::TextWindow& window = windows.emplace_back(tokenizers::TextWindow{index, 0, {}});
    for (int t = 0; t < kWindow; ++t)
      window.tokens.push_back(
          static_cast<std::int32_t>(draws.next_below(static_cast<std::uint32_t>(vocab))));
  }
  return windows;
}

PlanBundle plan_of(const Profile& profile, int width) {
  quant::FitOptions options = quant::default_fit_options("calibrated");
  options.group_size = 8;
  options.max_width = 8;
  options.context = 256;
  const quant::Fit fit(profile, options);
  const quant::Fit::LayerWidths layer{.k = width, .v = width, .outliers_k = {}, .outliers_v = {}};
  const std::vector layers(static_cast<std::size_t>(profile.model.num_layers), layer);
  return fit.assemble(layers, quant::PlanHeader());
}

class EveryFamily : public models::FixtureTest, public testing::WithParamInterface<const char*> {};

TEST_P(EveryFamily, IsProfiledPlannedAndValidated) {
  const auto model = models::open_model(fixtures() / GetParam());
  const models::ModelConfig& config = model->config();
  const TemporaryFolder folder;
  calib::ProfileOptions how;
  how.window = kWindow;
  how.sink_tokens = kSinks;
  how.coherent_windows = 4;
  how.threads = 1;
  ProfileSource source;
  source.name = "random";
  source.sha256 = std::string(64, '0');
  calib::run_profile(*model, random_windows(0, 8, config.vocab_size), {source}, how,
                     folder.path() / "profile", RunControl{});
  const Profile profile = read_profile(folder.path() / "profile");
  EXPECT_EQ(profile.model.windows, config.windows);
  EXPECT_EQ(profile.model.local_rope, config.local_rope);

  std::vector<PlanBundle> plans;
  for (const int width : {2, 6}) {
    const auto path = folder.path() / ("plan" + std::to_string(width));
    write_plan(plan_of(profile, width), path);
    plans.push_back(read_plan(path));
    require_same_model(plans.back().plan.model, model->spec(), path.string());
    for (const LayerPlan& layer : plans.back().plan.layers) {
      EXPECT_EQ(layer.kind, config.window(layer.index) > 0 ? "sliding" : "full");
      EXPECT_EQ(plans.back().tensors.layers[static_cast<std::size_t>(layer.index)].inv_freq,
                models::rotary_frequencies(config, layer.index, kWindow));
    }
  }
  const std::vector<forward::CacheRuntime> runtimes = {{kSimulation, nullptr},
                                                       forward::reference_runtime("reference")};
  EvaluateOptions options;
  options.window = kWindow;
  options.modes = {"worst", "decode"};
  options.threads = 1;
  options.bootstrap_samples = 10;
  const Validation found =
      evaluate(*model, random_windows(8, 2, config.vocab_size),
               {{"w2", &plans[0], runtimes}, {"w6", &plans[1], runtimes}}, options, RunControl{});
  const auto kl = [&](const std::string& name, const std::string& mode,
                      const std::string& runtime) {
    for (const CandidateResult& c : found.candidates)
      if (c.name == name && c.mode == mode && c.runtime == runtime) return c.kl.mean;
    ADD_FAILURE() << "no result " << name << " " << mode << " " << runtime;
    return std::nan("");
  };
  for (const auto& [mode, runtime] :
       {std::pair{"worst", kSimulation}, {"decode", kSimulation}, {"decode", "reference"}}) {
    SCOPED_TRACE(std::string(mode) + " " + runtime);
    EXPECT_GT(kl("w6", mode, runtime), 0);
    EXPECT_LT(kl("w6", mode, runtime), 0.1 * kl("w2", mode, runtime));
  }
  // Pages hold what the simulation reads; they differ in the fp16 of queries alone.
  EXPECT_NEAR(kl("w2", "decode", "reference") / kl("w2", "decode", kSimulation), 1, 0.02);
}

INSTANTIATE_TEST_SUITE_P(Fixtures, EveryFamily,
                         testing::Values("llama_gqa", "llama_yarn", "llama_dynamic",
                                         "mistral_window", "qwen2_window", "qwen3", "gemma",
                                         "gemma2", "gemma3", "phi2", "phi3", "phi3_longrope",
                                         "gpt2"),
                         [](const auto& row) { return row.param; });

}  // namespace
}  // namespace kvplan::evaluation
