// Passkeys, prompts and figures by text, on a tiny model that reads bytes.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "evaluation/passkey.h"
#include "evaluation/prompts.h"
#include "evaluation/task_model.h"
#include "evaluation/text_results.h"
#include "forward/cache_attention.h"
#include "generation/generator.h"
#include "quant/baselines.h"
#include "schemas/error.h"
#include "tests/models/tiny_model.h"
#include "tests/schemas/examples.h"

namespace kvplan::evaluation {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::ElementsAreArray;
using testing::HasSubstr;
using testing::ThrowsMessage;

/// A token per byte, but for <stop>, which is one.
class ByteTokenizer : public tokenizers::Tokenizer {
 public:
  static constexpr std::int32_t kStop = 256;
  std::vector<std::int32_t> encode(std::string_view text, bool parse_special) const override {
    std::vector<std::int32_t> ids;
    while (!text.empty()) {
      constexpr std::string_view kStopText = "<stop>";
      const bool stop = parse_special && text.starts_with(kStopText);
      ids.push_back(stop ? kStop : static_cast<unsigned char>(text.front()));
      text.remove_prefix(stop ? kStopText.size() : 1);
    }
    return ids;
  }
  std::string decode(std::span<const std::int32_t> ids) const override {
    return {ids.begin(), ids.end()};
  }
  std::int32_t vocab_size() const override { return kStop + 1; }
};

models::ModelConfig byte_config() {
  models::ModelConfig config = models::tiny_config();
  config.vocab_size = 257;
  config.max_context = 400;
  return config;
}

/// Source s holds letters that differ from those of the others.
tokenizers::TokenSource source_of(char first_letter, std::size_t tokens) {
  quant::RandomStream draws(2, quant::StreamPurpose::kTest,
                            static_cast<std::uint32_t>(first_letter));
  tokenizers::TokenSource source;
  source.info.name = std::string(1, first_letter) + ".txt";
  for (std::size_t i = 0; i < tokens; ++i)
    source.tokens.push_back(first_letter + static_cast<std::int32_t>(draws.next_below(8)));
  return source;
}

class TaskCheck : public testing::Test {
 protected:
  TaskCheck() {
    for (const char* name : {"turboquant:8", "turboquant:2"}) {
      bundles_.push_back(quant::baseline_plan(name, model_.spec(), 4, 4096, 0,
                                              models::rotary_frequencies(model_.config())));
      bundles_.back().plan.page_tokens = 16;
    }
    candidates_ = {{"eight", &bundles_[0]}, {"two", &bundles_[1]}};
    options_.modes = {"worst", "decode"};
    options_.threads = 1;
  }

  template <class Result>
  static const Result& find(const std::vector<Result>& results, const std::string& name,
                            const std::string& mode) {
    for (const Result& r : results)
      if (r.name == name && r.mode == mode) return r;
    throw InternalError("no result " + name);
  }

  PromptSet prompts_in(const std::string& file_name, const std::string& content,
                       const PromptOptions& options = {}) {
    const auto file = folder_ / file_name;
    test::write_bytes(file, content);
    return load_prompts(file, tokenizer_, model_.config(), options);
  }

