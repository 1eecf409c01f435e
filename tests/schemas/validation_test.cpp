#include "schemas/validation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "schemas/error.h"
#include "tests/schemas/examples.h"

namespace kvplan {
namespace {

using test::example_validation;
using test::refused;
using test::TemporaryFolder;

TEST(Validation, ComesBackAsWritten) {
  TemporaryFolder folder;
  const Validation written = example_validation();
  write_validation(written, folder / "validation.json");
  const Validation read = read_validation(folder / "validation.json");
  EXPECT_EQ(test::read_bytes(folder / "validation.json"), validation_json(written));
  EXPECT_EQ(validation_json(read), validation_json(written));
  ASSERT_EQ(read.candidates.size(), 2u);
  EXPECT_EQ(read.candidates[0].kl.cvar95, 0.2);
  EXPECT_EQ(read.candidates[0].predicted_kl, 0.03);
  EXPECT_EQ(read.candidates[1].predicted_kl, std::nullopt);
  EXPECT_EQ(read.candidates[1].perplexity_rise_interval.high, 0.035);
  EXPECT_EQ(read.text_names, written.text_names);
  EXPECT_TRUE(read.gates.at(0).passed);
}

TEST(Validation, TaskChecksComeBackAsWritten) {
  TemporaryFolder folder;
  write_validation(example_validation(), folder / "v");
  const Validation read = read_validation(folder / "v");
  EXPECT_EQ(read.seed, 18446744073709551615u);
  EXPECT_EQ(read.by_text.at(0).kl.standard_error, 0.002);
  EXPECT_EQ(read.by_text.at(0).windows, 12);
  EXPECT_EQ(read.passkey.at(0).context, 1024);
  EXPECT_EQ(read.passkey.at(0).log_probability_change.mean, -0.25);
  EXPECT_EQ(read.passkey.at(0).exact_match.standard_error, 0.25);
  ASSERT_TRUE(read.prompt_source);
  EXPECT_EQ(read.prompt_source->stop, "<|im_end|>");
  ASSERT_EQ(read.prompts.size(), 2u);
  EXPECT_EQ(read.prompts[0].answer_log_probability_change->mean, 0.0625);
  EXPECT_EQ(read.prompts[0].first_divergence.mean, 30.5);
  EXPECT_EQ(read.prompts[1].category, "code");
  EXPECT_FALSE(read.prompts[1].answer_log_probability);
}

TEST(Validation, TaskChecksMayBeLeftOut) {
  TemporaryFolder folder;
  Validation plain = example_validation();
  plain.by_text.clear();
  plain.passkey.clear();
  plain.prompt_source.reset();
  plain.prompts.clear();
  write_validation(plain, folder / "v");
  EXPECT_EQ(validation_json(read_validation(folder / "v")), validation_json(plain));
}

TEST(Validation, IsNotWrittenBroken) {
  Validation infinite = example_validation();
  infinite.candidates[1].perplexity = std::numeric_limits<double>::infinity();
  EXPECT_THROW(validation_json(infinite), InternalError);
  Validation nameless = example_validation();
  nameless.text_names.clear();
  EXPECT_THROW(validation_json(nameless), InternalError);
  EXPECT_THROW(write_validation(example_validation(), "/nonexistent-folder/validation.json"),
               EnvironmentError);
}

struct BrokenValidation {
  const char* name;
  const char* from;
  const char* to;
  const char* pointer;
};

class BrokenValidations : public testing::TestWithParam<BrokenValidation> {};

TEST_P(BrokenValidations, AreRefusedByName) {
  TemporaryFolder folder;
  write_validation(example_validation(), folder / "v");
  test::replace_in_file(folder / "v", GetParam().from, GetParam().to);
  EXPECT_EQ(refused([&] { read_validation(folder / "v"); }).field(), GetParam().pointer);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BrokenValidations,
    testing::Values(
        BrokenValidation{"format", "kvplan.validation", "kvplan.plan", "/format"},
        BrokenValidation{"mode", "\"worst\"", "\"best\"", "/candidates/0/mode"},
        BrokenValidation{"share", "\"same_top1\": 0.93", "\"same_top1\": 1.1",
                         "/candidates/0/same_top1"},
        BrokenValidation{"interval", "\"low\": 0.02", "\"low\": 0.2",
                         "/candidates/0/perplexity_rise_interval/high"},
        BrokenValidation{"unknown", "\"p50\"", "\"p51\": 0, \"p50\"", "/candidates/0/kl/p51"},
        BrokenValidation{"gate", "\"passed\": true", "\"passed\": 1", "/gates/0/passed"},
        BrokenValidation{"bins", "0.03125", "\"a\"", "/candidates/0/kl_by_position/0"},
        BrokenValidation{"text", "\"name\": \"wiki.txt\"", "\"name\": 3", "/texts/0/name"},
        BrokenValidation{"depth", "\"depth\": 0.5", "\"depth\": 1.5", "/passkey/0/depth"},
        BrokenValidation{"log_probability", "\"mean\": -2.5", "\"mean\": 2.5",
                         "/passkey/0/log_probability/mean"},
        BrokenValidation{"trials", "\"trials\": 4", "\"trials\": 0", "/passkey/0/trials"},
        BrokenValidation{"agreement", "\"mean\": 0.97", "\"mean\": 1.97",
                         "/prompts/0/greedy_agreement/mean"},
        BrokenValidation{"answers", "\"answers\": 6", "\"answers\": 13", "/prompts/0/answers"},
        BrokenValidation{"max_tokens", "\"max_tokens\": 64", "\"max_tokens\": 0",
                         "/prompt_source/max_tokens"},
        BrokenValidation{"windows_of_text", "\"windows\": 12", "\"windows\": -1",
                         "/by_text/0/windows"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace kvplan
