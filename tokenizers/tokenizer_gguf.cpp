// The tokenizer in the metadata of a GGUF file.

#include <algorithm>
#include <cmath>
#include <span>

#include "schemas/error.h"
#include "schemas/gguf.h"
#include "tokenizers/bpe.h"
#include "tokenizers/sentencepiece.h"
#include "tokenizers/text_tokenizer.h"

namespace kvplan::tokenizers {
namespace {

constexpr const char* kTokensKey = "tokenizer.ggml.tokens";
constexpr const char* kTypesKey = "tokenizer.ggml.token_type";
constexpr const char* kScoresKey = "tokenizer.ggml.scores";
constexpr const char* kMergesKey = "tokenizer.ggml.merges";
constexpr const char* kUnknownKey = "tokenizer.ggml.unknown_token_id";
constexpr const char* kPrefixKey = "tokenizer.ggml.add_space_prefix";

/// tokenizer.ggml.token_type
enum TokenType : std::int64_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

/// What tokenizer.ggml.pre stands for: the splits one after the other, every match a piece. The
/// patterns are those of the families' tokenizer.json, so a model has the same ids in both
/// containers (hence NFC for qwen2, too).
struct Family {
  std::span<const std::string_view> names;
  std::span<const std::string_view> patterns;
  bool ignore_merges = false;
  bool nfc = false;
};

// clang-format off
constexpr std::string_view kDefaultNames[] = {"default"};
constexpr std::string_view kDefaultPatterns[] = {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2Pattern, R"(\p{N}+)", "[0-9][0-9][0-9]"};
constexpr std::string_view kGpt2Names[] = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat"};
constexpr std::string_view kGpt2Patterns[] = {kGpt2Pattern};
constexpr std::string_view kSmollmNames[] = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"};
constexpr std::string_view kSmollmPatterns[] = {R"(\p{N})", kGpt2Pattern};
constexpr std::string_view kLlama3Names[] = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"};
constexpr std::string_view kLlama3Patterns[] = {
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"};
constexpr std::string_view kLlama3MergedNames[] = {"smaug-bpe", "dbrx"};
constexpr std::string_view kQwen2Names[] = {"qwen2", "deepseek-r1-qwen"};
constexpr std::string_view kQwen2Patterns[] = {
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"};
constexpr std::string_view kTekkenNames[] = {"tekken"};
constexpr std::string_view kTekkenPatterns[] = {
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"};

constexpr Family kFamilies[] = {
    {kDefaultNames, kDefaultPatterns},
    {kGpt2Names, kGpt2Patterns},
    {kSmollmNames, kSmollmPatterns},
    {kLlama3Names, kLlama3Patterns, /*ignore_merges=*/true},
    {kLlama3MergedNames, kLlama3Patterns},
    {kQwen2Names, kQwen2Patterns, /*ignore_merges=*/false, /*nfc=*/true},
    {kTekkenNames, kTekkenPatterns, /*ignore_merges=*/true},
};
// clang-format on

const Family* find_family(std::string_view name) {
  for (const Family& family : kFamilies) {
    if (std::ranges::find(family.names, name) != family.names.end()) return &family;
  }
  return nullptr;
}

std::string family_names() {
  std::string names;
  for (const Family& family : kFamilies) {
    for (const auto name : family.names) names.append(names.empty() ? "" : ", ").append(name);
  }
  return names;
}

/// The metadata that all models share, checked.
class Reader {
 public:
  explicit Reader(const std::filesystem::path& path)
      : gguf_(path), file_(path.string()), tokens_(gguf_.strings(kTokensKey)) {
    if (tokens_.empty() || tokens_.size() > kMaxVocabSize) {
      fail(kTokensKey, "expected 1 to " + std::to_string(kMaxVocabSize) + " tokens, found " +
                           std::to_string(tokens_.size()));
    }
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      if (tokens_[id].size() > kMaxTokenBytes || find_invalid_utf8(tokens_[id])) {
        fail(at(kTokensKey, id),
             "expected UTF-8 of at most " + std::to_string(kMaxTokenBytes) + " bytes");
      }
    }
    if (gguf_.has(kTypesKey)) {
      types_ = gguf_.integers(kTypesKey);
      require_one_per_token(kTypesKey, types_.size());
    }
  }

  TokenizerParts read() const {
    const std::string model = gguf_.string("tokenizer.ggml.model");
    TokenizerParts parts;
    if (model == "gpt2") {
      parts = read_byte_bpe();
    } else if (model == "llama") {
      parts = read_score_bpe();
    } else if (model == "t5") {
      parts = read_unigram();
    } else {
      fail("tokenizer.ggml.model",
           "expected gpt2, llama or t5, found \"" + model + "\", which is not supported");
    }
    parts.file = file_;
    parts.added = added_tokens();
    return parts;
  }

 private:
  [[noreturn]] void fail(const std::string& key, const std::string& message) const {
    throw InputError(file_, key, message);
  }
  static std::string at(const char* key, std::size_t index) {
    return std::string(key) + "/" + std::to_string(index);
  }
  void require_one_per_token(const char* key, std::size_t found) const {
    if (found == tokens_.size()) return;
    fail(key, "expected " + std::to_string(tokens_.size()) + " values, one per token, found " +
                  std::to_string(found));
  }
  std::int64_t type(std::size_t id) const { return types_.empty() ? kNormal : types_[id]; }
  bool is_control(std::size_t id) const { return type(id) == kControl || type(id) == kUnknown; }

  AddedTokens added_tokens() const {
    std::vector<AddedToken> added;
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      if (!is_control(id) && type(id) != kUserDefined) continue;
      added.push_back({tokens_[id], static_cast<std::int32_t>(id), is_control(id)});
    }
    return AddedTokens(std::move(added));
  }

  /// Ids of the tokens that `wanted(id)`.
  template <class Wanted>
  TokenMap token_map(const Wanted& wanted) const {
    TokenMap map;
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      if (wanted(id)) map.insert_or_assign(tokens_[id], static_cast<std::int32_t>(id));
    }
    return map;
  }

  TokenizerParts read_byte_bpe() const {
    const std::string name = gguf_.string_or("tokenizer.ggml.pre", "default");
    const Family* family = find_family(name);
    if (family == nullptr) {
      fail("tokenizer.ggml.pre", "expected one of " + family_names() + "; found \"" + name +
                                     "\", which is not supported");
    }
    TokenizerParts parts;
    if (family->nfc) parts.normalizer.steps.emplace_back(ToNormalForm{NormalForm::kNfc});
    if (gguf_.boolean_or(kPrefixKey, false)) parts.pre_tokenizer.steps.emplace_back(PrefixSpace{});
    for (const auto pattern : family->patterns)
      parts.pre_tokenizer.steps.emplace_back(Split{Regex(pattern)});

    MergeTable merges = read_merges();
    TokenMap byte_tokens;
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      auto bytes = type(id) == kUserDefined ? std::nullopt : bytes_of_byte_alphabet(tokens_[id]);
      parts.texts.push_back(bytes.value_or(tokens_[id]));
      if (bytes) byte_tokens.insert_or_assign(std::move(*bytes), static_cast<std::int32_t>(id));
    }
    parts.strip_first_space = gguf_.boolean_or(kPrefixKey, false);
    parts.model = std::make_unique<Bpe>(std::move(byte_tokens), std::move(merges),
                                        BpeOptions{/*byte_level=*/true, family->ignore_merges, {}});
    return parts;
  }

