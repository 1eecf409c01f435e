#include "tokenizers/tokenizer.h"

#include <charconv>
#include <unordered_map>

#include "schemas/error.h"
#include "tokenizers/text_tokenizer.h"
#include "tokenizers/unicode.h"

namespace kvplan::tokenizers {

/// One call of encode: the ids so far, and where in them each piece seen has its own, so that a
/// word is encoded once.
class TextTokenizer::Encoding {
 public:
  explicit Encoding(const TokenizerParts& parts) : parts_(parts) {}

  void add_token(std::int32_t id) { ids_.push_back(id); }

  void add_text(std::string_view text, bool at_start) {
    for (const std::string_view piece : parts_.pre_tokenizer(text, at_start, arena_)) {
      if (parts_.independent_words) {
        for (const std::string_view word : cut_words(piece)) add_piece(word);
      } else {
        add_piece(piece);
      }
    }
  }

  /// Keeps `text` as long as the encoding, for pieces are views of it.
  std::string_view keep(std::string text) { return arena_.emplace_back(std::move(text)); }

  std::vector<std::int32_t> take_ids() { return std::move(ids_); }

 private:
  struct Ids {
    std::size_t begin, count;
  };

  void add_piece(std::string_view piece) {
    const auto [entry, is_new] = seen_.try_emplace(piece);
    if (is_new) {
      const std::size_t begin = ids_.size();
      parts_.model->encode(piece, ids_);
      entry->second = {begin, ids_.size() - begin};
      return;
    }
    const auto [begin, count] = entry->second;
    for (std::size_t i = 0; i < count; ++i) ids_.push_back(ids_[begin + i]);
  }

  const TokenizerParts& parts_;
  std::deque<std::string> arena_;
  std::vector<std::int32_t> ids_;
  std::unordered_map<std::string_view, Ids> seen_;
};

std::vector<std::int32_t> TextTokenizer::encode(std::string_view text, bool parse_special) const {
  if (const auto offset = find_invalid_utf8(text)) {
    throw InputError("text", "byte " + std::to_string(*offset),
                     "expected UTF-8, found an invalid sequence; convert the text to UTF-8");
  }
  Encoding encoding(parts_);
  bool at_start = true;
  const auto add_part = [&](const AddedTokens::Part& part) {
    if (part.token != nullptr) {
      encoding.add_token(part.token->id);
    } else {
      encoding.add_text(part.text, at_start);
    }
    at_start = false;
  };
  try {
    for (const auto& part : parts_.added.split(text, parse_special)) {
      if (part.token != nullptr) {
        add_part(part);
        continue;
      }
      const auto normalized = encoding.keep(parts_.normalizer(part.text));
      for (const auto& inner : parts_.added_normalized.split(normalized, parse_special))
        add_part(inner);
    }
  } catch (const RegexError& error) {
    throw InputError(parts_.file, "pre_tokenizer", error.what());
  }
  return encoding.take_ids();
}

std::string TextTokenizer::decode(std::span<const std::int32_t> ids) const {
  std::string text;
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) {
      throw ArgumentError("token id " + std::to_string(id) + " is outside the vocabulary of " +
                          std::to_string(vocab_size()) + " tokens");
    }
    text += parts_.texts[static_cast<std::size_t>(id)];
  }
  if (parts_.strip_first_space && text.starts_with(' ')) text.erase(0, 1);
  return text;
}

std::string text_of_sentencepiece(std::string_view token) {
  if (token.size() == 6 && token.starts_with("<0x") && token.ends_with('>')) {
    unsigned byte = 0;
    const char* end = token.data() + 5;
    if (std::from_chars(token.data() + 3, end, byte, 16).ptr == end) {
      return std::string(1, static_cast<char>(byte));
    }
  }
  std::string text;
  std::size_t done = 0;
  for (auto mark = token.find(kSpaceMark); mark != std::string_view::npos;
       mark = token.find(kSpaceMark, done)) {
    text.append(token.substr(done, mark - done)).push_back(' ');
    done = mark + kSpaceMark.size();
  }
  return text.append(token.substr(done));
}

std::unique_ptr<Tokenizer> open_tokenizer(const std::filesystem::path& model_path) {
  if (std::filesystem::is_directory(model_path)) {
    const auto json = model_path / "tokenizer.json";
    if (!std::filesystem::exists(json)) {
      throw InputError(model_path.string(), "tokenizer.json",
                       "expected this file in the folder, found none; save the tokenizer with the "
                       "tokenizers package (a tokenizer.model alone is not read)");
    }
    return std::make_unique<TextTokenizer>(read_tokenizer_json(json));
  }
  return std::make_unique<TextTokenizer>(read_gguf_tokenizer(model_path));
}

}  // namespace kvplan::tokenizers
