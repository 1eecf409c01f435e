// Text files to tokens to windows.

#include "tokenizers/text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "schemas/error.h"

namespace kvplan::tokenizers {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

/// One token per byte.
class ByteTokenizer final : public Tokenizer {
 public:
  std::vector<std::int32_t> encode(std::string_view text, bool) const override {
    return {text.begin(), text.end()};
  }
  std::string decode(std::span<const std::int32_t> ids) const override {
    return {ids.begin(), ids.end()};
  }
  std::int32_t vocab_size() const override { return 256; }
};

class TextFile : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::path(::testing::TempDir()) / (std::string("kvplan_text_") + test->name());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  TokenSource load(const std::string& content, const char* name = "a.txt", double begin = 0,
                   double end = 1) const {
    std::ofstream(folder_ / name, std::ios::binary) << content;
    return load_text(folder_ / name, tokenizer_, begin, end);
  }
  std::string text_of(const TokenSource& source) const { return tokenizer_.decode(source.tokens); }

  void expect_refused(const std::string& content, const char* name, const std::string& field,
                      const std::string& message) const {
    try {
      load(content, name);
      ADD_FAILURE() << "accepted";
    } catch (const InputError& error) {
      EXPECT_EQ(error.field(), field);
      EXPECT_THAT(error.what(), HasSubstr(message));
      EXPECT_THAT(error.file(), HasSubstr(name));
    }
  }

  ByteTokenizer tokenizer_;
  fs::path folder_;
};

TEST_F(TextFile, LoadsThePlainTextAsItIs) {
  const auto source = load("abc");
  EXPECT_EQ(text_of(source), "abc");
  EXPECT_EQ(source.info.name, "a.txt");
  EXPECT_EQ(source.info.tokens, 3);
  EXPECT_EQ(source.first_token, 0);
  EXPECT_EQ(source.info.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
      << "FIPS 180-4, example \"abc\"";
  EXPECT_EQ(text_of(load("one\r\n\ttwo \xc3\xa9\n")), "one\r\n\ttwo \xc3\xa9\n");
}

TEST_F(TextFile, CutsThePartByFlooredFractions) {
  const auto source = load("0123456789", "a.txt", 0.25, 0.79);
  EXPECT_EQ(text_of(source), "23456");
  EXPECT_EQ(source.first_token, 2);
  EXPECT_EQ(source.info.tokens, 10);
  EXPECT_EQ(source.info.part_begin, 0.25);
  EXPECT_EQ(source.info.part_end, 0.79);
  EXPECT_EQ(
      text_of(load("0123456789", "a.txt", 0, 0.5)) + text_of(load("0123456789", "a.txt", 0.5, 1)),
      "0123456789")
      << "adjoining parts leave nothing out";
}

TEST_F(TextFile, RefusesImpossibleParts) {
  const double nan = std::nan("");
  for (const auto& [begin, end] :
       {std::pair(-0.1, 1.0), {0.0, 1.1}, {0.5, 0.5}, {0.8, 0.2}, {nan, 1.0}, {0.0, nan}}) {
    EXPECT_THROW(load("abc", "a.txt", begin, end), ArgumentError) << begin << ":" << end;
  }
}

TEST_F(TextFile, JoinsJsonlDocumentsWithABlankLine) {
  EXPECT_EQ(text_of(load("{\"text\": \"one\\ntwo\", \"id\": 1}\n\n{\"text\": \"caf\\u00e9\"}\r\n",
                         "a.jsonl")),
            "one\ntwo\n\ncaf\xc3\xa9");
}

TEST_F(TextFile, RefusesWhatIsNoText) {
  expect_refused("", "a.txt", "", "found none");
  expect_refused(std::string("ab\0c", 4), "a.txt", "byte 2", "NUL");
  expect_refused("abc\xff\xfe", "a.txt", "byte 3", "UTF-8");
  expect_refused("abc\xc3", "a.txt", "byte 3", "UTF-8");
  EXPECT_THROW(load_text(folder_ / "absent.txt", tokenizer_, 0, 1), InputError);
}

TEST_F(TextFile, RefusesBrokenJsonlNamingTheLine) {
  expect_refused("{\"text\": \"a\"}\n{\"text\": ", "a.jsonl", "line 2", "\"text\"");
  expect_refused("{\"text\": \"a\"}\n\n{\"body\": \"b\"}\n", "a.jsonl", "line 3", "\"text\"");
  expect_refused("{\"text\": 3}\n", "a.jsonl", "line 1", "\"text\"");
  expect_refused("[\"text\"]\n", "a.jsonl", "line 1", "\"text\"");
  expect_refused("\n \n", "a.jsonl", "", "found none");
  expect_refused("{\"text\": \"a\\u0000b\"}\n", "a.jsonl", "byte 1", "NUL");
}

TokenSource source_of(int count, std::int32_t first) {
  TokenSource source;
  source.info.name = "made.txt";
  source.tokens.resize(static_cast<std::size_t>(count));
  std::iota(source.tokens.begin(), source.tokens.end(), first);
  return source;
}

TEST(Windows, TakeTurnsAndDropTheRest) {
  const auto windows = make_windows({source_of(5, 0), source_of(9, 100)}, 2, 0);
  std::vector<std::vector<std::int32_t>> tokens;
  std::vector<std::int64_t> sources;
  for (std::size_t i = 0; i < windows.size(); ++i) {
    EXPECT_EQ(windows[i].index, static_cast<std::int64_t>(i));
    tokens.push_back(windows[i].tokens);
    sources.push_back(windows[i].source);
  }
  EXPECT_THAT(tokens,
              ElementsAre(ElementsAre(0, 1), ElementsAre(100, 101), ElementsAre(2, 3),
                          ElementsAre(102, 103), ElementsAre(104, 105), ElementsAre(106, 107)));
  EXPECT_THAT(sources, ElementsAre(0, 1, 0, 1, 1, 1));
}

TEST(Windows, AreAPrefixWhenLimited) {
  const std::vector<TokenSource> sources = {source_of(8, 0), source_of(8, 100)};
  const auto all = make_windows(sources, 2, 0);
  const auto three = make_windows(sources, 2, 3);
  ASSERT_EQ(three.size(), 3u);
  for (std::size_t i = 0; i < three.size(); ++i) EXPECT_EQ(three[i].tokens, all[i].tokens);
  EXPECT_EQ(make_windows(sources, 2, 100).size(), all.size());
}

TEST(Windows, RefuseTextThatIsTooShort) {
  try {
    make_windows({source_of(3, 0), source_of(7, 0)}, 8, 0);
    ADD_FAILURE() << "accepted";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("one window of 8 tokens"));
    EXPECT_THAT(error.what(), HasSubstr("longest text of 7 tokens"));
  }
  EXPECT_THROW(make_windows({}, 8, 0), InputError);
  EXPECT_THROW(make_windows({source_of(3, 0)}, 0, 0), ArgumentError);
  EXPECT_THROW(make_windows({source_of(3, 0)}, 1, -1), ArgumentError);
}

}  // namespace
}  // namespace kvplan::tokenizers
