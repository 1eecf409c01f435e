// The kept fuzz inputs in the ordinary test run: seeds are accepted, what once went wrong
// (finding-*) does not again.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <string>

#include "tests/fuzz/targets.h"

namespace kvplan::fuzz {
namespace {

class Corpus : public testing::TestWithParam<std::string> {};

TEST_P(Corpus, SeedsAreAcceptedAndFindingsStayFixed) {
  const std::map<std::string, std::function<bool(std::span<const char>)>> targets = {
      {"gguf", gguf},
      {"tokenizer_json", tokenizer_json},
      {"safetensors", safetensors},
      {"profile", profile},
      {"plan", plan}};
  int seeds = 0;
  const auto folder = std::filesystem::path(KVPLAN_FUZZ_CORPUS) / GetParam();
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    SCOPED_TRACE(name);
    std::ifstream in(entry.path(), std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(in), {}};
    const bool accepted = targets.at(GetParam())(bytes);
    if (!name.starts_with("seed-")) continue;
    EXPECT_TRUE(accepted) << "make the seeds again: scripts/fuzz --seeds";
    ++seeds;
  }
  EXPECT_GE(seeds, 2);
}

INSTANTIATE_TEST_SUITE_P(Fuzz, Corpus,
                         testing::Values("gguf", "safetensors", "tokenizer_json", "profile",
                                         "plan"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace kvplan::fuzz
