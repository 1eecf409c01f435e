// Studies that need a model, on one of a few kilobytes: their arithmetic by hand, the lab's memory,
// and that every study measures.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <numbers>

#include "quant/baselines.h"
#include "schemas/error.h"
#include "studies/captures.h"
#include "studies/known_models.h"
#include "studies/model_lab.h"
#include "studies/seed_runs.h"
#include "studies/study.h"
#include "tests/models/tiny_model.h"
#include "tests/temporary_folder.h"

namespace kvplan::studies {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

// ---- captures ----

Array<float> array(std::vector<std::int64_t> shape, std::vector<float> values) {
  Array<float> a(std::move(shape));
  EXPECT_EQ(a.data.size(), values.size());
  a.data = std::move(values);
  return a;
}

struct VectorCase {
  const char* name;
  std::array<float, 2> exact, read;
  VectorErrors expected;
};
class VectorErrorTest : public testing::TestWithParam<VectorCase> {};

TEST_P(VectorErrorTest, SeparatesNormAndDirection) {
  const auto& [name, exact, read, expected] = GetParam();
  // A token before it that must not count.
  const auto errors = vector_errors(array({1, 2, 2}, {1, 0, exact[0], exact[1]}),
                                    array({1, 2, 2}, {0, 9, read[0], read[1]}), 1);
  EXPECT_NEAR(errors.relative_mse, expected.relative_mse, 1e-12);
  EXPECT_NEAR(errors.norm_error, expected.norm_error, 1e-12);
  EXPECT_NEAR(errors.norm_bias, expected.norm_bias, 1e-12);
  EXPECT_NEAR(errors.direction_error, expected.direction_error, 1e-12);
}

INSTANTIATE_TEST_SUITE_P(Captures, VectorErrorTest,
                         testing::Values(VectorCase{"exact", {3, 4}, {3, 4}, {0, 0, 0, 0}},
                                         VectorCase{"twice_as_long", {3, 4}, {6, 8}, {1, 1, 1, 0}},
                                         VectorCase{
                                             "half_as_long", {3, 4}, {1.5, 2}, {.25, .5, -.5, 0}},
                                         VectorCase{"turned", {3, 4}, {-4, 3}, {2, 0, 0, 1}},
                                         VectorCase{"nothing_left", {3, 4}, {0, 0}, {1, 1, -1, 1}}),
                         [](const auto& info) { return info.param.name; });

TEST(Captures, ZeroVectorsHaveNoRelativeError) {
  const auto errors =
      vector_errors(array({1, 2, 2}, {0, 0, 3, 4}), array({1, 2, 2}, {1, 1, 6, 8}), 0);
  EXPECT_DOUBLE_EQ(errors.relative_mse, 1);
  const auto zero = array({1, 1, 2}, {0, 0});
  EXPECT_THROW(vector_errors(zero, zero, 0), ArgumentError);
  EXPECT_THROW(vector_errors(zero, array({1, 2}, {0, 0}), 0), ArgumentError);
}

TEST(Captures, ReadBackKeepsTheOrderOfHeadsAndTheSinks) {
  ModelSpec model;
  model.architecture = "llama";
  model.num_layers = 1;
  model.query_heads = model.kv_heads = 2;
  model.head_dim = 8;
  model.rope.style = "none";
  Array<float> x({2, 5, 8});
  for (std::size_t i = 0; i < x.data.size(); ++i) x.data[i] = static_cast<float>(i);
  const auto codec = [&](const char* name) {
    return quant::make_codec(quant::baseline_plan(name, model, 2, 64, 0, {}), 0, Side::kKey);
  };
  EXPECT_EQ(read_back(*codec("fp16"), x, 0), x);

  const Array<float> coarse = read_back(*codec("turboquant:1"), x, 2);
  const auto token_changed = [&](std::size_t head, std::size_t token) {
    const auto at = [&](const Array<float>& a) { return a.row(head).subspan(token * 8, 8); };
    return !std::ranges::equal(at(x), at(coarse));
  };
  for (std::size_t head = 0; head < 2; ++head)
    for (std::size_t token = 0; token < 5; ++token)
      EXPECT_EQ(token_changed(head, token), token >= 2) << head << " " << token;
  EXPECT_THROW(read_back(*codec("fp16"), array({8}, std::vector<float>(8)), 0), ArgumentError);
}

/// Two query heads on one KV head of one channel, two tokens; keys 0 and 1.
calib::LayerCapture two_heads(float q0, float q1) {
  return {array({2, 2, 1}, {q0, q0, q1, q1}), array({1, 2, 1}, {0, 1}), array({1, 2, 1}, {0, 1}),
          array({1, 2, 1}, {2, 2})};
}

TEST(Captures, EqualKeysAttendUniformly) {
  const calib::LayerCapture layer = two_heads(0, 0);
  const auto errors = attention_errors(layer, {layer.k, layer.v}, 1, 1);
  EXPECT_NEAR(errors.entropy, std::numbers::ln2, 1e-12);
  EXPECT_NEAR(errors.stored_entropy, std::numbers::ln2, 1e-12);
  EXPECT_EQ(errors.kl, 0);
  EXPECT_EQ(errors.output_error, 0);
  EXPECT_EQ(errors.group_growth, 1);  // no error: nothing to grow
}

TEST(Captures, WrongKeyMovesAttention) {
  const calib::LayerCapture layer = two_heads(1, 1);
  // Logits 0 and ln 3 in place of 0 and 1.
  const auto errors = attention_errors(
      layer, {array({1, 2, 1}, {0, static_cast<float>(std::log(3))}), layer.v}, 1, 1);
  const double p = 1 / (1 + std::exp(-1.0));
  EXPECT_NEAR(errors.kl, (1 - p) * std::log((1 - p) / .25) + p * std::log(p / .75), 1e-7);
  EXPECT_NEAR(errors.stored_entropy, -.25 * std::log(.25) - .75 * std::log(.75), 1e-7);
  EXPECT_NEAR(errors.output_error, 0, 1e-12);  // both values are 2
}

TEST(Captures, ErrorsOfHeadsAddOrCancel) {
  // Both heads read the same wrong values.
  calib::LayerCapture layer = two_heads(0, 0);
  auto errors = attention_errors(layer, {layer.k, array({1, 2, 1}, {3, 3})}, 1, 1);
  EXPECT_NEAR(errors.output_error, .25, 1e-12);  // 1 in 2, squared
  EXPECT_NEAR(errors.head_correlation, 1, 1e-12);
  EXPECT_NEAR(errors.group_growth, 2, 1e-12);
  // One head sees the first token, the other the second, whose errors are opposite.
  layer = two_heads(-200, 200);
  errors = attention_errors(layer, {layer.k, array({1, 2, 1}, {3, 1})}, 1, 1);
  EXPECT_NEAR(errors.head_correlation, -1, 1e-12);
  EXPECT_NEAR(errors.group_growth, 0, 1e-12);
  EXPECT_THROW(attention_errors(layer, {layer.k, layer.v}, 2, 1), ArgumentError);
}

// ---- seeds, models ----

TEST(SeedRuns, SpreadAndChoice) {
  const Spread s = spread(std::vector<double>{1, 2, 3});
  EXPECT_DOUBLE_EQ(s.mean, 2);
  EXPECT_DOUBLE_EQ(s.sd, 1);
  EXPECT_DOUBLE_EQ(s.cv(), .5);
  EXPECT_EQ(s.min, 1);
  EXPECT_EQ(s.max, 3);
  EXPECT_THROW(spread(std::vector<double>{1}), ArgumentError);

  SeedRuns runs;
  runs.first_kl = {2, 1, 3};
  runs.second_kl = {1, 2.5, 2.5};
  const SeedChoice choice = choose_seed(runs);
  EXPECT_EQ(choice.winner, 1u);
  EXPECT_DOUBLE_EQ(choice.chosen_lead, 1);
  EXPECT_NEAR(choice.held_out_lead, -.5 / std::sqrt(.75), 1e-12);  // worse than the mean there
}

TEST(KnownModels, AreRecognisedByGeometry) {
  ModelSpec spec;
  spec.architecture = "qwen2";
  spec.num_layers = 28;
  spec.query_heads = 12;
  spec.kv_heads = 2;
  spec.head_dim = 128;
  EXPECT_EQ(known_model(spec), "Qwen2.5-1.5B");
  spec.num_layers = 27;
  EXPECT_EQ(known_model(spec), "");
  spec.architecture = "llama";
  spec.num_layers = spec.query_heads = 32;
  spec.kv_heads = 8;
  spec.rope.base = 1e6;  // Mistral-7B
  EXPECT_EQ(known_model(spec), "");
  spec.rope.base = 500000;
  EXPECT_EQ(known_model(spec), "Llama-3.1-8B");
}

// ---- the lab ----

constexpr int kWindow = 64;

std::vector<tokenizers::TextWindow> windows(std::uint32_t first, std::int64_t count) {
  std::vector<tokenizers::TextWindow> all;
  for (std::int64_t w = 0; w < count; ++w) {
    quant::RandomStream stream(3, quant::StreamPurpose::kTest,
                               first + static_cast<std::uint32_t>(w));
    tokenizers::TextWindow window{w, 0, {}};
    for (int t = 0; t < kWindow; ++t)
      window.tokens.push_back(static_cast<std::int32_t>(stream.next_below(50)));
    all.push_back(std::move(window));
  }
  return all;
}

models::ModelConfig lab_config() {
  models::ModelConfig config = models::tiny_config();
  config.head_dim = config.rotary_dim = 32;
  return config;
}

class LabTest : public testing::Test {
 protected:
  ModelLab lab(const RunControl& control = {}, std::uint64_t seed = 0) {
    return {model_,
            windows(0, 4),
            {{.name = "text", .sha256 = std::string(64, '0'), .tokens = 4 * kWindow}},
            windows(100, 2),
            {.window = kWindow,
             .calibration_tokens = 4 * kWindow,
             .threads = 1,
             .seed = seed,
             .folder = folder_.path()},
            control};
  }
  models::TinyModel model_{lab_config(), 1, 2.0};
  TemporaryFolder folder_;
};

TEST_F(LabTest, MoreBitsLoseLess) {
  ModelLab all = lab();
  const LabScores& coarse = all.scores("coarse", all.baseline("turboquant:2"));
  const LabScores& fine = all.scores("fine", all.baseline("turboquant:6"));
  EXPECT_DOUBLE_EQ(coarse.effective_bits, 2.5);  // a norm of 16 bits in 32 channels
  EXPECT_GT(coarse.kl.mean, 4 * fine.kl.mean);
  EXPECT_GT(fine.kl.mean, 0);
  EXPECT_EQ(coarse.tokens.kl.windows, 2);
  EXPECT_EQ(coarse.tokens.kl.scored, kWindow - 1 - kWindow / 4);
  EXPECT_EQ(all.reference_nll().values.size(), coarse.tokens.kl.values.size());
  const LabScores& one = all.scores("coarse", all.baseline("turboquant:2"), {.windows = 1});
  EXPECT_EQ(one.tokens.kl.windows, 1);
  EXPECT_EQ(one.tokens.kl.values.front(), coarse.tokens.kl.values.front());
}

TEST_F(LabTest, LayersAtFp16LoseNothing) {
  ModelLab all = lab();
  const PlanBundle whole = all.baseline("turboquant:2");
  const PlanBundle none = ModelLab::only(whole, [](int, Side) { return false; });
  EXPECT_EQ(all.scores("none", none).kl.max, 0);
  EXPECT_EQ(none.plan.effective_bits, 16);
  const PlanBundle keys =
      ModelLab::only(whole, [](int layer, Side side) { return layer == 1 && side == Side::kKey; });
  EXPECT_DOUBLE_EQ(keys.plan.effective_bits, (2.5 + 3 * 16) / 4);
  EXPECT_GT(all.scores("keys", keys).kl.mean, 0);
  EXPECT_LT(all.scores("keys", keys).kl.mean, all.scores("whole", whole).kl.mean);
  EXPECT_THROW(ModelLab::only(all.baseline("q8_0"), [](int, Side) { return true; }), ArgumentError);
}

TEST_F(LabTest, FinishedScoresAndProfileAreNotMadeAgain) {
  double kl = 0;
  std::string plan;
  {
    ModelLab first = lab();
    kl = first.scores("plan", first.plan(3)).kl.mean;
    plan = plan_json(first.plan(3));
  }
  int passes = 0;
  RunControl counting;
  counting.progress = [&](const Progress&) { ++passes; };
  ModelLab second = lab(counting);
  EXPECT_EQ(plan_json(second.plan(3)), plan);
  EXPECT_EQ(second.scores("under another name", second.plan(3)).kl.mean, kl);
  EXPECT_EQ(passes, 0);
  second.scores("new", second.plan(3, 1));
  EXPECT_GT(passes, 0);
}

TEST_F(LabTest, AnInterruptedMeasurementContinues) {
  const auto measure = [](ModelLab& any) {
    return any.scores("turboquant:3", any.baseline("turboquant:3")).tokens.kl.values;
  };
  int asked = 0;
  RunControl stopping;
  stopping.stop_signal = [&] { return ++asked > 2 ? 15 : 0; };  // in the second window
  ModelLab interrupted = lab(stopping);
  EXPECT_THROW(measure(interrupted), InterruptedError);
  ModelLab again = lab();
  const auto continued = measure(again);
  std::filesystem::remove_all(folder_.path() / "scores");
  ModelLab whole = lab();
  EXPECT_EQ(continued, measure(whole));
}

TEST_F(LabTest, RefusesWhatIsNotItsOwn) {
  lab().profile();
  EXPECT_THAT([&] { lab({}, 7).profile(); },
              ThrowsMessage<EnvironmentError>(HasSubstr("another text, window or seed")));
  EXPECT_THROW(ModelLab(model_, windows(0, 1), {}, windows(1, 1), ModelLab::Options(), {}),
               ArgumentError);
  EXPECT_THAT(
      [&] {
        ModelLab(model_, windows(0, 1), {}, {}, {.window = kWindow, .folder = folder_.path()}, {});
      },
      ThrowsMessage<ArgumentError>(HasSubstr("1 and 0 windows")));
}

// ---- every study of a model measures ----

TEST_F(LabTest, EveryStudyOfAModelReachesAVerdict) {
  ModelLab all = lab();
  StudyContext context;
  context.scale = Scale::kSmall;
  context.lab = &all;
  std::string ids;
  for (const auto part : {model_table_studies, structure_studies, extra_studies})
    for (const Study& study : part()) {
      SCOPED_TRACE(study.info.id);
      ids += study.info.id + " ";
      StudyResult result(context.tolerance_factor());
      study.run(context, result);
      EXPECT_NE(result.verdict(), Verdict::kNotRun);
      EXPECT_FALSE(result.checks().empty());
      for (const Check& check : result.checks())
        EXPECT_FALSE(std::isnan(check.measured)) << check.name;
      for (const StudyTable& table : result.tables()) {
        EXPECT_FALSE(table.rows.empty()) << table.title;
        for (const auto& row : table.rows)
          EXPECT_EQ(row.size(), table.header.size()) << table.title;
      }
    }
  EXPECT_EQ(ids, "E1 E2 E3 E4 E5 E6 E7 E8 E9 E10 E11 E12 F1 F2 F3 F4 F5 M1 M2 M3 M4 ");
}

TEST_F(LabTest, EqualRunsGiveEqualFigures) {
  const auto figures = [&] {
    ModelLab all = lab();
    StudyContext context;
    context.scale = Scale::kSmall;
    context.lab = &all;
    std::vector<double> measured;
    for (const Study& study : extra_studies()) {
      StudyResult result(context.tolerance_factor());
      study.run(context, result);
      for (const Check& check : result.checks()) measured.push_back(check.measured);
    }
    return measured;
  };
  const auto once = figures();
  std::filesystem::remove_all(folder_.path() / "scores");
  EXPECT_EQ(once, figures());
}

}  // namespace
}  // namespace kvplan::studies
