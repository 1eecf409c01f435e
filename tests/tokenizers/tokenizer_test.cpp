// Tokenizers against the ids of the reference packages (tests/make_tokenizer_fixtures.py), and
// hostile files.

#include "tokenizers/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "schemas/error.h"

namespace kvplan::tokenizers {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

std::optional<fs::path> environment_path(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return fs::path(value);
}

// ---- against the reference packages ----

constexpr const char* kTokenizers[] = {"gpt-2",
                                       "gpt-2.gguf",
                                       "default.gguf",
                                       "tekken.gguf",
                                       "llama-bpe",
                                       "llama-bpe.gguf",
                                       "qwen2",
                                       "qwen2.gguf",
                                       "smollm",
                                       "smollm.gguf",
                                       "sentencepiece-bpe.gguf",
                                       "llama2-legacy",
                                       "llama2-metaspace",
                                       "sentencepiece-unigram.gguf",
                                       "sentencepiece-unigram-bytes.gguf",
                                       "unigram",
                                       "lower-nfd-strip",
                                       "nfkd-replace",
                                       "split-removed",
                                       "split-previous",
                                       "split-next",
                                       "split-contiguous",
                                       "split-inverted",
                                       "digit-runs",
                                       "byte-prefix-space",
                                       "demo-model"};

class Reference : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const auto fixtures = environment_path("KVPLAN_FIXTURES");
    if (!fixtures)
      GTEST_SKIP() << "KVPLAN_FIXTURES is not set; see tests/make_tokenizer_fixtures.py";
    const std::string name = GetParam();
    fs::path path = *fixtures / "tokenizers" / name;
    if (name == "demo-model") {
      const auto model = environment_path("KVPLAN_DEMO_MODEL");
      if (!model) GTEST_SKIP() << "KVPLAN_DEMO_MODEL is not set";
      path = *model;
    }
    std::ifstream file(*fixtures / "tokenizers" / "oracle.json");
    const json oracle = json::parse(file);
    if (name == "demo-model" && !oracle.contains(name)) {
      GTEST_SKIP() << "the fixtures were made without --demo-model";
    }
    cases_ = oracle.at(name);
    tokenizer_ = open_tokenizer(path);
  }
  json cases_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_P(Reference, GivesTheSameIds) {
  ASSERT_FALSE(cases_.empty());
  for (const auto& row : cases_) {
    SCOPED_TRACE(row.at("name").get<std::string>());
    const auto text = row.at("text").get<std::string>();
    EXPECT_EQ(tokenizer_->encode(text), row.at("ids").get<std::vector<std::int32_t>>());
    if (row.contains("ids_with_special")) {
      EXPECT_EQ(tokenizer_->encode(text, true),
                row.at("ids_with_special").get<std::vector<std::int32_t>>());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, Reference, ::testing::ValuesIn(kTokenizers),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name) {
                             if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
                           }
                           return name;
                         });

// ---- files made here ----

class TokenizerFile : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    std::string name = std::string("kvplan_") + test->name();
    std::ranges::replace(name, '/', '_');
    folder_ = fs::path(::testing::TempDir()) / name;
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::unique_ptr<Tokenizer> open(const std::string& text) const {
    std::ofstream(folder_ / "tokenizer.json", std::ios::binary) << text;
    return open_tokenizer(folder_);
  }
  std::unique_ptr<Tokenizer> open(const json& document) const { return open(document.dump()); }

  void expect_refused(const std::string& text, const std::string& field,
                      const std::string& message) const {
    try {
      open(text);
      ADD_FAILURE() << "accepted";
    } catch (const InputError& error) {
      EXPECT_EQ(error.field(), field);
      EXPECT_THAT(error.what(), HasSubstr(message));
      EXPECT_THAT(error.file(), HasSubstr("tokenizer.json"));
    }
  }

  fs::path folder_;
};

/// Characters a, b, c and the merges a+b and ab+c.
json small_bpe() {
  return json::parse(R"({
    "added_tokens": [{"id": 6, "content": "<end>", "special": true},
                     {"id": 7, "content": "<<", "special": false}],
    "normalizer": null, "pre_tokenizer": null,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "?": 5},
              "merges": ["a b", ["ab", "c"]], "unk_token": "?", "fuse_unk": true}})");
}

