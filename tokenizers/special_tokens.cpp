#include "tokenizers/special_tokens.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "schemas/gguf.h"

namespace kvplan::tokenizers {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxFileBytes = std::size_t{256} << 20;

/// Ids as they are found in one file, each once.
class Ids {
 public:
  Ids(std::string file, std::int32_t vocab_size)
      : file_(std::move(file)), vocab_size_(vocab_size) {}

  void add(const std::string& field, std::int64_t id, std::vector<std::int32_t>& to) const {
    if (id < 0 || id >= vocab_size_)
      throw InputError(file_, field,
                       "expected a token id below " + std::to_string(vocab_size_) + ", found " +
                           std::to_string(id));
    if (std::find(to.begin(), to.end(), id) == to.end())
      to.push_back(static_cast<std::int32_t>(id));
  }

  /// A number, or an array of numbers.
  void add(const std::string& field, const json& ids, std::vector<std::int32_t>& to) const {
    if (ids.is_array()) {
      for (const json& id : ids) add(field, id, to);
    } else if (ids.is_number_integer()) {
      add(field, ids.get<std::int64_t>(), to);
    } else {
      throw InputError(file_, field, std::string("expected token ids, found ") + ids.type_name());
    }
  }

 private:
  std::string file_;
  std::int32_t vocab_size_;
};

/// Where add_bos_token is missing: SentencePiece models and Llama 3 begin a text with it.
bool adds_bos_by_default(const GgufFile& gguf) {
  constexpr std::array<std::string_view, 4> kFamilies = {"llama-bpe", "llama3", "llama-v3",
                                                         "falcon3"};
  const std::string pre = gguf.string_or("tokenizer.ggml.pre", "");
  return gguf.string_or("tokenizer.ggml.model", "") == "llama" ||
         std::find(kFamilies.begin(), kFamilies.end(), pre) != kFamilies.end();
}

SpecialTokens read_gguf(const std::filesystem::path& path, std::int32_t vocab_size) {
  constexpr const char* kBosKey = "tokenizer.ggml.bos_token_id";
  constexpr std::array<const char*, 3> kEndKeys = {
      "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
  const GgufFile gguf(path);
  const Ids ids(path.string(), vocab_size);
  SpecialTokens tokens;
  if (gguf.has(kBosKey) &&
      gguf.boolean_or("tokenizer.ggml.add_bos_token", adds_bos_by_default(gguf)))
    ids.add(kBosKey, gguf.integer(kBosKey), tokens.before_text);
  for (const char* key : kEndKeys)
    if (gguf.has(key)) ids.add(key, gguf.integer(key), tokens.end_of_text);
  return tokens;
}

/// Null when the file is missing.
json read_json(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return nullptr;
  try {
    return json::parse(read_text_file(path, kMaxFileBytes));
  } catch (const json::exception& error) {
    throw InputError(path.string(), "", std::string("expected JSON: ") + error.what());
  }
}

/// The special tokens that a template puts before its first sequence.
void add_template_prefix(const json& processor, const Ids& ids, std::vector<std::int32_t>& to) {
  const std::string type = processor.value("type", "");
  if (type == "Sequence") {
    for (const json& inner : processor.at("processors")) add_template_prefix(inner, ids, to);
  } else if (type == "TemplateProcessing") {
    for (const json& piece : processor.at("single")) {
      if (!piece.contains("SpecialToken")) break;
      const auto name = piece.at("SpecialToken").at("id").get<std::string>();
      ids.add("/post_processor/special_tokens/" + name,
              processor.at("special_tokens").at(name).at("ids"), to);
    }
  }
}

SpecialTokens read_folder(const std::filesystem::path& folder, std::int32_t vocab_size) {
  SpecialTokens tokens;
  const auto tokenizer_file = folder / "tokenizer.json";
  try {
    const json tokenizer = read_json(tokenizer_file);
    if (tokenizer.is_object() && tokenizer.contains("post_processor") &&
        tokenizer.at("post_processor").is_object())
      add_template_prefix(tokenizer.at("post_processor"), Ids(tokenizer_file.string(), vocab_size),
                          tokens.before_text);
  } catch (const json::exception& error) {
    throw InputError(
        tokenizer_file.string(), "/post_processor",
        std::string("expected a template as the tokenizers package writes it: ") + error.what());
  }
  for (const char* name : {"generation_config.json", "config.json"}) {
    const auto file = folder / name;
    const json config = read_json(file);
    if (!config.is_object() || !config.contains("eos_token_id") ||
        config.at("eos_token_id").is_null())
      continue;
    Ids(file.string(), vocab_size)
        .add("/eos_token_id", config.at("eos_token_id"), tokens.end_of_text);
    break;
  }
  return tokens;
}

}  // namespace

SpecialTokens read_special_tokens(const std::filesystem::path& model_path,
                                  std::int32_t vocab_size) {
  return std::filesystem::is_directory(model_path) ? read_folder(model_path, vocab_size)
                                                   : read_gguf(model_path, vocab_size);
}

}  // namespace kvplan::tokenizers
