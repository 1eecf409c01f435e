#pragma once
// The merge loop of byte-pair encoding, over ranks (GPT-2) or scores (SentencePiece).

#include <cstddef>
#include <cstdint>
#include <optional>
#include <queue>
#include <string_view>
#include <vector>

namespace kvplan::tokenizers {

/// Two neighbours may become token `id`; lower priorities go first, then the leftmost.
struct Merge {
  double priority;
  std::int32_t id;
};

inline constexpr std::int32_t kNoToken = -1;

struct Symbol {
  std::string_view text;
  std::int32_t id;
};

/// Merges neighbours in place until `find(const Symbol& left, const Symbol& right) ->
/// std::optional<Merge>` knows none. The texts of `symbols` lie one behind the other. O(n log n).
template <class Find>
void merge_symbols(std::vector<Symbol>& symbols, const Find& find) {
  constexpr std::size_t kEnd = static_cast<std::size_t>(-1);
  struct Candidate {
    Merge merge;
    std::size_t left;
    bool operator<(
        const Candidate& other) const {  // std::priority_queue yields the greatest
      if (merge.priority != other.merge.priority) return merge.priority > other.merge.priority;
      return left > other.left;
    }
  };
  const std::size_t count = symbols.size();
  std::vector<std::size_t> next(count), previous(count);
  for (std::size_t i = 0; i < count; ++i) {
    next[i] = i + 1 < count ? i + 1 : kEnd;
    previous[i] = i > 0 ? i - 1 : kEnd;
  }
  std::priority_queue<Candidate> queue;
  const auto offer = [&](std::size_t left) {
    if (left == kEnd || next[left] == kEnd) return;
    if (const auto merge = find(symbols[left], symbols[next[left]])) queue.push({*merge, left});
  };
  for (std::size_t i = 0; i + 1 < count; ++i) offer(i);

  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const std::size_t left = best.left;
    if (symbols[left].text.empty() || next[left] == kEnd) continue;
    const std::size_t right = next[left];
    const auto still = find(symbols[left], symbols[right]);
    if (!still || still->id != best.merge.id)
      continue;  // one of the two has merged otherwise meanwhile
    symbols[left] = {
        {symbols[left].text.data(), symbols[left].text.size() + symbols[right].text.size()},
        best.merge.id};
    symbols[right].text = {};
    next[left] = next[right];
    if (next[left] != kEnd) previous[next[left]] = left;
    offer(previous[left]);
    offer(left);
  }
  std::erase_if(symbols, [](const Symbol& symbol) { return symbol.text.empty(); });
}

}  // namespace kvplan::tokenizers