  MergeTable read_merges() const {
    const auto tokens = token_map([](std::size_t) { return true; });
    const auto& merges = gguf_.strings(kMergesKey);
    MergeTable table;
    for (std::size_t rank = 0; rank < merges.size(); ++rank) {
      const std::string_view text = merges[rank];
      const auto space = text.find(' ', 1);
      if (space == std::string_view::npos) {
        fail(at(kMergesKey, rank),
             "expected two tokens with a space between, found \"" + merges[rank] + "\"");
      }
      const auto left = text.substr(0, space), right = text.substr(space + 1);
      const auto id_of = [&](std::string_view token) {
        const auto found = tokens.find(token);
        if (found == tokens.end()) {
          fail(at(kMergesKey, rank),
               "expected tokens of the vocabulary, found \"" + std::string(token) + "\"");
        }
        return found->second;
      };
      const auto left_id = id_of(left), right_id = id_of(right);
      table.add(left_id, right_id,
                {static_cast<double>(rank), id_of(std::string(left).append(right))});
    }
    return table;
  }

  const std::vector<double>& scores() const {
    const auto& scores = gguf_.numbers(kScoresKey);
    require_one_per_token(kScoresKey, scores.size());
    const auto bad =
        std::ranges::find_if(scores, [](double score) { return !std::isfinite(score); });
    if (bad != scores.end()) {
      fail(at(kScoresKey, static_cast<std::size_t>(bad - scores.begin())),
           "expected a finite score");
    }
    return scores;
  }

