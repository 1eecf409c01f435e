#pragma once
// What a misspelt name was meant to be.

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>

namespace kvplan {

/// Insertions, deletions and replacements that turn a into b (Levenshtein 1966).
std::size_t edit_distance(std::string_view a, std::string_view b);

/// `; did you mean "..."?` with the nearest of `known`, the first of equals; empty when none is
/// near: more than a third of the name, or 3 letters, would have to change. Long names (of
/// thousands of letters, in hostile files) have none.
template <class Names>
std::string spelling_suggestion(std::string_view name, const Names& known) {
  constexpr std::size_t kMaxErrors = 3, kMaxLetters = 120;
  if (name.size() > kMaxLetters) return "";
  std::string best;
  std::size_t least = std::min(kMaxErrors, name.size() / 3 + 1) + 1;
  for (const std::string_view candidate : known) {
    const std::size_t shorter = std::min(candidate.size(), name.size());
    if (std::max(candidate.size(), name.size()) - shorter >= least) continue;
    const std::size_t distance = edit_distance(name, candidate);
    if (distance < least) {
      least = distance;
      best = candidate;
    }
  }
  return best.empty() ? "" : "; did you mean \"" + best + "\"?";
}

}  // namespace kvplan
