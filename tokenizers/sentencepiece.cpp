#include "tokenizers/sentencepiece.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "tokenizers/merge.h"
#include "tokenizers/unicode.h"

namespace kvplan::tokenizers {
namespace {

constexpr double kUnknownPenalty = 10;  // kUnkPenalty of unigram_model.cc

/// Turns the parts of a segmentation into ids; kNoToken marks a part that no token covers.
class Emitter {
 public:
  Emitter(const Fallback& fallback, std::vector<std::int32_t>& ids)
      : fallback_(fallback), ids_(ids) {}

  void add(std::string_view text, std::int32_t id) {
    const bool known = id != kNoToken;
    if (known) {
      ids_.push_back(id);
    } else if (fallback_.byte_ids) {
      for (const char c : text)
        ids_.push_back((*fallback_.byte_ids)[static_cast<unsigned char>(c)]);
    } else if (fallback_.unknown_id && !(after_unknown_ && fallback_.fuse_unknown)) {
      ids_.push_back(*fallback_.unknown_id);
    }
    after_unknown_ = !known;
  }

 private:
  const Fallback& fallback_;
  std::vector<std::int32_t>& ids_;
  bool after_unknown_ = false;
};

}  // namespace

void ScoreBpe::encode(std::string_view piece, std::vector<std::int32_t>& ids) const {
  const auto id_of = [&](std::string_view text) {
    const auto token = tokens_.find(text);
    return token == tokens_.end() ? kNoToken : token->second;
  };
  std::vector<Symbol> symbols;
  for (std::size_t at = 0; at < piece.size(); at += utf8_length(piece[at])) {
    const std::string_view text = piece.substr(at, utf8_length(piece[at]));
    symbols.push_back({text, id_of(text)});
  }
  merge_symbols(symbols, [&](const Symbol& left, const Symbol& right) -> std::optional<Merge> {
    const auto id = id_of({left.text.data(), left.text.size() + right.text.size()});
    if (id == kNoToken) return std::nullopt;
    return Merge{-scores_[static_cast<std::size_t>(id)], id};
  });
  Emitter emitter(fallback_, ids);
  for (const Symbol& symbol : symbols) emitter.add(symbol.text, symbol.id);
}

Unigram::Unigram(std::vector<Token> tokens, Fallback fallback)
    : tokens_(std::move(tokens)), fallback_(std::move(fallback)) {
  // Of tokens with one text the last is used, as the packages do.
  std::sort(tokens_.begin(), tokens_.end(), [](const Token& a, const Token& b) {
    return std::tie(a.text, b.id) < std::tie(b.text, a.id);
  });
  const auto same_text = [](const Token& a, const Token& b) { return a.text == b.text; };
  tokens_.erase(std::unique(tokens_.begin(), tokens_.end(), same_text), tokens_.end());
  const auto lowest =
      std::min_element(tokens_.begin(), tokens_.end(),
                       [](const Token& a, const Token& b) { return a.score < b.score; });
  if (lowest != tokens_.end()) unknown_score_ = lowest->score - kUnknownPenalty;
}

void Unigram::encode(std::string_view piece, std::vector<std::int32_t>& ids) const {
  struct Node {
    double score =
        -std::numeric_limits<double>::infinity();  // of the best path from the start to here
    std::size_t from = 0;                          // where its last part begins
    std::int32_t id = kNoToken;
    bool reached = false;
  };
  std::vector<Node> nodes(piece.size() + 1);
  nodes[0] = {0, 0, kNoToken, true};
  const auto reach = [&](std::size_t from, std::size_t to, std::int32_t id, double score) {
    Node& node = nodes[to];
    const double total = nodes[from].score + score;
    if (!node.reached || total > node.score) node = {total, from, id, true};
  };

  for (std::size_t begin = 0, length = 0; begin < piece.size(); begin += length) {
    length = utf8_length(piece[begin]);
    bool character_is_token = false;
    // tokens_[first, last) share the prefix piece[begin, end).
    auto first = tokens_.begin(), last = tokens_.end();
    for (std::size_t end = begin; end < piece.size() && first != last;) {
      const std::size_t depth = end - begin;
      const auto byte = static_cast<unsigned char>(piece[end]);
      const auto at_depth = [depth](const Token& token) {
        return depth < token.text.size() ? static_cast<unsigned char>(token.text[depth]) : -1;
      };
      first = std::partition_point(first, last, [&](const Token& t) { return at_depth(t) < byte; });
      last = std::partition_point(first, last, [&](const Token& t) { return at_depth(t) <= byte; });
      ++end;
      if (first != last && first->text.size() == end - begin) {
        reach(begin, end, first->id, first->score);
        character_is_token |= end - begin == length;
      }
    }
    if (!character_is_token) reach(begin, begin + length, kNoToken, unknown_score_);
  }

  std::vector<std::size_t> ends;
  for (std::size_t end = piece.size(); end > 0; end = nodes[end].from) ends.push_back(end);
  Emitter emitter(fallback_, ids);
  for (auto end = ends.rbegin(); end != ends.rend(); ++end) {
    const std::size_t from = nodes[*end].from;
    emitter.add(piece.substr(from, *end - from), nodes[*end].id);
  }
}

}  // namespace kvplan::tokenizers
