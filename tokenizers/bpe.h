#pragma once
// Byte-pair encoding over ranked merges, of bytes (GPT-2) or characters. Source: Sennrich et al.
// (2016), arXiv:1508.07909.

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizers/merge.h"
#include "tokenizers/subword.h"

namespace kvplan::tokenizers {

/// Merges of two token ids.
class MergeTable {
 public:
  /// A later merge of the same pair replaces the earlier one.
  void add(std::int32_t left, std::int32_t right, Merge merge) {
    merges_[key(left, right)] = merge;
  }
  std::optional<Merge> find(std::int32_t left, std::int32_t right) const {
    const auto found = merges_.find(key(left, right));
    return found == merges_.end() ? std::nullopt : std::optional(found->second);
  }

 private:
  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 |
           static_cast<std::uint32_t>(right);
  }
  std::unordered_map<std::uint64_t, Merge> merges_;
};

struct BpeOptions {
  bool byte_level =
      false;  // symbols start as bytes and `tokens` are byte strings; else as characters
  bool ignore_merges = false;  // a piece that is a token needs no merges
  Fallback fallback;
};

class Bpe final : public SubwordModel {
 public:
  Bpe(TokenMap tokens, MergeTable merges, BpeOptions options)
      : tokens_(std::move(tokens)), merges_(std::move(merges)), options_(std::move(options)) {}
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) const override;

 private:
  std::vector<Symbol> first_symbols(std::string_view piece) const;
  TokenMap tokens_;
  MergeTable merges_;
  BpeOptions options_;
};

}  // namespace kvplan::tokenizers
