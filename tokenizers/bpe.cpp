#include "tokenizers/bpe.h"

#include "tokenizers/unicode.h"

namespace kvplan::tokenizers {

void Bpe::encode(std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (options_.ignore_merges) {
    if (const auto token = tokens_.find(piece); token != tokens_.end()) {
      ids.push_back(token->second);
      return;
    }
  }
  auto symbols = first_symbols(piece);
  merge_symbols(symbols, [&](const Symbol& left, const Symbol& right) {
    return merges_.find(left.id, right.id);
  });
  for (const Symbol& symbol : symbols) ids.push_back(symbol.id);
}

std::vector<Symbol> Bpe::first_symbols(std::string_view piece) const {
  const Fallback& fallback = options_.fallback;
  std::vector<Symbol> symbols;
  bool after_unknown = false;
  for (std::size_t at = 0, length = 0; at < piece.size(); at += length) {
    length = options_.byte_level ? 1 : utf8_length(piece[at]);
    const std::string_view text = piece.substr(at, length);
    const auto token = tokens_.find(text);
    const bool known = token != tokens_.end();
    if (known) {
      symbols.push_back({text, token->second});
    } else if (fallback.byte_ids) {
      for (std::size_t i = 0; i < length; ++i) {
        symbols.push_back(
            {text.substr(i, 1), (*fallback.byte_ids)[static_cast<unsigned char>(text[i])]});
      }
    } else if (fallback.unknown_id && !(after_unknown && fallback.fuse_unknown)) {
      symbols.push_back({text, *fallback.unknown_id});
    }
    after_unknown = !known;
  }
  return symbols;
}

}  // namespace kvplan::tokenizers