  test::TemporaryFolder folder_;
  ByteTokenizer tokenizer_;
  models::TinyModel model_{byte_config(), 1, 1.5};
  std::vector<PlanBundle> bundles_;
  std::vector<Candidate> candidates_;
  EvaluateOptions options_;
};

// ---- passkey ----

class Passkey : public TaskCheck {
 protected:
  std::vector<PasskeyTask> tasks(const PasskeyOptions& options) {
    return make_passkey_tasks(model_.config(), tokenizer_, sources_, options);
  }
  std::vector<tokenizers::TokenSource> sources_ = {source_of('a', 500), source_of('q', 600)};
};

std::string text_of(const PasskeyTask& task) { return {task.tokens.begin(), task.tokens.end()}; }

TEST_F(Passkey, TextsHideTheKeyAtTheirDepthAndEndWithIt) {
  const std::vector<double> depths = {0, 0.5, 1};
  const auto found = tasks({.contexts = {300, 400}, .depths = depths, .trials = 3, .seed = 1});
  ASSERT_EQ(found.size(), 2u * 3 * 3);
  std::set<std::string> keys;
  for (std::size_t i = 0; i < found.size(); ++i) {
    SCOPED_TRACE(i);
    const PasskeyTask& task = found[i];
    EXPECT_EQ(task.context, i < 9 ? 300 : 400);
    EXPECT_EQ(task.depth, depths[i / 3 % 3]);
    EXPECT_EQ(task.tokens.size(), static_cast<std::size_t>(task.context));
    const std::string text = text_of(task), key = text.substr(task.key_begin + 1);
    EXPECT_EQ(text[task.key_begin], ' ');
    EXPECT_EQ(key.size(), 5u);
    EXPECT_EQ(key.find_first_not_of("0123456789"), std::string::npos);
    keys.insert(key);
    // The note stands at its share of the haystack.
    const auto note = text.find("\n\nA note"), question = text.find("\n\nQuestion");
    const std::size_t note_length = text.find("\n\n", note + 2) + 2 - note;
    EXPECT_EQ(note,
              static_cast<std::size_t>(task.depth * static_cast<double>(question - note_length)));
    EXPECT_NE(text.find(key, note), task.key_begin + 1);
    // Trials at another depth differ in nothing else.
    EXPECT_EQ(key, text_of(found[i / 9 * 9 + i % 3]).substr(task.key_begin + 1));
  }
  EXPECT_EQ(keys.size(), 6u);
  EXPECT_EQ(text_of(tasks({.contexts = {300}, .depths = {0.5}, .trials = 1, .seed = 1})[0]),
            text_of(found[3]));
  EXPECT_NE(text_of(tasks({.contexts = {300}, .depths = {0.5}, .trials = 1, .seed = 2})[0]),
            text_of(found[3]));
}

TEST_F(Passkey, ContextsAreBoundedByTheModel) {
  models::ModelConfig config = byte_config();
  EXPECT_THAT(default_contexts(config), ElementsAre(400));
  config.max_context = 600;
  EXPECT_THAT(default_contexts(config), ElementsAre(512, 600));
  config.max_context = 1 << 17;
  EXPECT_THAT(default_contexts(config), ElementsAre(512, 1024, 2048));
  config.max_context = 0;  // not known
  EXPECT_THAT(default_contexts(config), ElementsAre(512, 1024, 2048));
}

TEST_F(Passkey, RefusesImpossibleGrids) {
  struct Row {
    PasskeyOptions options;
    const char* message;
  };
  const std::vector<Row> rows = {{{.contexts = {401}}, "beyond the 400"},
                                 {{.contexts = {100}}, "no room"},
                                 {{.contexts = {300}, .depths = {1.5}}, "depth"},
                                 {{.contexts = {300}, .depths = {}}, "at least one"},
                                 {{.contexts = {300}, .trials = 0}, "at least one"}};
  for (const Row& row : rows)
    EXPECT_THAT([&] { tasks(row.options); }, ThrowsMessage<ArgumentError>(HasSubstr(row.message)));
  sources_ = {source_of('a', 299)};
  EXPECT_THAT(
      [&] { tasks({.contexts = {300}}); },
      ThrowsMessage<InputError>(AllOf(HasSubstr("a.txt"), HasSubstr("longest text of 299"))));
}

TEST_F(Passkey, FewerBitsLoseMoreOfTheKey) {
  const auto results =
      check_passkey(model_, tasks({.contexts = {300, 400}, .depths = {0, 1}, .trials = 2}),
                    candidates_, options_, {});
  ASSERT_EQ(results.size(), 3u * 2 * 4);  // candidates with fp16, modes, cells
  for (std::size_t i = 0; i < results.size(); ++i) {
    SCOPED_TRACE(i);
    const PasskeyResult& r = results[i];
    EXPECT_EQ(r.context, i / 2 % 2 == 0 ? 300 : 400);
    EXPECT_EQ(r.depth, i % 2 == 0 ? 0 : 1);
    EXPECT_EQ(r.trials, 2);
    EXPECT_LT(r.log_probability.mean, 0);
    if (r.name == "fp16") {
      EXPECT_EQ(r.log_probability_change.mean, 0);
      EXPECT_EQ(r.log_probability_change.standard_error, 0);
    }
  }
  for (const char* mode : {"worst", "decode"})
    EXPECT_GT(std::abs(find(results, "two", mode).log_probability_change.mean),
              5 * std::abs(find(results, "eight", mode).log_probability_change.mean))
        << mode;
}

TEST_F(Passkey, EqualsADirectComputation) {
  options_.modes = {"worst"};
  const auto task = tasks({.contexts = {300}, .depths = {0.25}, .trials = 1}).front();
  const auto results = check_passkey(model_, {task}, candidates_, options_, {});
  const at::NoGradGuard no_grad;
  const forward::Decoder decoder(model_);
  const forward::StoredCache cache(bundles_[1], model_.config(), 1);
  const auto ids = forward::id_tensor(task.tokens);
  const auto log_probability = [&](const at::Tensor& hidden) {
    const auto log_p = decoder.head(hidden)[0].to(at::kDouble).log_softmax(-1);
    double total = 0;
    for (auto t = static_cast<std::int64_t>(task.key_begin); t < 300; ++t)
      total += log_p[t - 1][task.tokens[static_cast<std::size_t>(t)]].item<double>();
    return total;
  };
  const double exact = log_probability(decoder.hidden(ids, forward::store_as_fp16));
  const double two = log_probability(cache.hidden_worst(decoder, ids));
  EXPECT_NEAR(find(results, "fp16", "worst").log_probability.mean, exact, 1e-4);
  EXPECT_NEAR(find(results, "two", "worst").log_probability.mean, two, 1e-4);
  EXPECT_NEAR(find(results, "two", "worst").log_probability_change.mean, two - exact, 1e-4);
}

TEST_F(Passkey, AKeyThatIsMostLikelyThroughoutMatches) {
  const at::NoGradGuard no_grad;
  const forward::Decoder decoder(model_);
  PasskeyTask task{.context = 60, .depth = 0, .tokens = source_of('a', 55).tokens, .key_begin = 55};
  generation::Generator generator(decoder, nullptr, 60);
  const auto key = generation::continue_greedily(generator, task.tokens, 5);
  task.tokens.insert(task.tokens.end(), key.begin(), key.end());
  auto other = task;
  other.tokens.back() = (other.tokens.back() + 1) % 257;
  const auto results = check_passkey(model_, {task, task, other, task}, {}, options_, {});
  const auto& exact = find(results, "fp16", "worst").exact_match;
  EXPECT_DOUBLE_EQ(exact.mean, 0.75);
  EXPECT_DOUBLE_EQ(exact.standard_error, 0.25);  // sqrt(.75 * .25 / 3)
}

TEST_F(Passkey, StopsWhenAsked) {
  const auto some = tasks({.contexts = {300}, .depths = {0}, .trials = 2});
  std::int64_t passes = 0;
  RunControl control;
  control.progress = [&](const Progress& p) {
    EXPECT_EQ(p.total, 2 * 5);  // fp16 once, two candidates in two modes
    passes = p.done;
  };
  check_passkey(model_, some, candidates_, options_, control);
  EXPECT_EQ(passes, 10);
  control.stop_signal = [&] { return passes == 3 ? 2 : 0; };
  EXPECT_THAT([&] { check_passkey(model_, some, candidates_, options_, control); },
              ThrowsMessage<InterruptedError>(HasSubstr("3 of 10")));
}

TEST_F(Passkey, NamesNonFiniteLogits) {
  const auto some = tasks({.contexts = {300}, .depths = {0}, .trials = 1});
  model_.spoil("token_embd.weight", static_cast<std::size_t>(some[0].tokens[7]) * 24,
               std::nanf(""));
  EXPECT_THAT([&] { check_passkey(model_, some, candidates_, options_, {}); },
              ThrowsMessage<InputError>(AllOf(HasSubstr("passkey"), HasSubstr("NaN"))));
}

// ---- prompts ----

using Prompts = TaskCheck;

TEST_F(Prompts, JsonLinesAreRead) {
  const auto set = prompts_in("p.jsonl",
                              R"({"prompt": "ab", "answer": " cd", "category": "x", "id": 7})"
                              "\r\n\n"
                              R"({"prompt": "e<stop>"})",
                              {.max_tokens = 9, .stop = "<stop>"});
  EXPECT_EQ(set.source.name, "p.jsonl");
  EXPECT_EQ(set.source.sha256.size(), 64u);
  EXPECT_EQ(set.source.max_tokens, 9);
  EXPECT_EQ(set.stop_token, ByteTokenizer::kStop);
  ASSERT_EQ(set.prompts.size(), 2u);
  EXPECT_EQ(set.prompts[0].where, "line 1");
  EXPECT_EQ(set.prompts[0].category, "x");
  EXPECT_THAT(set.prompts[0].tokens, ElementsAre('a', 'b'));
  EXPECT_THAT(set.prompts[0].with_answer, ElementsAre('a', 'b', ' ', 'c', 'd'));
  EXPECT_EQ(set.prompts[0].answer_begin, 2u);
  EXPECT_EQ(set.prompts[1].where, "line 3");
  EXPECT_THAT(set.prompts[1].tokens, ElementsAre('e', ByteTokenizer::kStop));
  EXPECT_TRUE(set.prompts[1].with_answer.empty());
}

TEST_F(Prompts, PlainTextIsCutAtBlankLines) {
  const auto set = prompts_in("p.txt", "\n one\r\ntwo \n \t\n\nthree");
  ASSERT_EQ(set.prompts.size(), 2u);
  EXPECT_EQ(set.prompts[0].where, "line 2");
  EXPECT_EQ(tokenizer_.decode(set.prompts[0].tokens), " one\ntwo ");
  EXPECT_EQ(set.prompts[1].where, "line 6");
  EXPECT_EQ(tokenizer_.decode(set.prompts[1].tokens), "three");
}

struct HostilePrompts {
  const char* name;
  const char* file;
  std::string content;
  const char* field;
  const char* message;
};

class BrokenPrompts : public TaskCheck, public testing::WithParamInterface<HostilePrompts> {};

TEST_P(BrokenPrompts, AreRefusedByFileAndLine) {
  const auto& row = GetParam();
  const auto error = test::refused([&] { prompts_in(row.file, row.content); });
  EXPECT_THAT(error.file(), HasSubstr(row.file));
  EXPECT_EQ(error.field(), row.field);
  EXPECT_THAT(error.what(), HasSubstr(row.message));
}

const std::string kGoodLine = "{\"prompt\": \"a\"}\n";
const std::string kLong(337, 'x');  // with 64 tokens more, beyond the context of 400

INSTANTIATE_TEST_SUITE_P(
    Cases, BrokenPrompts,
    testing::Values(
        HostilePrompts{"Empty", "p.jsonl", "", "", "found none"},
        HostilePrompts{"Blank", "p.txt", " \n\r\n\t\n", "", "found none"},
        HostilePrompts{"NotJson", "p.jsonl", kGoodLine + "{\"prompt\": ", "line 2", "JSON object"},
        HostilePrompts{"NotAnObject", "p.jsonl", kGoodLine + "\n[1]", "line 3", "JSON object"},
        HostilePrompts{"NoPrompt", "p.jsonl", kGoodLine + "{\"text\": \"a\"}", "line 2",
                       "\"prompt\""},
        HostilePrompts{"EmptyPrompt", "p.jsonl", "{\"prompt\": \" \"}", "line 1", "\"prompt\""},
        HostilePrompts{"PromptOfAnotherType", "p.jsonl", "{\"prompt\": [\"a\"]}", "line 1",
                       "expected a string"},
        HostilePrompts{"EmptyAnswer", "p.jsonl", R"({"prompt": "a", "answer": ""})", "line 1",
                       "\"answer\""},
        HostilePrompts{"AnswerOfAnotherType", "p.jsonl", R"({"prompt": "a", "answer": 42})",
                       "line 1", "\"answer\""},
        HostilePrompts{"TooLong", "p.txt", "short\n\n" + kLong, "line 3", "context is 400"},
        HostilePrompts{"AnswerTooLong", "p.jsonl",
                       "{\"prompt\": \"a\", \"answer\": \"" + kLong + kLong + "\"}", "line 1",
                       "context is 400"},
        HostilePrompts{"InvalidUtf8", "p.txt", "caf\xe9", "byte 3", "UTF-8"},
        HostilePrompts{"Binary", "p.jsonl", std::string("a\0b", 3), "byte 1", "NUL"},
        HostilePrompts{"DeepJson", "p.jsonl", std::string(100000, '['), "line 1", "JSON object"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST_F(Prompts, MissingFilesAndImpossibleOptionsAreRefused) {
  EXPECT_THAT([&] { load_prompts(folder_ / "none", tokenizer_, model_.config(), {}); },
              ThrowsMessage<InputError>(HasSubstr("none")));
  EXPECT_THAT([&] { prompts_in("p.txt", "a", {.max_tokens = 0, .stop = ""}); },
              ThrowsMessage<ArgumentError>(HasSubstr("at least 1")));
  EXPECT_THAT([&] { prompts_in("p.txt", "a", {.max_tokens = 1, .stop = "ab"}); },
              ThrowsMessage<ArgumentError>(HasSubstr("2 tokens")));
}

TEST_F(Prompts, Fp16AgreesWithItselfAndFewBitsDoNot) {
  const auto set = prompts_in("p.txt", "The first prompt of all\n\nAnother prompt, not so short");
  const auto results = check_prompts(model_, set, candidates_, options_, {});
  ASSERT_EQ(results.size(), 6u);
  for (const char* mode : {"worst", "decode"}) {
    SCOPED_TRACE(mode);
    const auto& exact = find(results, "fp16", mode);
    EXPECT_EQ(exact.prompts, 2);
    EXPECT_EQ(exact.tokens, 128);
    EXPECT_EQ(exact.greedy_agreement.mean, 1);
    EXPECT_EQ(exact.first_divergence.mean, 64);
    EXPECT_EQ(exact.identical.mean, 1);
    EXPECT_EQ(exact.kl.mean, 0);
    EXPECT_EQ(exact.answers, 0);
    EXPECT_FALSE(exact.answer_log_probability);
    const auto &eight = find(results, "eight", mode), &two = find(results, "two", mode);
    EXPECT_GT(eight.kl.mean, 0);
    EXPECT_GT(two.kl.mean, 10 * eight.kl.mean);
    EXPECT_LT(two.greedy_agreement.mean, 1);
    EXPECT_LE(two.first_divergence.mean, eight.first_divergence.mean);
    EXPECT_GT(two.kl.standard_error, 0);
  }
}

// Up to its first miss the fed continuation is the free run's own text.
TEST_F(Prompts, FirstDivergenceIsThatOfAFreeRun) {
  const at::NoGradGuard no_grad;
  const forward::Decoder decoder(model_);
  bundles_[1].plan.page_tokens = quant::kPageTokens;
  options_.modes = {"decode"};
  std::set<double> divergences;
  for (const char* text : {"Once upon a time in a land", "zebra", "0123456789 0123456789"}) {
    const auto set = prompts_in("p.txt", text, {.max_tokens = 128, .stop = ""});
    forward::CacheAttention pages(forward::reference_runtime("cpu"), bundles_[1], model_.config(),
                                  1, 200);
    generation::Generator exact(decoder, nullptr, 200), stored(decoder, &pages, 200);
    const auto a = generation::continue_greedily(exact, set.prompts[0].tokens, 128);
    const auto b = generation::continue_greedily(stored, set.prompts[0].tokens, 128);
    const auto first = std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin();
    const auto results = check_prompts(model_, set, candidates_, options_, {});
    EXPECT_EQ(find(results, "two", "decode").first_divergence.mean, static_cast<double>(first));
    divergences.insert(static_cast<double>(first));
  }
  EXPECT_GT(divergences.size(), 1u);
}

TEST_F(Prompts, AnswersAndCategoriesAreCountedApart) {
  const auto set = prompts_in("p.jsonl",
                              R"({"prompt": "Question one", "answer": " yes", "category": "qa"}
{"prompt": "def f(x):", "category": "code"}
{"prompt": "Question two", "answer": " no", "category": "qa"}
{"prompt": "Nothing in particular"})",
                              {.max_tokens = 5, .stop = ""});
  options_.modes = {"worst"};
  const auto results = check_prompts(model_, set, candidates_, options_, {});
  ASSERT_EQ(results.size(), 9u);
  struct Expected {
    const char* category;
    int prompts, answers;
  };
  const std::vector<Expected> expected = {{"", 4, 2}, {"qa", 2, 2}, {"code", 1, 0}};
  for (std::size_t i = 0; i < results.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(results[i].category, expected[i % 3].category);
    EXPECT_EQ(results[i].prompts, expected[i % 3].prompts);
    EXPECT_EQ(results[i].answers, expected[i % 3].answers);
    EXPECT_EQ(results[i].tokens, 5 * results[i].prompts);
    EXPECT_EQ(results[i].answer_log_probability.has_value(), results[i].answers > 0);
  }

  const at::NoGradGuard no_grad;
  const forward::Decoder decoder(model_);
  const forward::StoredCache cache(bundles_[1], model_.config(), 1);
  std::vector<double> own, change;
  for (const std::size_t p : {0u, 2u}) {
    const auto& whole = set.prompts[p].with_answer;
    const auto log_probability = [&](const at::Tensor& hidden) {
      const auto log_p = decoder.head(hidden)[0].to(at::kDouble).log_softmax(-1);
      double total = 0;
      for (std::size_t t = set.prompts[p].tokens.size(); t < whole.size(); ++t)
        total += log_p[static_cast<std::int64_t>(t) - 1][whole[t]].item<double>();
      return total;
    };
    own.push_back(log_probability(cache.hidden_worst(decoder, forward::id_tensor(whole))));
    change.push_back(own.back() - log_probability(decoder.hidden(forward::id_tensor(whole),
                                                                 forward::store_as_fp16)));
  }
  const PromptResult& two = results[6];
  EXPECT_EQ(two.name, "two");
  EXPECT_NEAR(two.answer_log_probability->mean, (own[0] + own[1]) / 2, 1e-4);
  EXPECT_NEAR(two.answer_log_probability_change->mean, (change[0] + change[1]) / 2, 1e-4);
  EXPECT_NEAR(two.answer_log_probability_change->standard_error,
              std::abs(change[0] - change[1]) / 2, 1e-4);
}

TEST_F(Prompts, StopWhenAsked) {
  const auto set = prompts_in("p.txt", "one\n\ntwo", {.max_tokens = 3, .stop = ""});
  std::int64_t passes = 0;
  RunControl control;
  control.progress = [&](const Progress& p) {
    EXPECT_EQ(p.total, 10);
    passes = p.done;
  };
  check_prompts(model_, set, candidates_, options_, control);
  EXPECT_EQ(passes, 10);
  control.stop_signal = [] { return 15; };
  EXPECT_THAT([&] { check_prompts(model_, set, candidates_, options_, control); },
              ThrowsMessage<InterruptedError>(HasSubstr("prompts check stopped after 0 of 10")));
}

// ---- figures by text ----

TEST_F(TaskCheck, FiguresByTextAreThoseOfTheTextAlone) {
  constexpr int kWindow = 64;
  options_.window = kWindow;
  options_.bootstrap_samples = 50;
  const std::vector<tokenizers::TokenSource> sources = {source_of('a', 3 * kWindow),
                                                        source_of('q', 2 * kWindow)};
  const auto windows = tokenizers::make_windows(sources, kWindow, 0);
  const auto state = score_tokens(model_, windows, candidates_, options_, {});
  const auto results = results_by_text(state, windows, {"a", "q"}, candidates_, options_);
  ASSERT_EQ(results.size(), 12u);
  for (std::size_t s = 0; s < 2; ++s) {
    const auto alone = evaluate(model_, tokenizers::make_windows({sources[s]}, kWindow, 0),
                                candidates_, options_, {});
    for (std::size_t i = 0; i < 6; ++i) {
      const TextResult& found = results[2 * i + s];
      const CandidateResult& expected = alone.candidates[i];
      SCOPED_TRACE(found.name + " " + found.mode + " " + found.text);
      EXPECT_EQ(found.name, expected.name);
      EXPECT_EQ(found.mode, expected.mode);
      EXPECT_EQ(found.windows, s == 0 ? 3 : 2);
      EXPECT_NEAR(found.perplexity, expected.perplexity, 1e-6 * expected.perplexity);
      EXPECT_NEAR(found.perplexity_rise, expected.perplexity_rise, 1e-9);
      EXPECT_NEAR(found.kl.mean, expected.kl.mean, 1e-9);
      EXPECT_NEAR(found.kl.standard_error, expected.kl.standard_error, 1e-9);
    }
  }
  EXPECT_TRUE(results_by_text(state, windows, {"a"}, candidates_, options_).empty());
}

}  // namespace
}  // namespace kvplan::evaluation
