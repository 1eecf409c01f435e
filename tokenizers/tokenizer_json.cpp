// The tokenizer.json of the `tokenizers` package. What it describes and kvplan does not do is
// refused by name.

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "schemas/atomic_file.h"
#include "schemas/error.h"
#include "tokenizers/bpe.h"
#include "tokenizers/sentencepiece.h"
#include "tokenizers/text_tokenizer.h"

namespace kvplan::tokenizers {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxFileBytes = std::size_t{256} << 20;
constexpr int kMaxSequenceDepth = 8;

/// A value and its place in the file. The file name and the document outlive it.
class Field {
 public:
  Field(const std::string& file, const json& value, std::string pointer)
      : file_(&file), value_(&value), pointer_(std::move(pointer)) {}

  [[noreturn]] void fail(const std::string& message) const {
    throw InputError(*file_, pointer_, message);
  }
  [[noreturn]] void refuse(const std::string& what) const {
    fail(what +
         " is not supported; supported are the parts of byte-level BPE, SentencePiece BPE and "
         "unigram tokenizers");
  }

  /// The member, or nullopt when it is absent or null.
  std::optional<Field> find(const std::string& key) const {
    if (!value_->is_object()) fail_type("an object");
    const auto member = value_->find(key);
    if (member == value_->end() || member->is_null()) return std::nullopt;
    return Field(*file_, *member, pointer_ + "/" + key);
  }
  Field at(const std::string& key) const {
    if (auto member = find(key)) return *member;
    fail("expected a field \"" + key + "\", found none");
  }

  const std::string& string() const {
    if (!value_->is_string()) fail_type("a string");
    return value_->get_ref<const std::string&>();
  }
  double number() const {
    if (!value_->is_number()) fail_type("a number");
    return value_->get<double>();
  }
  std::int32_t id() const {
    if (!value_->is_number_integer()) fail_type("a token id");
    if (value_->is_number_unsigned() ? value_->get<std::uint64_t>() >= kMaxVocabSize
                                     : value_->get<std::int64_t>() < 0) {
      fail("expected a token id from 0 to " + std::to_string(kMaxVocabSize - 1) + ", found " +
           value_->dump());
    }
    return value_->get<std::int32_t>();
  }
  bool flag(const std::string& key, bool otherwise) const {
    const auto member = find(key);
    if (!member) return otherwise;
    if (!member->value_->is_boolean()) member->fail_type("true or false");
    return member->value_->get<bool>();
  }
  std::string string_or(const std::string& key, const char* otherwise) const {
    const auto member = find(key);
    return member ? member->string() : otherwise;
  }
  bool is_array() const { return value_->is_array(); }
  std::size_t size() const { return value_->size(); }
  Field element(std::size_t index) const {
    return Field(*file_, (*value_)[index], pointer_ + "/" + std::to_string(index));
  }
  const Field& array(std::size_t exact_size) const {
    if (!is_array() || size() != exact_size) fail_type("an array of " + std::to_string(exact_size));
    return *this;
  }
  std::vector<Field> elements() const {
    if (!is_array()) fail_type("an array");
    std::vector<Field> fields;
    fields.reserve(size());
    for (std::size_t i = 0; i < size(); ++i) fields.push_back(element(i));
    return fields;
  }
  std::vector<std::pair<std::string, Field>> members() const {
    if (!value_->is_object()) fail_type("an object");
    std::vector<std::pair<std::string, Field>> fields;
    fields.reserve(size());
    for (const auto& [key, member] : value_->items()) {
      fields.emplace_back(key, Field(*file_, member, pointer_ + "/" + key));
    }
    return fields;
  }

