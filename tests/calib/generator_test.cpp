#include "calib/generator.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "calib/task_model.h"
#include "quant/baselines.h"
#include "schemas/error.h"
#include "schemas/safetensors.h"
#include "tests/calib/fixtures.h"
#include "tests/calib/tiny_model.h"

namespace kvplan::calib {
namespace {

using testing::ElementsAreArray;
using testing::HasSubstr;
using testing::ThrowsMessage;

std::vector<std::int32_t> some_tokens(int count, std::uint32_t vocabulary = 50) {
  quant::RandomStream draws(11, quant::StreamPurpose::kTest, 5);
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < count; ++i)
    tokens.push_back(static_cast<std::int32_t>(draws.next_below(vocabulary)));
  return tokens;
}

struct StoredCase {
  const char* name;
  const char* codec;  // empty: the fp16 cache
  int sinks, page_tokens;
};

class GeneratorCache : public testing::TestWithParam<StoredCase> {
 protected:
  static constexpr int kTokens = 90;
  const at::NoGradGuard no_grad_;
  TinyModel model_{tiny_config()};
  Decoder decoder_{model_};
};

TEST_P(GeneratorCache, TokenByTokenEqualsTheWholeWindow) {
  const auto& [name, codec, sinks, page_tokens] = GetParam();
  const auto tokens = some_tokens(kTokens);
  std::optional<StoredCache> stored;
  if (*codec) {
    auto bundle = quant::baseline_plan(codec, model_.spec(), sinks, 4096, 0,
                                       rotary_frequencies(model_.config()));
    bundle.plan.page_tokens = page_tokens;
    stored.emplace(bundle, model_.config(), 1);
  }
  const auto ids = id_tensor(tokens);
  const auto hidden =
      stored ? stored->hidden_decode(decoder_, ids) : decoder_.hidden(ids, store_as_fp16);
  const auto expected = decoder_.head(hidden)[0];
  // Prompts that end within the sinks, before, at and behind the end of a page.
  for (const int prompt :
       {1, sinks, sinks + page_tokens - 1, sinks + page_tokens, sinks + page_tokens + 1, kTokens}) {
    if (prompt < 1) continue;
    SCOPED_TRACE("prompt of " + std::to_string(prompt));
    Generator generator(decoder_, stored ? &*stored : nullptr, kTokens);
    auto logits = generator.start(std::span(tokens).first(static_cast<std::size_t>(prompt)));
    for (int t = prompt - 1;; ++t) {
      // One value of the cache may round to the other side of fp16: products of one row and of many
      // differ in the last place.
      ASSERT_LT((logits - expected[t]).abs().max().item<double>(),
                1e-4 * expected[t].abs().max().item<double>())
          << "position " << t;
      if (t + 1 == kTokens) break;
      logits = generator.step(tokens[static_cast<std::size_t>(t + 1)]);
    }
    EXPECT_EQ(generator.position(), kTokens);
  }
  if (stored) {  // the codec does something that a wrong page would show
    const auto exact = decoder_.head(decoder_.hidden(ids, store_as_fp16))[0];
    EXPECT_GT((exact - expected).abs().max().item<double>(), 0.05);
  }
}

INSTANTIATE_TEST_SUITE_P(Plans, GeneratorCache,
                         testing::Values(StoredCase{"Fp16", "", 4, 16},
                                         StoredCase{"Rotated", "turboquant:2", 4, 16},
                                         StoredCase{"NoSinks", "turboquant:2", 0, 16},
                                         StoredCase{"PagesOfOneToken", "turboquant:2", 3, 1},
                                         StoredCase{"ScalesOverTokens", "kivi:2", 4, 32}),
                         [](const auto& row) { return std::string(row.param.name); });

TEST(Generator, ContinuesUpToTheStopToken) {
  const at::NoGradGuard no_grad;
  TinyModel model(tiny_config(), 1, 1.5);
  const Decoder decoder(model);
  const auto prompt = some_tokens(9);
  const auto continuation = [&](std::int64_t count, std::int32_t stop) {
    Generator generator(decoder, nullptr, 40);
    return continue_greedily(generator, prompt, count, stop);
  };
  const auto whole = continuation(20, kNoStopToken);
  ASSERT_EQ(whole.size(), 20u);
  const auto first = std::find(whole.begin(), whole.end(), whole[4]) + 1;
  EXPECT_THAT(continuation(20, whole[4]), ElementsAreArray(whole.begin(), first));
  EXPECT_THAT(continuation(7, kNoStopToken), ElementsAreArray(whole.begin(), whole.begin() + 7));
  // Every token is what the whole text makes most likely.
  auto text = prompt;
  text.insert(text.end(), whole.begin(), whole.end() - 1);
  const auto top = decoder.head(decoder.hidden(id_tensor(text), store_as_fp16))[0].argmax(-1);
  for (std::size_t i = 0; i < whole.size(); ++i)
    EXPECT_EQ(top[static_cast<std::int64_t>(prompt.size() - 1 + i)].item<std::int64_t>(), whole[i]);
}

TEST(Generator, RefusesImpossibleCalls) {
  const at::NoGradGuard no_grad;
  TinyModel model(tiny_config());
  const Decoder decoder(model);
  const auto tokens = some_tokens(5);
  Generator generator(decoder, nullptr, 6);
  EXPECT_THAT([&] { generator.step(1); }, ThrowsMessage<ArgumentError>(HasSubstr("no prompt")));
  EXPECT_THAT([&] { generator.start({}); }, ThrowsMessage<ArgumentError>(HasSubstr("empty")));
  generator.start(tokens);
  EXPECT_THAT([&] { generator.start(tokens); },
              ThrowsMessage<ArgumentError>(HasSubstr("already holds 5")));
  generator.step(1);
  EXPECT_THAT([&] { generator.step(1); }, ThrowsMessage<ArgumentError>(HasSubstr("6 tokens")));
}

using GeneratorFixture = FixtureTest;

TEST_F(GeneratorFixture, GreedyTokensEqualTransformers) {
  const at::NoGradGuard no_grad;
  int compared = 0;
  for (const auto& entry : std::filesystem::directory_iterator(fixtures())) {
    if (!std::filesystem::exists(entry.path() / "oracle.safetensors")) continue;
    SCOPED_TRACE(entry.path().filename().string());
    const SafetensorsFile oracle(entry.path() / "oracle.safetensors");
    const auto prompts = oracle.i64("greedy.prompts"), expected = oracle.i64("greedy.tokens");
    const auto model = open_model(entry.path());
    const Decoder decoder(*model);
    for (std::size_t row = 0; row < static_cast<std::size_t>(prompts.shape[0]); ++row) {
      const std::vector<std::int32_t> prompt(prompts.row(row).begin(), prompts.row(row).end());
      Generator generator(decoder, nullptr, prompts.shape[1] + expected.shape[1]);
      EXPECT_THAT(continue_greedily(generator, prompt, expected.shape[1]),
                  ElementsAreArray(expected.row(row)));
      ++compared;
    }
  }
  EXPECT_GT(compared, 0);
}

}  // namespace
}  // namespace kvplan::calib
