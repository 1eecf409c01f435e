#include "tokenizers/text_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "schemas/error.h"
#include "tests/schemas/examples.h"
#include "tests/schemas/gguf_builder.h"
#include "tokenizers/special_tokens.h"

namespace kvplan::tokenizers {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::ThrowsMessage;

/// Token i is pieces[i]; the first space of a text is dropped, as SentencePiece tokenizers do.
class PieceTokenizer : public Tokenizer {
 public:
  explicit PieceTokenizer(std::vector<std::string> pieces) : pieces_(std::move(pieces)) {}
  std::vector<std::int32_t> encode(std::string_view, bool) const override { return {}; }
  std::string decode(std::span<const std::int32_t> ids) const override {
    std::string text;
    for (const std::int32_t id : ids) text += pieces_.at(static_cast<std::size_t>(id));
    return text.starts_with(' ') ? text.substr(1) : text;
  }
  std::int32_t vocab_size() const override { return static_cast<std::int32_t>(pieces_.size()); }

 private:
  std::vector<std::string> pieces_;
};

struct StreamCase {
  const char* name;
  std::vector<std::string> pieces;    // in the order of the text
  std::vector<std::string> expected;  // after each, then at the end
};

class Stream : public testing::TestWithParam<StreamCase> {};

TEST_P(Stream, GivesWholeCharacters) {
  std::vector<std::string> pieces = GetParam().pieces;
  pieces.insert(pieces.begin(), " the");  // the end of the prompt
  const PieceTokenizer tokenizer(pieces);
  TextStream stream(tokenizer, 0);
  std::vector<std::string> found;
  for (std::int32_t token = 1; token < tokenizer.vocab_size(); ++token)
    found.push_back(stream.add(token));
  found.push_back(stream.finish());
  EXPECT_EQ(found, GetParam().expected);
}

INSTANTIATE_TEST_SUITE_P(
    Texts, Stream,
    testing::Values(
        StreamCase{"SpacesStay", {" cat", " sat", "."}, {" cat", " sat", ".", ""}},
        StreamCase{"ACharacterInThreeTokens", {"a\xE2", "\x82", "\xAC!"}, {"a", "", "€!", ""}},
        StreamCase{"FourBytes", {"\xF0", "\x9F\x99", "\x82"}, {"", "", "🙂", ""}},
        StreamCase{"LowestAndHighest",
                   {"\xE0", "\xA0\x80", "\xF4", "\x8F\xBF\xBF", "\xED", "\x9F\xBF"},
                   {"", "\xE0\xA0\x80", "", "\xF4\x8F\xBF\xBF", "", "\xED\x9F\xBF", ""}},
        StreamCase{"CutShort", {"a\xE2\x82"}, {"a", "\uFFFD"}},
        StreamCase{"CutShortInTheMiddle", {"\xE2\x82", "b"}, {"", "\uFFFD\uFFFDb", ""}},
        StreamCase{"NeverACharacter",
                   {"\xFFz", "\x80", "\xC0\x80"},
                   {"\uFFFDz", "\uFFFD", "\uFFFD\uFFFD", ""}}),
    [](const auto& row) { return std::string(row.param.name); });

class SpecialTokensTest : public testing::Test {
 protected:
  void write(const char* name, const std::string& content) {
    std::filesystem::create_directories(folder_ / "model");
    test::write_bytes(folder_ / "model" / name, content);
  }
  SpecialTokens read() { return read_special_tokens(folder_ / "model", 100); }
  test::TemporaryFolder folder_;
};

TEST_F(SpecialTokensTest, TemplateOfATokenizer) {
  write("tokenizer.json", R"({"post_processor": {"type": "Sequence", "processors": [
    {"type": "ByteLevel"},
    {"type": "TemplateProcessing",
     "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}],
     "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]},
                        "</s>": {"id": "</s>", "ids": [8], "tokens": ["</s>"]}}}]}})");
  write("config.json", R"({"eos_token_id": 3})");
  EXPECT_THAT(read().before_text, ElementsAre(7));
  EXPECT_THAT(read().end_of_text, ElementsAre(3));
  write("generation_config.json", R"({"eos_token_id": [5, 6, 5]})");
  EXPECT_THAT(read().end_of_text, ElementsAre(5, 6));
}

TEST_F(SpecialTokensTest, NothingSaysNothing) {
  write("tokenizer.json", R"({"post_processor": null})");
  write("config.json", R"({"eos_token_id": null})");
  EXPECT_THAT(read().before_text, IsEmpty());
  EXPECT_THAT(read().end_of_text, IsEmpty());
}

TEST_F(SpecialTokensTest, RefusesDamage) {
  write("config.json", R"({"eos_token_id": 100})");
  EXPECT_THAT([&] { read(); }, ThrowsMessage<InputError>(HasSubstr("below 100, found 100")));
  write("config.json", R"({"eos_token_id": "</s>"})");
  EXPECT_THAT([&] { read(); }, ThrowsMessage<InputError>(HasSubstr("/eos_token_id")));
  write("config.json", "{");
  EXPECT_THAT([&] { read(); }, ThrowsMessage<InputError>(HasSubstr("expected JSON")));
  write("config.json", "{}");
  write("tokenizer.json", R"({"post_processor": {"type": "TemplateProcessing"}})");
  EXPECT_THAT([&] { read(); }, ThrowsMessage<InputError>(HasSubstr("/post_processor")));
  write("tokenizer.json", R"({"post_processor": {"type": "TemplateProcessing", "single":
    [{"SpecialToken": {"id": "<s>"}}], "special_tokens": {"<s>": {"ids": [-1]}}}})");
  EXPECT_THAT([&] { read(); }, ThrowsMessage<InputError>(HasSubstr("found -1")));
}

TEST_F(SpecialTokensTest, GgufMetadata) {
  GgufBuilder gguf;
  const auto found = [&] {
    test::write_bytes(folder_ / "m.gguf", gguf.bytes());
    return read_special_tokens(folder_ / "m.gguf", 100);
  };
  gguf.set("tokenizer.ggml.model", GgufBuilder::text("gpt2"));
  gguf.set("tokenizer.ggml.pre", GgufBuilder::text("smollm"));
  EXPECT_THAT(found().end_of_text, IsEmpty());
  gguf.set("tokenizer.ggml.bos_token_id", GgufBuilder::u32(1));
  gguf.set("tokenizer.ggml.eos_token_id", GgufBuilder::u32(2));
  gguf.set("tokenizer.ggml.eot_token_id", GgufBuilder::u32(9));
  EXPECT_THAT(found().end_of_text, ElementsAre(2, 9));
  EXPECT_THAT(found().before_text, IsEmpty());
  gguf.set("tokenizer.ggml.pre", GgufBuilder::text("llama-bpe"));
  EXPECT_THAT(found().before_text, ElementsAre(1));
  gguf.set("tokenizer.ggml.add_bos_token", GgufBuilder::boolean(0));
  EXPECT_THAT(found().before_text, IsEmpty());
  gguf.set("tokenizer.ggml.pre", GgufBuilder::text("qwen2"));
  gguf.set("tokenizer.ggml.add_bos_token", GgufBuilder::boolean(1));
  EXPECT_THAT(found().before_text, ElementsAre(1));
  gguf.set("tokenizer.ggml.bos_token_id", GgufBuilder::u32(100));
  EXPECT_THAT([&] { found(); }, ThrowsMessage<InputError>(HasSubstr("bos_token_id")));
}

}  // namespace
}  // namespace kvplan::tokenizers