 private:
  [[noreturn]] void fail_type(const std::string& expected) const {
    fail("expected " + expected + ", found " + value_->type_name());
  }
  const std::string* file_;
  const json* value_;
  std::string pointer_;
};

Regex read_pattern(const Field& pattern) {
  try {
    if (const auto literal = pattern.find("String")) return Regex::literal(literal->string());
    return Regex(pattern.at("Regex").string());
  } catch (const RegexError& error) {
    pattern.fail(error.what());
  }
}

// ---- normalizer ----

void read_normalizer(const Field& field, int depth, Normalizer& normalizer) {
  static const std::map<std::string, NormalForm, std::less<>> kForms = {
      {"NFC", NormalForm::kNfc},
      {"NFD", NormalForm::kNfd},
      {"NFKC", NormalForm::kNfkc},
      {"NFKD", NormalForm::kNfkd}};
  if (depth > kMaxSequenceDepth) field.fail("Sequence is nested too deeply");
  const std::string& type = field.at("type").string();
  auto& steps = normalizer.steps;
  if (type == "Sequence") {
    for (const Field& inner : field.at("normalizers").elements()) {
      read_normalizer(inner, depth + 1, normalizer);
    }
  } else if (const auto form = kForms.find(type); form != kForms.end()) {
    steps.emplace_back(ToNormalForm{form->second});
  } else if (type == "Lowercase") {
    steps.emplace_back(ToLowerCase{});
  } else if (type == "StripAccents") {
    steps.emplace_back(WithoutMarks{});
  } else if (type == "Strip") {
    steps.emplace_back(Trim{field.flag("strip_left", true), field.flag("strip_right", true)});
  } else if (type == "Prepend") {
    steps.emplace_back(Prepend{field.at("prepend").string()});
  } else if (type == "Replace") {
    steps.emplace_back(Replace{read_pattern(field.at("pattern")), field.at("content").string()});
  } else {
    field.refuse("normalizer " + type);
  }
}

// ---- pre-tokenizer ----

struct PreTokenizerReading {
  PreTokenizer pre_tokenizer;
  bool byte_level = false;
  bool prepends_space = false;
};

SplitBehavior read_behavior(const Field& field) {
  static const std::map<std::string, SplitBehavior, std::less<>> kBehaviors = {
      {"Isolated", SplitBehavior::kIsolated},
      {"Removed", SplitBehavior::kRemoved},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext},
      {"Contiguous", SplitBehavior::kContiguous}};
  const auto found = kBehaviors.find(field.string());
  if (found == kBehaviors.end()) field.refuse("split behavior " + field.string());
  return found->second;
}

Metaspace::Prepend read_prepend_scheme(const Field& metaspace) {
  if (const auto scheme = metaspace.find("prepend_scheme")) {
    if (scheme->string() == "always") return Metaspace::Prepend::kAlways;
    if (scheme->string() == "first") return Metaspace::Prepend::kFirst;
    if (scheme->string() == "never") return Metaspace::Prepend::kNever;
    scheme->refuse("prepend_scheme " + scheme->string());
  }
  return metaspace.flag("add_prefix_space", true) ? Metaspace::Prepend::kAlways
                                                  : Metaspace::Prepend::kNever;
}

void read_pre_tokenizer(const Field& field, int depth, PreTokenizerReading& reading) {
  if (depth > kMaxSequenceDepth) field.fail("Sequence is nested too deeply");
  const std::string& type = field.at("type").string();
  auto& steps = reading.pre_tokenizer.steps;
  // ByteLevel renames bytes to letters; ours works on the bytes, so nothing may look at the text
  // after it.
  if (reading.byte_level) field.refuse("pre_tokenizer " + type + " after ByteLevel");
  if (type == "Sequence") {
    for (const Field& inner : field.at("pretokenizers").elements()) {
      read_pre_tokenizer(inner, depth + 1, reading);
    }
  } else if (type == "Split") {
    steps.emplace_back(Split{read_pattern(field.at("pattern")), read_behavior(field.at("behavior")),
                             field.flag("invert", false)});
  } else if (type == "Digits") {
    steps.emplace_back(
        Split{Regex(field.flag("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)")});
  } else if (type == "Punctuation") {
    steps.emplace_back(Split{Regex(R"([\p{P}$+<=>^`|~])"), read_behavior(field.at("behavior"))});
  } else if (type == "WhitespaceSplit") {
    steps.emplace_back(Split{Regex(R"(\s)"), SplitBehavior::kRemoved});
  } else if (type == "ByteLevel") {
    reading.byte_level = true;
    reading.prepends_space = field.flag("add_prefix_space", true);
    if (reading.prepends_space) steps.emplace_back(PrefixSpace{});
    if (field.flag("use_regex", true)) steps.emplace_back(Split{Regex(kGpt2Pattern)});
  } else if (type == "Metaspace") {
    const std::string& replacement = field.at("replacement").string();
    const auto prepend = read_prepend_scheme(field);
    reading.prepends_space |= prepend != Metaspace::Prepend::kNever;
    steps.emplace_back(Metaspace{Regex::literal(" "), replacement, prepend});
    if (field.flag("split", true)) {
      steps.emplace_back(Split{Regex::literal(replacement), SplitBehavior::kMergedWithNext});
    }
  } else {
    field.refuse("pre_tokenizer " + type);
  }
}

// ---- model ----

/// Every token of the model with its id, ids unique.
using Vocabulary = std::vector<std::pair<std::string, std::int32_t>>;

TokenMap token_map(const Vocabulary& vocabulary) {
  TokenMap tokens;
  tokens.reserve(vocabulary.size());
  for (const auto& [text, id] : vocabulary) tokens.insert_or_assign(text, id);
  return tokens;
}

TokenMap byte_token_map(const Vocabulary& vocabulary) {
  TokenMap tokens;
  tokens.reserve(vocabulary.size());
  for (const auto& [text, id] : vocabulary) {
    if (auto bytes = bytes_of_byte_alphabet(text)) tokens.insert_or_assign(std::move(*bytes), id);
  }
  return tokens;
}

void refuse_text_option(const Field& model, const std::string& key) {
  const auto option = model.find(key);
  if (option && !option->string().empty()) option->refuse("\"" + key + "\"");
}

/// Two token texts, from "a b" or ["a", "b"].
std::pair<std::string_view, std::string_view> read_merge(const Field& merge) {
  if (merge.is_array()) {
    merge.array(2);
    return {merge.element(0).string(), merge.element(1).string()};
  }
  const std::string_view text = merge.string();
  const auto space = text.find(' ');
  if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
    merge.fail("expected two tokens with a space between, found \"" + std::string(text) + "\"");
  }
  return {text.substr(0, space), text.substr(space + 1)};
}

