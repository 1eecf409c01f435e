#pragma once
// Text to token ids, from GGUF metadata or tokenizer.json: byte-level BPE, SentencePiece-style BPE
// and unigram.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvplan::tokenizers {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  /// Ids of `text`, no BOS or EOS added; special tokens in the text are recognised when
  /// parse_special. InputError on invalid UTF-8.
  virtual std::vector<std::int32_t> encode(std::string_view text,
                                           bool parse_special = false) const = 0;
  virtual std::string decode(std::span<const std::int32_t> ids) const = 0;
  virtual std::int32_t vocab_size() const = 0;
};

/// `model_path`: a .gguf file or a folder with tokenizer.json. InputError: missing, unknown
/// tokenizer model or pre-tokenizer (by name), ids outside the vocabulary.
std::unique_ptr<Tokenizer> open_tokenizer(const std::filesystem::path& model_path);

}  // namespace kvplan::tokenizers
