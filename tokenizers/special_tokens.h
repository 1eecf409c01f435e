#pragma once
// The tokens that a model's files put before a text and end a text with.

#include <cstdint>
#include <filesystem>
#include <vector>

namespace kvplan::tokenizers {

struct SpecialTokens {
  std::vector<std::int32_t> before_text;  // BOS, where the tokenizer adds it
  std::vector<std::int32_t> end_of_text;  // EOS and other tokens that end a generation
};

/// `model_path`: a .gguf file (its metadata) or a folder (post_processor of tokenizer.json;
/// eos_token_id of generation_config.json, else of config.json). InputError: an id below 0 or not
/// below `vocab_size`, malformed JSON.
SpecialTokens read_special_tokens(const std::filesystem::path& model_path, std::int32_t vocab_size);

}  // namespace kvplan::tokenizers