MergeTable read_merges(const Field& merges, const TokenMap& tokens) {
  MergeTable table;
  std::string joined;
  const auto entries = merges.elements();
  for (std::size_t rank = 0; rank < entries.size(); ++rank) {
    const auto [left, right] = read_merge(entries[rank]);
    joined.assign(left).append(right);
    const auto id_of = [&](std::string_view text) {
      const auto token = tokens.find(text);
      if (token == tokens.end()) {
        entries[rank].fail("expected a token of the vocabulary, found \"" + std::string(text) +
                           "\"");
      }
      return token->second;
    };
    const auto left_id = id_of(left), right_id = id_of(right);
    table.add(left_id, right_id, {static_cast<double>(rank), id_of(joined)});
  }
  return table;
}

struct ModelReading {
  Vocabulary vocabulary;
  std::unique_ptr<const SubwordModel> model;
  bool independent_words = false;
};

ModelReading read_bpe(const Field& model, bool byte_level) {
  refuse_text_option(model, "continuing_subword_prefix");
  refuse_text_option(model, "end_of_word_suffix");
  if (const auto dropout = model.find("dropout"); dropout && dropout->number() != 0) {
    dropout->refuse("BPE with dropout");
  }
  ModelReading reading;
  for (const auto& [text, id] : model.at("vocab").members())
    reading.vocabulary.emplace_back(text, id.id());
  auto tokens = token_map(reading.vocabulary);
  auto merges = read_merges(model.at("merges"), tokens);

  BpeOptions options{byte_level, model.flag("ignore_merges", false), {}};
  options.fallback.fuse_unknown = model.flag("fuse_unk", false);
  if (model.flag("byte_fallback", false))
    options.fallback.byte_ids = Fallback::find_byte_ids(tokens);
  if (const auto unknown = model.find("unk_token")) {
    const auto token = tokens.find(unknown->string());
    if (token == tokens.end())
      unknown->fail("expected a token of the vocabulary, found \"" + unknown->string() + "\"");
    options.fallback.unknown_id = token->second;
  }
  if (byte_level) tokens = byte_token_map(reading.vocabulary);
  reading.independent_words = !byte_level && words_are_independent(tokens);
  reading.model = std::make_unique<Bpe>(std::move(tokens), std::move(merges), std::move(options));
  return reading;
}