TEST_F(TokenizerFile, MergesByRank) {
  const auto tokenizer = open(small_bpe());
  EXPECT_EQ(tokenizer->vocab_size(), 8);
  EXPECT_THAT(tokenizer->encode("abcab"), ElementsAre(4, 3));
  EXPECT_THAT(tokenizer->encode("cba"), ElementsAre(2, 1, 0));
  EXPECT_THAT(tokenizer->encode(""), ElementsAre());
}

TEST_F(TokenizerFile, FusesUnknownCharacters) {
  auto document = small_bpe();
  EXPECT_THAT(open(document)->encode("axya"), ElementsAre(0, 5, 0));
  document["model"]["fuse_unk"] = false;
  EXPECT_THAT(open(document)->encode("axya"), ElementsAre(0, 5, 5, 0));
  document["model"]["unk_token"] = nullptr;
  EXPECT_THAT(open(document)->encode("axyab"), ElementsAre(0, 3));
}

TEST_F(TokenizerFile, SpecialTokensArePlainTextUnlessAskedFor) {
  const auto tokenizer = open(small_bpe());
  EXPECT_THAT(tokenizer->encode("ab<end>c", true), ElementsAre(3, 6, 2));
  EXPECT_THAT(tokenizer->encode("ab<end>c"), ElementsAre(3, 5, 2));
  EXPECT_THAT(tokenizer->encode("a<<b"), ElementsAre(0, 7, 1)) << "not special, so always found";
}

TEST_F(TokenizerFile, DecodesWhatItEncoded) {
  const auto tokenizer = open(small_bpe());
  const auto ids = tokenizer->encode("cabcab<end>", true);
  EXPECT_EQ(tokenizer->decode(ids), "cabcab<end>");
  EXPECT_THROW(tokenizer->decode(std::vector<std::int32_t>{8}), ArgumentError);
  EXPECT_THROW(tokenizer->decode(std::vector<std::int32_t>{-1}), ArgumentError);
}

TEST_F(TokenizerFile, RefusesInvalidUtf8WithItsOffset) {
  const auto tokenizer = open(small_bpe());
  for (const std::string bad :
       {"ab\xff", "ab\xc3", "ab\xc0\x80", "ab\xed\xa0\x80", "ab\xf4\x90\x80\x80"}) {
    try {
      tokenizer->encode(bad);
      ADD_FAILURE() << "accepted";
    } catch (const InputError& error) {
      EXPECT_EQ(error.field(), "byte 2");
    }
  }
}

TEST_F(TokenizerFile, UnigramTakesTheLikeliestSegmentation) {
  const auto tokenizer = open(json::parse(R"({"model": {"type": "Unigram", "unk_id": 0, "vocab":
      [["<unk>", 0], ["a", -1], ["b", -1], ["ab", -2.5], ["ba", -0.5], ["aa", -2.5]]}})"));
  EXPECT_THAT(tokenizer->encode("ab"), ElementsAre(1, 2)) << "-2 against -2.5";
  EXPECT_THAT(tokenizer->encode("aba"), ElementsAre(1, 4)) << "-1.5 against -3";
  EXPECT_THAT(tokenizer->encode("axxa"), ElementsAre(1, 0, 1));
}

TEST_F(TokenizerFile, GivesUpOnAPatternThatBacktracksForever) {
  auto document = small_bpe();
  document["pre_tokenizer"] = json::parse(
      R"json({"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated"})json");
  const auto tokenizer = open(document);
  try {
    tokenizer->encode(std::string(200, 'a') + "c");
    ADD_FAILURE() << "matched";
  } catch (const InputError& error) {
    EXPECT_EQ(error.field(), "pre_tokenizer");
    EXPECT_THAT(error.what(), HasSubstr("given up"));
  }
}

