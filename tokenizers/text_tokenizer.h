#pragma once
// The tokenizer that both containers describe: added tokens, normaliser, pre-tokenizer, subword
// model.

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "tokenizers/added_tokens.h"
#include "tokenizers/normalizer.h"
#include "tokenizers/pretokenizer.h"
#include "tokenizers/subword.h"
#include "tokenizers/tokenizer.h"

namespace kvplan::tokenizers {

inline constexpr std::int64_t kMaxVocabSize = 1 << 20;  // four times the largest in use
inline constexpr std::size_t kMaxTokenBytes = 1 << 16;

struct TokenizerParts {
  std::string file;              // named in errors
  AddedTokens added;             // found in the text as it is
  AddedTokens added_normalized;  // found in normalised text; their texts are normalised already
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::unique_ptr<const SubwordModel> model;
  bool independent_words = false;  // words_are_independent
  std::vector<std::string> texts;  // what each id decodes to; its size is the vocabulary's
  bool strip_first_space = false;  // of decoded text: the one that encode put there
};

class TextTokenizer final : public Tokenizer {
 public:
  explicit TextTokenizer(TokenizerParts parts) : parts_(std::move(parts)) {}
  std::vector<std::int32_t> encode(std::string_view text, bool parse_special) const override;
  std::string decode(std::span<const std::int32_t> ids) const override;
  std::int32_t vocab_size() const override {
    return static_cast<std::int32_t>(parts_.texts.size());
  }

 private:
  class Encoding;
  TokenizerParts parts_;
};

TokenizerParts read_gguf_tokenizer(const std::filesystem::path& gguf);
TokenizerParts read_tokenizer_json(const std::filesystem::path& json);

/// What the ids of a SentencePiece-style vocabulary decode to: U+2581 is a space, <0x0A> a byte.
std::string text_of_sentencepiece(std::string_view token);

}  // namespace kvplan::tokenizers