ModelReading read_unigram(const Field& model) {
  ModelReading reading;
  std::vector<Unigram::Token> tokens;
  for (const Field& entry : model.at("vocab").elements()) {
    entry.array(2);
    const auto id = static_cast<std::int32_t>(tokens.size());
    if (id >= kMaxVocabSize)
      entry.fail("the vocabulary is larger than " + std::to_string(kMaxVocabSize));
    tokens.push_back({entry.element(0).string(), entry.element(1).number(), id});
    reading.vocabulary.emplace_back(tokens.back().text, id);
  }
  const auto map = token_map(reading.vocabulary);
  Fallback fallback;
  if (model.flag("byte_fallback", false)) fallback.byte_ids = Fallback::find_byte_ids(map);
  if (const auto unknown = model.find("unk_id")) {
    fallback.unknown_id = unknown->id();
    if (static_cast<std::size_t>(*fallback.unknown_id) >= tokens.size()) {
      unknown->fail("expected an id below " + std::to_string(tokens.size()) + ", found " +
                    std::to_string(*fallback.unknown_id));
    }
  }
  reading.independent_words = words_are_independent(map);
  reading.model = std::make_unique<Unigram>(std::move(tokens), std::move(fallback));
  return reading;
}

ModelReading read_model(const Field& model, bool byte_level) {
  // Files of before 2020 name no type; they hold BPE, which alone has merges.
  const std::string type = model.string_or("type", model.find("merges") ? "BPE" : "");
  if (type == "BPE") return read_bpe(model, byte_level);
  if (type == "Unigram" && !byte_level) return read_unigram(model);
  model.refuse("model \"" + type + "\"" + (byte_level ? " with ByteLevel" : ""));
}

// ---- the whole ----

/// Decodes of all ids; a hole in the ids decodes to nothing.
std::vector<std::string> decoded_texts(const Field& model, const Vocabulary& vocabulary,
                                       const std::vector<AddedToken>& added, bool byte_level) {
  std::int32_t size = 0;
  for (const auto& [text, id] : vocabulary) size = std::max(size, id + 1);
  for (const auto& token : added) size = std::max(size, token.id + 1);
  std::vector<std::string> texts(static_cast<std::size_t>(size));
  std::vector<bool> taken(texts.size());
  for (const auto& [text, id] : vocabulary) {
    const auto index = static_cast<std::size_t>(id);
    if (taken[index])
      model.fail("token id " + std::to_string(id) + " is given twice, once to \"" + text + "\"");
    taken[index] = true;
    texts[index] =
        byte_level ? bytes_of_byte_alphabet(text).value_or(text) : text_of_sentencepiece(text);
  }
  for (const auto& token : added) texts[static_cast<std::size_t>(token.id)] = token.text;
  return texts;
}

}  // namespace

TokenizerParts read_tokenizer_json(const std::filesystem::path& path) {
  TokenizerParts parts;
  parts.file = path.string();
  json document;
  try {
    document = json::parse(read_text_file(path, kMaxFileBytes));
  } catch (const json::exception& error) {
    throw InputError(parts.file, "", std::string("expected JSON: ") + error.what());
  }
  const Field root(parts.file, document, "");

  if (const auto normalizer = root.find("normalizer"))
    read_normalizer(*normalizer, 0, parts.normalizer);
  PreTokenizerReading pre;
  if (const auto field = root.find("pre_tokenizer")) read_pre_tokenizer(*field, 0, pre);
  parts.pre_tokenizer = std::move(pre.pre_tokenizer);

  const Field model = root.at("model");
  ModelReading reading = read_model(model, pre.byte_level);
  parts.model = std::move(reading.model);
  parts.independent_words = reading.independent_words;

  std::vector<AddedToken> plain, normalized, all;
  if (const auto added = root.find("added_tokens")) {
    for (const Field& entry : added->elements()) {
      if (entry.flag("single_word", false)) entry.refuse("an added token with single_word");
      AddedToken token{entry.at("content").string(), entry.at("id").id(),
                       entry.flag("special", false), entry.flag("lstrip", false),
                       entry.flag("rstrip", false)};
      all.push_back(token);
      if (entry.flag("normalized", false)) {
        token.text = parts.normalizer(token.text);
        normalized.push_back(std::move(token));
      } else {
        plain.push_back(std::move(token));
      }
    }
  }
  parts.texts = decoded_texts(model, reading.vocabulary, all, pre.byte_level);
  parts.added = AddedTokens(std::move(plain));
  parts.added_normalized = AddedTokens(std::move(normalized));
  const auto& steps = parts.normalizer.steps;
  parts.strip_first_space =
      pre.prepends_space || std::any_of(steps.begin(), steps.end(), [](const NormalizerStep& step) {
        return std::holds_alternative<Prepend>(step);
      });
  return parts;
}

}  // namespace kvplan::tokenizers
