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
        BrokenValidation{"text", "\"wiki.txt\"", "3", "/texts/0/name"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace kvplan
