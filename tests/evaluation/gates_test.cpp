#include "evaluation/gates.h"

#include <gtest/gtest.h>

#include "schemas/error.h"

namespace kvplan::evaluation {
namespace {

Validation two_modes() {
  Validation v;
  CandidateResult fp16, worst, decode;
  fp16.name = "fp16";
  fp16.mode = "worst";
  worst.name = decode.name = "plan";
  worst.mode = "worst";
  decode.mode = "decode";
  worst.kl.mean = 0.04;
  worst.same_top1 = 0.91;
  decode.kl.mean = 0.02;
  decode.same_top1 = 0.95;
  v.candidates = {fp16, worst, decode};
  return v;
}

TEST(Gates, WorstModeCounts) {
  const auto results =
      apply_gates(parse_gates("kl<=.03,kl<=.04,same_top1>=.92,same_top1>=.9"), two_modes(), "plan");
  ASSERT_EQ(results.size(), 4u);
  EXPECT_FALSE(results[0].passed);
  EXPECT_EQ(results[0].measured, 0.04);
  EXPECT_TRUE(results[1].passed);
  EXPECT_FALSE(results[2].passed);
  EXPECT_EQ(results[2].measured, 0.91);
  EXPECT_TRUE(results[3].passed);
}

TEST(Gates, RefusesWhatItDoesNotKnow) {
  for (const char* text :
       {"kl", "kl<.1", "kl<=", "kl<=x", "kl<=.1x", "speed<=1", "<=1", "kl<=.1,,ppl<=2", "kl=.1"}) {
    EXPECT_THROW(parse_gates(text), ArgumentError) << text;
  }
  EXPECT_THROW(apply_gates(parse_gates("kl<=1"), two_modes(), "q4_0"), ArgumentError);
}

}  // namespace
}  // namespace kvplan::evaluation
