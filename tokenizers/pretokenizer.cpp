#include "tokenizers/pretokenizer.h"

#include <algorithm>

namespace kvplan::tokenizers {
namespace {

struct Range {
  std::size_t begin, end;
  bool match;
};

/// The whole text as alternating matches and stretches between them.
std::vector<Range> ranges_of(const Split& split, std::string_view text) {
  std::vector<Range> ranges;
  std::size_t done = 0;
  split.pattern.for_each_match(text, [&](std::size_t begin, std::size_t end) {
    if (begin > done) ranges.push_back({done, begin, split.invert});
    ranges.push_back({begin, end, !split.invert});
    done = end;
  });
  if (done < text.size()) ranges.push_back({done, text.size(), split.invert});
  return ranges;
}

void join_contiguous(std::vector<Range>& ranges) {
  std::vector<Range> joined;
  for (const Range& range : ranges) {
    if (!joined.empty() && joined.back().match == range.match) {
      joined.back().end = range.end;
    } else {
      joined.push_back(range);
    }
  }
  ranges = std::move(joined);
}

/// A match joins what stands before it, unless that is a match too.
void join_with_previous(std::vector<Range>& ranges) {
  std::vector<Range> joined;
  bool after_match = false;
  for (const Range& range : ranges) {
    if (range.match && !after_match && !joined.empty()) {
      joined.back().end = range.end;
    } else {
      joined.push_back(range);
    }
    after_match = range.match;
  }
  ranges = std::move(joined);
}

/// A match joins what stands after it, unless that is a match too.
void join_with_next(std::vector<Range>& ranges) {
  std::vector<Range> joined;
  bool before_match = false;
  for (auto range = ranges.rbegin(); range != ranges.rend(); ++range) {
    if (range->match && !before_match && !joined.empty()) {
      joined.back().begin = range->begin;
    } else {
      joined.push_back(*range);
    }
    before_match = range->match;
  }
  std::reverse(joined.begin(), joined.end());
  ranges = std::move(joined);
}

struct ApplyStep {
  std::string_view piece;
  bool at_start;
  std::deque<std::string>& arena;
  std::vector<std::string_view>& pieces;

  void operator()(const Split& split) const {
    auto ranges = ranges_of(split, piece);
    switch (split.behavior) {
      case SplitBehavior::kIsolated:
        break;
      case SplitBehavior::kRemoved:
        std::erase_if(ranges, [](const Range& range) { return range.match; });
        break;
      case SplitBehavior::kMergedWithPrevious:
        join_with_previous(ranges);
        break;
      case SplitBehavior::kMergedWithNext:
        join_with_next(ranges);
        break;
      case SplitBehavior::kContiguous:
        join_contiguous(ranges);
        break;
    }
    for (const Range& range : ranges) {
      if (range.end > range.begin)
        pieces.push_back(piece.substr(range.begin, range.end - range.begin));
    }
  }

  void operator()(const Metaspace& step) const {
    std::string text = Normalizer{{Replace{step.space, step.replacement}}}(piece);
    const bool wanted = step.prepend == Metaspace::Prepend::kAlways ||
                        (step.prepend == Metaspace::Prepend::kFirst && at_start);
    if (wanted && !text.starts_with(step.replacement)) text = step.replacement + text;
    pieces.push_back(arena.emplace_back(std::move(text)));
  }

  void operator()(const PrefixSpace&) const {
    pieces.push_back(piece.starts_with(' ') ? piece : arena.emplace_back(1, ' ').append(piece));
  }
};

}  // namespace

std::vector<std::string_view> PreTokenizer::operator()(std::string_view text, bool at_start,
                                                       std::deque<std::string>& arena) const {
  std::vector<std::string_view> pieces;
  if (!text.empty()) pieces.push_back(text);
  for (const auto& step : steps) {
    std::vector<std::string_view> finer;
    finer.reserve(pieces.size());
    bool first = at_start;
    for (const std::string_view piece : pieces) {
      std::visit(ApplyStep{piece, first, arena, finer}, step);
      first = false;
    }
    pieces = std::move(finer);
  }
  return pieces;
}

}  // namespace kvplan::tokenizers