  Fallback fallback() const {
    Fallback fallback;
    fallback.byte_ids =
        Fallback::find_byte_ids(token_map([&](std::size_t id) { return type(id) == kByte; }));
    if (gguf_.has(kUnknownKey)) {
      const auto id = gguf_.integer(kUnknownKey);
      if (id < 0 || static_cast<std::size_t>(id) >= tokens_.size()) {
        fail(kUnknownKey, "expected an id below " + std::to_string(tokens_.size()) + ", found " +
                              std::to_string(id));
      }
      fallback.unknown_id = static_cast<std::int32_t>(id);
    }
    return fallback;
  }

  /// What both SentencePiece models share: spaces as U+2581, one in front, and how ids decode.
  TokenizerParts sentencepiece_parts() const {
    TokenizerParts parts;
    auto& steps = parts.normalizer.steps;
    parts.strip_first_space = gguf_.boolean_or(kPrefixKey, true);
    if (parts.strip_first_space) steps.emplace_back(Prepend{std::string(kSpaceMark)});
    steps.emplace_back(Replace{Regex::literal(" "), std::string(kSpaceMark)});
    for (const auto& token : tokens_) parts.texts.push_back(text_of_sentencepiece(token));
    return parts;
  }

  TokenizerParts read_score_bpe() const {
    TokenizerParts parts = sentencepiece_parts();
    auto tokens = token_map([&](std::size_t id) { return !is_control(id) && type(id) != kByte; });
    parts.independent_words = words_are_independent(tokens);
    parts.model = std::make_unique<ScoreBpe>(std::move(tokens), scores(), fallback());
    return parts;
  }

  TokenizerParts read_unigram() const {
    constexpr const char* kCharsMapKey = "tokenizer.ggml.precompiled_charsmap";
    if (gguf_.has(kCharsMapKey)) {
      fail(kCharsMapKey,
           "precompiled normalisation rules are not supported; supported are models trained with "
           "normalization_rule_name=identity");
    }
    TokenizerParts parts = sentencepiece_parts();
    if (gguf_.boolean_or("tokenizer.ggml.remove_extra_whitespaces", false)) {
      auto& steps = parts.normalizer.steps;
      steps.insert(steps.begin(), {Replace{Regex("^ +| +$"), ""}, Replace{Regex(" {2,}"), " "}});
    }
    const auto usable = [&](std::size_t id) {
      return type(id) == kNormal || type(id) == kUserDefined;
    };
    const auto& scores = this->scores();
    std::vector<Unigram::Token> tokens;
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      if (usable(id)) tokens.push_back({tokens_[id], scores[id], static_cast<std::int32_t>(id)});
    }
    parts.independent_words = words_are_independent(token_map(usable));
    parts.model = std::make_unique<Unigram>(std::move(tokens), fallback());
    return parts;
  }

  GgufFile gguf_;
  std::string file_;
  const std::vector<std::string>& tokens_;
  std::vector<std::int64_t> types_;
};

}  // namespace

TokenizerParts read_gguf_tokenizer(const std::filesystem::path& path) {
  return Reader(path).read();
}

}  // namespace kvplan::tokenizers
