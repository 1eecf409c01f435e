#include "evaluation/evaluator.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "evaluation/evaluation_statistics.h"
#include "evaluation/text_results.h"
#include "forward/decode_attention.h"
#include "forward/decoder.h"
#include "forward/stored_cache.h"
#include "quant/baselines.h"
#include "quant/random.h"
#include "schemas/error.h"
#include "tests/forward/normal_tensor.h"
#include "tests/models/tiny_model.h"

namespace kvplan::evaluation {
namespace {

using forward::normal;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

// ---- statistics ----

TokenScores scores_of(std::int64_t windows, std::vector<double> values) {
  return {windows, static_cast<std::int64_t>(values.size()) / windows, std::move(values)};
}

TEST(EvaluationStatistics, QuantilesAreLinearBetweenNeighbours) {
  const std::vector<double> ascending = {0, 10, 20, 40};
  EXPECT_DOUBLE_EQ(quantile(ascending, 0), 0);
  EXPECT_DOUBLE_EQ(quantile(ascending, 0.5), 15);
  EXPECT_DOUBLE_EQ(quantile(ascending, 0.9), 34);  // rank 2.7
  EXPECT_DOUBLE_EQ(quantile(ascending, 1), 40);
  EXPECT_DOUBLE_EQ(quantile(std::vector<double>{7}, 0.95), 7);
}

TEST(EvaluationStatistics, KlFiguresOfTheNumbersZeroTo39) {
  std::vector<double> values(40);
  std::iota(values.rbegin(), values.rend(), 0.0);  // two windows, means 29.5 and 9.5
  const KlStatistics kl = kl_statistics(scores_of(2, values));
  EXPECT_DOUBLE_EQ(kl.mean, 19.5);
  EXPECT_DOUBLE_EQ(kl.standard_error,
                   10);  // standard deviation of the means 20 / sqrt(2), over sqrt(2)
  EXPECT_DOUBLE_EQ(kl.p50, 19.5);
  EXPECT_DOUBLE_EQ(kl.p95, 37.05);
  EXPECT_DOUBLE_EQ(kl.p99, 38.61);
  EXPECT_DOUBLE_EQ(kl.max, 39);
  EXPECT_DOUBLE_EQ(kl.cvar95, 38.5);  // the worst two of 40
}

TEST(EvaluationStatistics, OneWindowHasNoStandardError) {
  EXPECT_EQ(kl_statistics(scores_of(1, {1, 2, 6})).standard_error, 0);
}

TEST(EvaluationStatistics, PositionBinsAverageOverWindows) {
  std::vector<double> values(64);
  for (std::size_t i = 0; i < 64; ++i)
    values[i] = static_cast<double>(i % 32);  // 2 windows of 32 positions
  const auto bins = mean_by_position(scores_of(2, values));
  ASSERT_EQ(bins.size(), 16u);
  for (std::size_t b = 0; b < 16; ++b) EXPECT_DOUBLE_EQ(bins[b], 2 * static_cast<double>(b) + 0.5);
}

TEST(EvaluationStatistics, BootstrapDependsOnTheSeedAlone) {
  const std::vector<double> window_values = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  const auto average = [&](std::span<const std::uint32_t> drawn) {
    double sum = 0;
    for (const auto i : drawn) sum += window_values.at(i);
    return sum / static_cast<double>(drawn.size());
  };
  const Interval a = bootstrap_interval(10, 2000, 1, average),
                 again = bootstrap_interval(10, 2000, 1, average),
                 other = bootstrap_interval(10, 2000, 2, average);
  EXPECT_EQ(a.low, again.low);
  EXPECT_EQ(a.high, again.high);
  EXPECT_TRUE(a.low != other.low || a.high != other.high);
  // Normal approximation: 5.5 +- 1.96 sqrt(8.25 / 10).
  EXPECT_NEAR(a.low, 3.72, 0.2);
  EXPECT_NEAR(a.high, 7.28, 0.2);
}

// ---- attention of mode decode ----

struct PageCase {
  int tokens, sinks, page_tokens, window = 0;
};

class DecodeAttention : public testing::TestWithParam<PageCase> {};

TEST_P(DecodeAttention, EqualsOneQueryAtATime) {
  const auto [tokens, sinks, page_tokens, window] = GetParam();
  const auto q = normal({1, 4, tokens, 16}, 1);
  const forward::CachedKv exact{normal({1, 2, tokens, 16}, 2), normal({1, 2, tokens, 16}, 3)};
  const forward::CachedKv packed{normal({1, 2, tokens, 16}, 4), normal({1, 2, tokens, 16}, 5)};
  const auto found = forward::decode_attention(q, exact, packed, sinks, page_tokens,
                                               {.scale = 0.25, .window = window});
  ASSERT_EQ(found.sizes(), q.sizes());
  for (int t = 0; t < tokens; ++t) {
    std::vector<at::Tensor> keys, values;
    for (int s = window > 0 ? std::max(0, t - window + 1) : 0; s <= t; ++s) {
      const int page_begin = sinks + (s - sinks) / page_tokens * page_tokens;
      const auto& source = s >= sinks && t >= page_begin + page_tokens - 1 ? packed : exact;
      keys.push_back(source.k.narrow(2, s, 1));
      values.push_back(source.v.narrow(2, s, 1));
    }
    for (int head = 0; head < 4; ++head) {
      const auto k = at::cat(keys, 2)[0][head / 2], v = at::cat(values, 2)[0][head / 2];
      const auto expected = at::matmul(at::matmul(k, q[0][head][t]).div(4.0).softmax(0), v);
      ASSERT_LT((found[0][head][t] - expected).abs().max().item<double>(), 1e-5)
          << "position " << t << " head " << head;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, DecodeAttention,
                         testing::Values(PageCase{40, 4, 8}, PageCase{40, 0, 8}, PageCase{19, 4, 8},
                                         PageCase{20, 4, 8}, PageCase{3, 4, 8}, PageCase{9, 0, 1},
                                         PageCase{9, 2, 1}, PageCase{10, 1, 64},
                                         PageCase{40, 4, 8, 11}, PageCase{19, 2, 4, 1}),
                         [](const auto& row) {
                           return std::to_string(row.param.tokens) + "tokens" +
                                  std::to_string(row.param.sinks) + "sinks" +
                                  std::to_string(row.param.page_tokens) + "page" +
                                  std::to_string(row.param.window) + "window";
                         });

// ---- evaluation ----

constexpr int kWindow = 48;
constexpr int kFirst = 12, kScored = 35;

std::vector<tokenizers::TextWindow> some_windows(int count) {
  std::vector<tokenizers::TextWindow> windows;
  quant::RandomStream draws(3, quant::StreamPurpose::kTest, 77);
  for (int w = 0; w < count; ++w) {
    windows.push_back({w, 0, {}});
    for (int t = 0; t < kWindow; ++t)
      windows.back().tokens.push_back(static_cast<std::int32_t>(draws.next_below(50)));
  }
  return windows;
}

class Evaluator : public testing::Test {
 protected:
  Evaluator() {
    for (const char* name : {"turboquant:8", "turboquant:4", "turboquant:2"}) {
      bundles_.push_back(quant::baseline_plan(name, model_.spec(), 4, 4096, 0,
                                              models::rotary_frequencies(model_.config())));
      bundles_.back().plan.page_tokens = 16;
      names_.emplace_back(name);
    }
    for (std::size_t i = 0; i < bundles_.size(); ++i)
      candidates_.push_back({names_[i], &bundles_[i]});
    options_.window = kWindow;
    options_.modes = {"worst", "decode"};
    options_.bootstrap_samples = 200;
    options_.threads = 1;
    file_ = std::filesystem::temp_directory_path() /
            (std::string("kvplan_") +
             testing::UnitTest::GetInstance()->current_test_info()->name() + ".safetensors");
    std::filesystem::remove(file_);
  }
  ~Evaluator() override { std::filesystem::remove(file_); }

  Validation run(const RunControl& control = {}) {
    return evaluate(model_, windows_, candidates_, options_, control);
  }

  static const CandidateResult& find(const Validation& validation, const std::string& name,
                                     const std::string& mode) {
    for (const auto& c : validation.candidates)
      if (c.name == name && c.mode == mode) return c;
    throw InternalError("no result " + name);
  }

  models::TinyModel model_{models::tiny_config(), 1, 1.5};
  std::vector<tokenizers::TextWindow> windows_ = some_windows(3);
  std::vector<PlanBundle> bundles_;
  std::vector<std::string> names_;
  std::vector<Candidate> candidates_;
  EvaluateOptions options_;
  std::filesystem::path file_;
};

TEST_F(Evaluator, Fp16IsItsOwnReference) {
  const auto exact = quant::baseline_plan("fp16", model_.spec(), 4, 4096, 0,
                                          models::rotary_frequencies(model_.config()));
  candidates_ = {{"fp16", nullptr}, {"stored as fp16", &exact}};
  const auto validation = run();
  EXPECT_EQ(validation.window, kWindow);
  EXPECT_EQ(validation.windows, 3);
  EXPECT_EQ(validation.first_scored, kFirst);
  EXPECT_EQ(validation.scored_tokens, 3 * kScored);
  ASSERT_EQ(validation.candidates.size(), 4u);
  EXPECT_EQ(validation.candidates.front().name, "fp16");
  for (const auto& c : validation.candidates) {
    SCOPED_TRACE(c.name + " " + c.mode);
    const double tolerance = c.name == "fp16" ? 0 : 1e-6;
    EXPECT_NEAR(c.kl.mean, 0, tolerance);
    EXPECT_NEAR(c.kl.max, 0, tolerance);
    EXPECT_NEAR(c.perplexity_rise, 0, tolerance);
    EXPECT_EQ(c.same_top1, 1);
    EXPECT_EQ(c.effective_bits, 16);
    EXPECT_GT(c.perplexity, 1);
  }
}

TEST_F(Evaluator, FewerBitsCostMore) {
  options_.plan_name = "turboquant:4";
  const auto validation = run();
  ASSERT_EQ(validation.candidates.size(), 8u);
  for (const std::string mode : {"worst", "decode"}) {
    SCOPED_TRACE(mode);
    const auto& eight = find(validation, "turboquant:8", mode);
    const auto& four = find(validation, "turboquant:4", mode);
    const auto& two = find(validation, "turboquant:2", mode);
    EXPECT_GT(eight.kl.mean, 0);
    EXPECT_LT(10 * eight.kl.mean, four.kl.mean);
    EXPECT_LT(3 * four.kl.mean, two.kl.mean);
    EXPECT_GT(four.same_top1, two.same_top1);
    EXPECT_LT(eight.kl_minus_plan.high, 0);
    EXPECT_EQ(four.kl_minus_plan.low, 0);
    EXPECT_EQ(four.kl_minus_plan.high, 0);
    EXPECT_GT(two.kl_minus_plan.low, 0);
    EXPECT_LE(two.perplexity_rise_interval.low, two.perplexity_rise);
    EXPECT_GE(two.perplexity_rise_interval.high, two.perplexity_rise);
    EXPECT_EQ(two.kl_by_position.size(), 16u);
    EXPECT_NEAR(two.effective_bits, 3.0, 1e-9);  // 2 bits and a 16-bit norm over 16 channels
  }
  // Behind the last full page decode reads fp16, so it errs less.
  EXPECT_LT(find(validation, "turboquant:2", "decode").kl.mean,
            find(validation, "turboquant:2", "worst").kl.mean);
}

TEST_F(Evaluator, EqualsADirectComputation) {
  windows_.resize(1);
  candidates_ = {candidates_[2]};
  const auto result = find(run(), "turboquant:2", "worst");

  const at::NoGradGuard no_grad;
  const forward::Decoder decoder(model_);
  auto ids = at::from_blob(windows_[0].tokens.data(), {1, kWindow}, at::kInt).to(at::kLong);
  const forward::StoredCache cache(bundles_[2], model_.config(), 1);
  const auto log_probabilities = [&](const at::Tensor& hidden) {
    return decoder.head(hidden)[0].narrow(0, kFirst, kScored).to(at::kDouble).log_softmax(-1);
  };
  const auto p = log_probabilities(decoder.hidden(ids, forward::store_as_fp16));
  const auto q = log_probabilities(cache.hidden_worst(decoder, ids));
  const auto kl = (p.exp() * (p - q)).sum(-1);
  const auto next = ids[0].narrow(0, kFirst + 1, kScored).unsqueeze(1);
  const auto loss = [&](const at::Tensor& x) { return -x.gather(1, next).mean().item<double>(); };
  EXPECT_NEAR(result.kl.mean, kl.mean().item<double>(), 1e-6);
  EXPECT_NEAR(result.kl.max, kl.max().item<double>(), 1e-6);
  EXPECT_NEAR(std::log(result.perplexity), loss(q), 1e-6);
  EXPECT_NEAR(result.perplexity_rise, std::exp(loss(q) - loss(p)) - 1, 1e-6);
  EXPECT_NEAR(result.same_top1,
              (p.argmax(-1) == q.argmax(-1)).to(at::kDouble).mean().item<double>(), 1e-12);
}

TEST_F(Evaluator, ThreadsChangeNothing) {
  options_.modes = {"worst"};
  const auto one = run();
  options_.threads = 3;
  const auto three = run();
  for (std::size_t i = 0; i < one.candidates.size(); ++i)
    EXPECT_NEAR(one.candidates[i].kl.mean, three.candidates[i].kl.mean, 1e-6);
}

TEST_F(Evaluator, ReportsEveryPass) {
  std::vector<std::int64_t> done;
  RunControl control;
  control.progress = [&](const Progress& p) {
    EXPECT_EQ(p.total, 3 * 7);
    done.push_back(p.done);
  };
  run(control);
  std::vector<std::int64_t> expected(21);
  std::iota(expected.begin(), expected.end(), 1);
  EXPECT_EQ(done, expected);
}

class PagedEvaluator : public Evaluator {
 protected:
  static constexpr int kLongWindow = 150;  // two pages of 64 tokens behind 4 sinks
  PagedEvaluator() {
    options_.window = kLongWindow;
    windows_.clear();
    for (std::int64_t index = 0; index < 9; ++index) {  // more than go through pages together
      quant::RandomStream draws(3, quant::StreamPurpose::kTest, static_cast<std::uint32_t>(index));
      tokenizers::TextWindow window{index, 0, {}};
      for (int t = 0; t < kLongWindow; ++t)
        window.tokens.push_back(static_cast<std::int32_t>(draws.next_below(50)));
      windows_.push_back(std::move(window));
    }
    for (PlanBundle& bundle : bundles_) bundle.plan.page_tokens = quant::kPageTokens;
    candidates_ = {
        {"plan", &bundles_[2], {{kSimulation, nullptr}, forward::reference_runtime("reference")}},
        {"other", &bundles_[1]}};
    options_.plan_name = "plan";
  }
};

TEST_F(PagedEvaluator, PagesAgreeWithTheSimulation) {
  const auto validation = run();
  std::vector<std::string> found;
  for (const auto& c : validation.candidates)
    found.push_back(c.name + " " + c.mode + " " + c.runtime);
  EXPECT_THAT(found, testing::ElementsAre("fp16 worst cpu", "plan worst cpu", "other worst cpu",
                                          "fp16 decode cpu", "plan decode cpu",
                                          "plan decode reference", "other decode cpu"));
  const auto &simulated = validation.candidates[4], &paged = validation.candidates[5];
  EXPECT_GT(simulated.kl.mean, 0.01);
  EXPECT_NEAR(paged.kl.mean, simulated.kl.mean, 0.02 * simulated.kl.mean);
  EXPECT_NEAR(paged.perplexity, simulated.perplexity, 1e-3 * simulated.perplexity);
  for (std::size_t bin = 0; bin < 16; ++bin)  // by position: no page is missing or early
    EXPECT_NEAR(paged.kl_by_position[bin], simulated.kl_by_position[bin],
                0.05 * simulated.kl_by_position[bin] + 1e-4);
  EXPECT_EQ(paged.effective_bits, simulated.effective_bits);
}

TEST_F(PagedEvaluator, ResultsByTextCountACandidateOnce) {
  windows_.resize(4);
  windows_[1].source = windows_[3].source = 1;
  const auto scores = score_tokens(model_, windows_, candidates_, options_, {});
  const auto results = results_by_text(scores, windows_, {"a", "b"}, candidates_, options_);
  ASSERT_EQ(results.size(), 2u * 2 * 3);
  const auto whole = run();
  EXPECT_NEAR((results[8].kl.mean + results[9].kl.mean) / 2, find(whole, "plan", "decode").kl.mean,
              1e-6);
  EXPECT_EQ(results[10].name, "other");
  EXPECT_NEAR((results[10].kl.mean + results[11].kl.mean) / 2,
              find(whole, "other", "decode").kl.mean, 1e-6);
}

/// Stops a run at pass `stop_at` and counts the passes.
struct StoppingControl {
  explicit StoppingControl(std::int64_t stop_at) {
    control.progress = [this](const Progress& p) {
      last = p.done;
      ++passes;
    };
    control.stop_signal = [this, stop_at] { return last >= stop_at ? 15 : 0; };
  }
  RunControl control;
  std::int64_t last = 0, passes = 0;
};

TEST_F(Evaluator, ResumedRunEqualsUninterruptedRun) {
  const std::string uninterrupted = validation_json(run());
  options_.partial_file = file_;
  // 7 passes a window: in the first, in the second, at the end of the second window.
  for (const std::int64_t stop_at : {3, 10, 14}) {
    SCOPED_TRACE(stop_at);
    StoppingControl stopping(stop_at);
    try {
      run(stopping.control);
      ADD_FAILURE() << "not stopped";
    } catch (const InterruptedError& e) {
      EXPECT_EQ(e.signal(), 15);
      EXPECT_THAT(e.what(), HasSubstr(std::to_string(stop_at / 7) + " of 3 windows"));
    }
  }
  StoppingControl rest(1000);
  EXPECT_EQ(validation_json(run(rest.control)), uninterrupted);
  EXPECT_EQ(rest.passes, 7);  // only the third window was left
  StoppingControl nothing(1000);
  EXPECT_EQ(validation_json(run(nothing.control)), uninterrupted);
  EXPECT_EQ(nothing.passes, 0);
}

TEST_F(PagedEvaluator, ResumesAfterTheWindowsThatWentTogether) {
  options_.modes = {"decode"};
  const std::string uninterrupted = validation_json(run());
  options_.partial_file = file_;
  StoppingControl stopping(33);  // 4 passes a window, 8 windows together
  EXPECT_THROW(run(stopping.control), InterruptedError);
  StoppingControl rest(1000);
  EXPECT_EQ(validation_json(run(rest.control)), uninterrupted);
  EXPECT_EQ(rest.passes, 4);
  // The scores of another runtime are not taken for these.
  candidates_[0].runtimes = {{kSimulation, nullptr}, forward::reference_runtime("another")};
  StoppingControl again(1000);
  run(again.control);
  EXPECT_EQ(again.passes, 36);
}

TEST_F(Evaluator, StateOfOtherInputsIsNotUsed) {
  options_.partial_file = file_;
  run();
  windows_[0].tokens[20] = (windows_[0].tokens[20] + 1) % 50;
  StoppingControl control(1000);
  const auto resumed = validation_json(run(control.control));
  EXPECT_EQ(control.passes, 21);
  options_.partial_file.clear();
  EXPECT_EQ(resumed, validation_json(run()));
}

TEST_F(Evaluator, DamagedStateIsRefused) {
  options_.partial_file = file_;
  std::ofstream(file_) << "not safetensors";
  EXPECT_THROW(run(), InputError);
}

TEST_F(Evaluator, NamesModelAndWindowOfNonFiniteLogits) {
  windows_[0].tokens.assign(kWindow, 1);
  windows_[1].tokens.assign(kWindow, 2);
  models::ModelConfig config = models::tiny_config();
  config.tied_embeddings = false;
  struct Row {
    const char* tensor;
    std::size_t element;
    const char* window;
  };
  // The embedding of token 2 is met in window 1 only, the output row of token 3 everywhere.
  for (const Row& row :
       {Row{"token_embd.weight", 2 * 24, "window 1"}, Row{"output.weight", 3 * 24, "window 0"}}) {
    SCOPED_TRACE(row.tensor);
    models::TinyModel model(config);
    model.spoil(row.tensor, row.element, std::nanf(""));
    EXPECT_THAT([&] { evaluate(model, windows_, candidates_, options_, {}); },
                ThrowsMessage<InputError>(
                    AllOf(HasSubstr("tiny"), HasSubstr(row.window), HasSubstr("NaN"))));
  }
}

TEST_F(Evaluator, RefusesImpossibleArguments) {
  struct Row {
    const char* name;
    std::function<void()> spoil;
    const char* message;
  };
  const std::vector<Row> rows = {
      {"no window", [&] { windows_.clear(); }, "no window"},
      {"short window", [&] { windows_[1].tokens.pop_back(); }, "window 1 holds 47 tokens"},
      {"tiny window", [&] { options_.window = 8; }, "too short"},
      {"unknown mode", [&] { options_.modes = {"best"}; }, "'best'"},
      {"no mode", [&] { options_.modes.clear(); }, "no evaluation mode"},
      {"no samples", [&] { options_.bootstrap_samples = 0; }, "bootstrap_samples"},
      {"unknown plan", [&] { options_.plan_name = "mine"; }, "'mine'"},
      {"duplicate name", [&] { candidates_[1].name = candidates_[0].name; }, "two candidates"},
      {"reserved name", [&] { candidates_[1].name = "fp16"; }, "reference"},
      {"all sinks", [&] { bundles_[0].plan.sink_tokens = kWindow; }, "nothing to quantise"},
      {"other layers", [&] { bundles_[0].plan.model.num_layers = 3; }, "3 layers"},
      {"other heads", [&] { bundles_[0].plan.model.kv_heads = 4; }, "4 KV heads"},
      {"token outside the vocabulary", [&] { windows_[2].tokens[3] = 50; }, "token id 50"},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    const auto windows = windows_;
    const auto candidates = candidates_;
    const auto options = options_;
    const auto plan = bundles_[0].plan;
    row.spoil();
    EXPECT_THAT([&] { run(); }, ThrowsMessage<ArgumentError>(HasSubstr(row.message)));
    windows_ = windows;
    candidates_ = candidates;
    options_ = options;
    bundles_[0].plan = plan;
  }
}

}  // namespace
}  // namespace kvplan::evaluation