TEST_F(TokenizerFile, RefusesBrokenFiles) {
  const std::string whole = small_bpe().dump();
  for (std::size_t size = 0; size < whole.size(); size += 7) {
    SCOPED_TRACE(size);
    expect_refused(whole.substr(0, size), "", "expected JSON");
  }
  expect_refused(std::string(100'000, '['), "", "expected JSON");
  expect_refused("[]", "", "expected an object");
  expect_refused(std::string(100'000, '[') + std::string(100'000, ']'), "", "expected an object");
  expect_refused("{}", "", "\"model\"");
  expect_refused(R"({"model": {"type": "Unigram", "vocab": [["a", 1e999]]}})", "", "expected JSON");
}

TEST_F(TokenizerFile, RefusesAMissingFile) {
  try {
    open_tokenizer(folder_);
    ADD_FAILURE() << "accepted";
  } catch (const InputError& error) {
    EXPECT_EQ(error.field(), "tokenizer.json");
  }
  EXPECT_THROW(open_tokenizer(folder_ / "absent.gguf"), InputError);
}

struct Hostile {
  const char* name;
  const char* pointer;  // what is replaced in small_bpe()
  json value;
  const char* field;
  const char* message;
};

void PrintTo(const Hostile& row, std::ostream* out) { *out << row.name; }

json nested_sequence(int depth) {
  json step = {{"type", "NFC"}};
  for (int i = 0; i < depth; ++i)
    step = {{"type", "Sequence"}, {"normalizers", json::array({step})}};
  return step;
}
json split(const json& pattern, const char* behavior = "Isolated") {
  return {{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}};
}
json unigram(const json& vocab, const json& unk_id = nullptr) {
  return {{"type", "Unigram"}, {"vocab", vocab}, {"unk_id", unk_id}};
}
json byte_level_then_digits() {
  return {{"type", "Sequence"},
          {"pretokenizers", json::array({{{"type", "ByteLevel"}}, {{"type", "Digits"}}})}};
}

const Hostile kHostile[] = {
    {"ModelIsAString", "/model", "BPE", "/model", "expected an object"},
    {"UnknownModel", "/model/type", "WordPiece", "/model", "WordPiece"},
    {"TypeIsANumber", "/model/type", 3, "/model/type", "expected a string"},
    {"VocabIsAnArray", "/model/vocab", json::array(), "/model/vocab", "expected an object"},
    {"IdIsAString", "/model/vocab/ab", "3", "/model/vocab/ab", "expected a token id"},
    {"IdIsNegative", "/model/vocab/ab", -1, "/model/vocab/ab", "found -1"},
    {"IdIsHuge", "/model/vocab/ab", 1u << 31, "/model/vocab/ab", "found 2147483648"},
    {"IdIsFractional", "/model/vocab/ab", 1.5, "/model/vocab/ab", "expected a token id"},
    {"IdTwice", "/model/vocab/ab", 1, "/model", "given twice"},
    {"MergesAreMissing", "/model/merges", nullptr, "/model", "\"merges\""},
    {"MergesAreAnObject", "/model/merges", json::object(), "/model/merges", "expected an array"},
    {"MergeOfUnknownToken", "/model/merges/1", "ab z", "/model/merges/1", "\"z\""},
    {"MergeGivesUnknownToken", "/model/merges/1", "b c", "/model/merges/1", "\"bc\""},
    {"MergeOfOne", "/model/merges/0", "ab", "/model/merges/0", "a space between"},
    {"MergeOfThree", "/model/merges/0", "a b c", "/model/merges/0", "a space between"},
    {"MergeArrayOfThree", "/model/merges/1", {"a", "b", "c"}, "/model/merges/1", "an array of 2"},
    {"MergeArrayOfNumbers", "/model/merges/1", {0, 1}, "/model/merges/1/0", "expected a string"},
    {"UnknownTokenIsUnknown", "/model/unk_token", "!", "/model/unk_token", "\"!\""},
    {"Dropout", "/model/dropout", 0.1, "/model/dropout", "dropout"},
    {"WordSuffix", "/model/end_of_word_suffix", "</w>", "/model/end_of_word_suffix",
     "end_of_word_suffix"},
    {"FuseIsANumber", "/model/fuse_unk", 1, "/model/fuse_unk", "true or false"},
    {"AddedIdIsHuge", "/added_tokens/0/id", 1 << 20, "/added_tokens/0/id", "found 1048576"},
    {"AddedWithoutContent", "/added_tokens/0/content", nullptr, "/added_tokens/0", "\"content\""},
    {"AddedSingleWord", "/added_tokens/0/single_word", true, "/added_tokens/0", "single_word"},
    {"AddedIsAnObject", "/added_tokens", json::object(), "/added_tokens", "expected an array"},
    {"UnknownNormalizer", "/normalizer", {{"type", "Precompiled"}}, "/normalizer", "Precompiled"},
    {"NormalizerIsAnArray", "/normalizer", json::array(), "/normalizer", "expected an object"},
    {"DeepSequence", "/normalizer", nested_sequence(12),
     "/normalizer/normalizers/0/normalizers/0/normalizers/0/normalizers/0/normalizers/0/"
     "normalizers/0/"
     "normalizers/0/normalizers/0/normalizers/0",
     "too deeply"},
    {"UnknownPreTokenizer",
     "/pre_tokenizer",
     {{"type", "UnicodeScripts"}},
     "/pre_tokenizer",
     "UnicodeScripts"},
    {"AfterByteLevel", "/pre_tokenizer", byte_level_then_digits(), "/pre_tokenizer/pretokenizers/1",
     "Digits after ByteLevel"},
    {"UnknownBehavior", "/pre_tokenizer", split({{"String", "a"}}, "Both"),
     "/pre_tokenizer/behavior", "Both"},
    {"PatternIsAString", "/pre_tokenizer", split("a"), "/pre_tokenizer/pattern",
     "expected an object"},
    {"PatternIsBroken", "/pre_tokenizer", split({{"Regex", "a("}}), "/pre_tokenizer/pattern",
     "refused at byte 2"},
    {"PatternIsGigantic", "/pre_tokenizer", split({{"Regex", std::string(1 << 20, 'a')}}),
     "/pre_tokenizer/pattern", "1048576 bytes"},
    {"PatternIsNestedDeeply", "/pre_tokenizer",
     split({{"Regex", std::string(5000, '(') + std::string(5000, ')')}}), "/pre_tokenizer/pattern",
     "refused"},
    {"PatternExplodes", "/pre_tokenizer", split({{"Regex", "(((a{1,999}){1,999}){1,999}){1,999}"}}),
     "/pre_tokenizer/pattern", "refused"},
    {"UnigramEntryIsAString", "/model", unigram(json::parse(R"(["a"])")), "/model/vocab/0",
     "an array of 2"},
    {"UnigramScoreIsAString", "/model", unigram(json::parse(R"([["a", "b"]])")), "/model/vocab/0/1",
     "expected a number"},
    {"UnigramUnknownId", "/model", unigram(json::parse(R"([["a", 0], ["b", 0]])"), 2),
     "/model/unk_id", "below 2"},
};

class HostileTokenizer : public TokenizerFile, public ::testing::WithParamInterface<Hostile> {};

TEST_P(HostileTokenizer, IsRefusedNamingTheField) {
  const Hostile& row = GetParam();
  auto document = small_bpe();
  document[json::json_pointer(row.pointer)] = row.value;
  expect_refused(document.dump(), row.field, row.message);
}

INSTANTIATE_TEST_SUITE_P(Files, HostileTokenizer, ::testing::ValuesIn(kHostile),
                         [](const auto& info) { return std::string(info.param.name); });

// ---- GGUF metadata ----

/// Bytes of a GGUF file with metadata and no tensors.
class GgufBytes {
 public:
  GgufBytes& text(const std::string& key, const std::string& value) {
    begin(key, kString);
    put(value);
    return *this;
  }
  GgufBytes& integer(const std::string& key, std::int32_t value) {
    begin(key, kInt32);
    put(value);
    return *this;
  }
  GgufBytes& texts(const std::string& key, const std::vector<std::string>& values) {
    begin_array(key, kString, values.size());
    for (const auto& value : values) put(value);
    return *this;
  }
  GgufBytes& integers(const std::string& key, const std::vector<std::int32_t>& values) {
    begin_array(key, kInt32, values.size());
    for (const auto value : values) put(value);
    return *this;
  }
  GgufBytes& floats(const std::string& key, const std::vector<float>& values) {
    begin_array(key, kFloat32, values.size());
    for (const auto value : values) put(value);
    return *this;
  }
  std::string bytes() const {
    GgufBytes head;
    head.body_ = "GGUF";
    head.put(std::uint32_t{3});
    head.put(std::uint64_t{0});
    head.put(count_);
    return head.body_ + body_;
  }

 private:
  enum Type : std::uint32_t { kInt32 = 5, kFloat32 = 6, kString = 8, kArray = 9 };
  template <class T>
  void put(T value) {
    body_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put(const std::string& value) {
    put(static_cast<std::uint64_t>(value.size()));
    body_ += value;
  }
  void begin(const std::string& key, Type type) {
    ++count_;
    put(key);
    put(static_cast<std::uint32_t>(type));
  }
  void begin_array(const std::string& key, Type type, std::size_t size) {
    begin(key, kArray);
    put(static_cast<std::uint32_t>(type));
    put(static_cast<std::uint64_t>(size));
  }
  std::string body_;
  std::uint64_t count_ = 0;
};

class GgufTokenizer : public TokenizerFile {
 protected:
  std::unique_ptr<Tokenizer> open_gguf(const GgufBytes& gguf) const {
    std::ofstream(folder_ / "model.gguf", std::ios::binary) << gguf.bytes();
    return open_tokenizer(folder_ / "model.gguf");
  }
  void expect_gguf_refused(const GgufBytes& gguf, const std::string& field,
                           const std::string& message) const {
    try {
      open_gguf(gguf);
      ADD_FAILURE() << "accepted";
    } catch (const InputError& error) {
      EXPECT_EQ(error.field(), field);
      EXPECT_THAT(error.what(), HasSubstr(message));
    }
  }
  static GgufBytes with_model(const std::string& model) {
    return GgufBytes()
        .text("tokenizer.ggml.model", model)
        .texts("tokenizer.ggml.tokens", {"<unk>", "\u2581", "a", "b", "\u2581a"});
  }
};

TEST_F(GgufTokenizer, MergesByScore) {
  auto gguf = with_model("llama")
                  .floats("tokenizer.ggml.scores", {0, -1, -2, -3, -4})
                  .integer("tokenizer.ggml.unknown_token_id", 0);
  const auto tokenizer = open_gguf(gguf);
  EXPECT_THAT(tokenizer->encode("ab a"), ElementsAre(4, 3, 4)) << "a space is put in front";
  EXPECT_THAT(tokenizer->encode("b??"), ElementsAre(1, 3, 0));
  EXPECT_EQ(tokenizer->decode(tokenizer->encode("ab a")), "ab a");
}

TEST_F(GgufTokenizer, RefusesUnknownNames) {
  expect_gguf_refused(with_model("bert"), "tokenizer.ggml.model", "\"bert\"");
  expect_gguf_refused(with_model("gpt2").text("tokenizer.ggml.pre", "superbpe"),
                      "tokenizer.ggml.pre", "\"superbpe\"");
  expect_gguf_refused(with_model("t5").text("tokenizer.ggml.precompiled_charsmap", "x"),
                      "tokenizer.ggml.precompiled_charsmap", "not supported");
  expect_gguf_refused(GgufBytes().text("general.name", "x"), "tokenizer.ggml.tokens", "");
}

TEST_F(GgufTokenizer, RefusesContradictions) {
  expect_gguf_refused(with_model("gpt2").texts("tokenizer.ggml.merges", {"a b"}),
                      "tokenizer.ggml.merges/0", "\"ab\"");
  expect_gguf_refused(with_model("gpt2").texts("tokenizer.ggml.merges", {"ab"}),
                      "tokenizer.ggml.merges/0", "a space between");
  expect_gguf_refused(with_model("gpt2").integers("tokenizer.ggml.token_type", {1, 1}),
                      "tokenizer.ggml.token_type", "found 2");
  expect_gguf_refused(with_model("llama").floats("tokenizer.ggml.scores", {1}),
                      "tokenizer.ggml.scores", "found 1");
  expect_gguf_refused(with_model("llama").floats("tokenizer.ggml.scores", {0, 0, NAN, 0, 0}),
                      "tokenizer.ggml.scores/2", "finite");
  expect_gguf_refused(with_model("t5")
                          .floats("tokenizer.ggml.scores", {0, 0, 0, 0, 0})
                          .integer("tokenizer.ggml.unknown_token_id", 5),
                      "tokenizer.ggml.unknown_token_id", "below 5");
  expect_gguf_refused(GgufBytes()
                          .text("tokenizer.ggml.model", "gpt2")
                          .texts("tokenizer.ggml.tokens", {"a", "\xff"}),
                      "tokenizer.ggml.tokens/1", "UTF-8");
}

}  // namespace
}  // namespace kvplan::tokenizers
