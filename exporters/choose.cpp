#include "exporters/choose.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "schemas/error.h"

namespace kvplan::exporters {
namespace {

constexpr std::int64_t kMaxStates = std::int64_t{1} << 22;
constexpr std::int64_t kMaxTrace = std::int64_t{1} << 30;
constexpr int kMaxSegmentLayers = 512;

/// One way to settle a part of the cache (a layer, or with segments a side).
struct Alternative {
  std::int64_t bytes = 0;
  double cost = 0;
  int plain = 0;  // sides at 16 bits
  int index = 0;  // in order of preference
};

/// What is left after leaving out alternatives that others beat in cost and bytes: ascending bytes,
/// descending cost; of equals the fewest plain sides, then the earliest.
std::vector<Alternative> front(std::vector<Alternative> all) {
  std::ranges::sort(
      all, {}, [](const Alternative& a) { return std::tuple(a.bytes, a.cost, a.plain, a.index); });
  std::vector<Alternative> kept;
  for (const Alternative& a : all)
    if (kept.empty() || a.cost < kept.back().cost) kept.push_back(a);
  return kept;
}

/// Costs by layer, side and format, asked for once.
class CostTable {
 public:
  CostTable(const Stack& stack, const CacheShape& shape, const FormatCost& cost)
      : stack_(stack), shape_(shape), formats_(stack.formats.size()) {
    for (int l = 0; l < shape.num_layers(); ++l)
      for (const Side side : kSides)
        for (const Format& format : stack.formats)
          costs_.push_back(
              shape.layers[static_cast<std::size_t>(l)].cached() ? cost(l, side, format) : 0);
  }

  double of(int layer, Side side, int format) const {
    const std::size_t row = 2 * static_cast<std::size_t>(layer) + static_cast<std::size_t>(side);
    return costs_[row * formats_ + static_cast<std::size_t>(format)];
  }
  Alternative of(int layer, const LayerFormat& formats, int index) const {
    const LayerShape& shape = shape_.layers[static_cast<std::size_t>(layer)];
    Alternative out{.index = index};
    if (!shape.cached()) return out;
    out.bytes = stack_.bytes(shape, formats);
    for (const Side side : kSides) {
      out.cost += of(layer, side, formats.of(side));
      out.plain += stack_.format(formats, side).plain() ? 1 : 0;
    }
    return out;
  }

 private:
  const Stack& stack_;
  const CacheShape& shape_;
  std::size_t formats_;
  std::vector<double> costs_;
};

struct Solution {
  Alternative total;
  std::vector<int> picks;  // index of the alternative of each part
};

/// Each part at its least cost, without a limit.
Solution cheapest(const std::vector<std::vector<Alternative>>& parts) {
  Solution out;
  for (const auto& part : parts) {
    const Alternative& best = part.back();
    out.total.bytes += best.bytes;
    out.total.cost += best.cost;
    out.total.plain += best.plain;
    out.picks.push_back(best.index);
  }
  return out;
}

/// Least (cost, bytes, plain) within the limit: dynamic programme over the bytes above the smallest
/// alternatives, in units of their common divisor.
std::optional<Solution> within(const std::vector<std::vector<Alternative>>& parts,
                               std::int64_t limit) {
  Solution free = cheapest(parts);
  if (free.total.bytes <= limit) return free;
  std::int64_t least = 0, unit = 0;
  for (const auto& part : parts) {
    least += part.front().bytes;
    for (const Alternative& a : part) unit = std::gcd(unit, a.bytes - part.front().bytes);
  }
  if (least > limit) return std::nullopt;
  const std::int64_t states = (limit - least) / std::max<std::int64_t>(unit, 1) + 1;
  if (states > kMaxStates || states * std::ssize(parts) > kMaxTrace)
    throw MemoryError(states * std::ssize(parts), kMaxTrace,
                      "choosing formats needs " + std::to_string(states) + " sizes for each of " +
                          std::to_string(parts.size()) + " layers");

  struct State {
    double cost = kForbidden;
    int plain = 0;
  };
  std::vector<State> best(static_cast<std::size_t>(states)), next;
  best[0].cost = 0;
  std::vector<std::vector<std::uint8_t>> trace;
  for (const auto& part : parts) {
    next.assign(best.size(), {});
    auto& picks = trace.emplace_back(best.size());
    for (std::size_t i = 0; i < part.size(); ++i) {
      const auto shift = static_cast<std::size_t>((part[i].bytes - part.front().bytes) /
                                                  std::max<std::int64_t>(unit, 1));
      for (std::size_t s = shift; s < best.size(); ++s) {
        const State& from = best[s - shift];
        if (from.cost == kForbidden) continue;
        const double cost = from.cost + part[i].cost;
        const int plain = from.plain + part[i].plain;
        if (next[s].cost != kForbidden &&
            !(std::tie(cost, plain) < std::tie(next[s].cost, next[s].plain)))
          continue;
        next[s] = {cost, plain};
        picks[s] = static_cast<std::uint8_t>(i);
      }
    }
    best.swap(next);
  }
  std::size_t at = 0;
  for (std::size_t s = 1; s < best.size(); ++s)
    if (best[s].cost < best[at].cost) at = s;
  Solution out;
  out.total = {.bytes = least + static_cast<std::int64_t>(at) * std::max<std::int64_t>(unit, 1),
               .cost = best[at].cost,
               .plain = best[at].plain};
  out.picks.resize(parts.size());
  for (std::size_t p = parts.size(); p-- > 0;) {
    const Alternative& a = parts[p][trace[p][at]];
    out.picks[p] = a.index;
    at -= static_cast<std::size_t>((a.bytes - parts[p].front().bytes) /
                                   std::max<std::int64_t>(unit, 1));
  }
  return out;
}

/// The allowed alternatives of every part; empty when one part has none.
std::vector<std::vector<Alternative>> allowed(std::vector<std::vector<Alternative>> parts) {
  for (auto& part : parts) {
    std::erase_if(part, [](const Alternative& a) { return !std::isfinite(a.cost); });
    part = front(std::move(part));
    if (part.empty()) return {};
  }
  return parts;
}

Assignment assignment_of(const Setting& setting, const CacheShape& shape,
                         const Solution& solution) {
  Assignment out{.setting = &setting};
  for (std::size_t l = 0; l < solution.picks.size(); ++l) {
    const auto pick = static_cast<std::size_t>(solution.picks[l]);
    out.layers.push_back(shape.layers[l].cached()
                             ? setting.choices[l][pick]
                             : LayerFormat{LayerFormat::kNone, LayerFormat::kNone});
  }
  out.bytes_per_token = solution.total.bytes;
  out.cost = solution.total.cost;
  return out;
}

std::optional<Assignment> choose_setting(const Stack& stack, const CacheShape& shape,
                                         const CostTable& costs, std::int64_t limit) {
  std::optional<Assignment> best;
  std::tuple<double, std::int64_t, int> best_key;
  for (const Setting& setting : stack.settings) {
    std::vector<std::vector<Alternative>> parts;
    for (int l = 0; l < shape.num_layers(); ++l) {
      auto& part = parts.emplace_back();
      const auto& choices = setting.choices[static_cast<std::size_t>(l)];
      if (!shape.layers[static_cast<std::size_t>(l)].cached()) {
        part.push_back({});
        continue;
      }
      for (std::size_t i = 0; i < choices.size(); ++i)
        part.push_back(costs.of(l, choices[i], static_cast<int>(i)));
    }
    parts = allowed(std::move(parts));
    if (parts.empty()) continue;
    const auto solution = within(parts, limit);
    if (!solution) continue;
    const Alternative& total = solution->total;
    const std::tuple key(total.cost, total.bytes, total.plain);
    if (best && !(key < best_key)) continue;
    best = assignment_of(setting, shape, *solution);
    best_key = key;
  }
  return best;
}

/// All Segments of one side, as alternatives and by index.
class SideSegments {
 public:
  SideSegments(const Stack& stack, const CacheShape& shape, const CostTable& costs, Side side)
      : layers_(shape.num_layers()), types_(static_cast<int>(stack.formats.size())) {
    for (int t = 0; t < types_; ++t) {
      auto& sums = sums_.emplace_back(1);
      for (int l = 0; l < layers_; ++l) {
        const LayerShape& layer = shape.layers[static_cast<std::size_t>(l)];
        const double cost = costs.of(l, side, t);
        Sum sum = sums.back();
        if (layer.cached()) {
          const Format& format = stack.formats[static_cast<std::size_t>(t)];
          sum.bytes += layer.kv_heads * format.bytes(layer.head_dim_of(side));
          sum.plain += format.plain() ? 1 : 0;
          if (std::isfinite(cost))
            sum.cost += cost;
          else
            ++sum.forbidden;
        }
        sums.push_back(sum);
      }
    }
    // Plain types first, then one change, then two: of equals the simplest is taken.
    for (int base = 0; base < types_; ++base) add({base, base, 0, base, 0});
    for (int base = 0; base < types_; ++base)
      for (int other = 0; other < types_; ++other)
        for (int n = 1; other != base && n < layers_; ++n) {
          add({base, other, n, base, 0});
          add({base, base, 0, other, n});
        }
    for (int base = 0; base < types_; ++base)
      for (int first = 0; first < types_; ++first)
        for (int last = 0; last < types_; ++last)
          for (int n = 1; first != base && last != base && n < layers_; ++n)
            for (int m = 1; n + m < layers_; ++m) add({base, first, n, last, m});
    alternatives_ = front(std::move(alternatives_));
  }

  const std::vector<Alternative>& alternatives() const { return alternatives_; }
  const Segments& at(const Alternative& a) const { return all_[static_cast<std::size_t>(a.index)]; }

 private:
  struct Sum {
    std::int64_t bytes = 0;
    double cost = 0;
    int plain = 0, forbidden = 0;
  };

  void add(const Segments& s) {
    Alternative a{.index = static_cast<int>(all_.size())};
    const auto take = [&](int type, int begin, int end) {
      const auto& sums = sums_[static_cast<std::size_t>(type)];
      const Sum &from = sums[static_cast<std::size_t>(begin)],
                &to = sums[static_cast<std::size_t>(end)];
      a.bytes += to.bytes - from.bytes;
      a.cost += to.cost - from.cost;
      a.plain += to.plain - from.plain;
      return to.forbidden == from.forbidden;
    };
    if (!take(s.first, 0, s.first_count) || !take(s.base, s.first_count, layers_ - s.last_count) ||
        !take(s.last, layers_ - s.last_count, layers_))
      return;
    all_.push_back(s);
    alternatives_.push_back(a);
  }

  int layers_, types_;
  std::vector<std::vector<Sum>> sums_;  // by type, over the layers before l
  std::vector<Segments> all_;
  std::vector<Alternative> alternatives_;
};

std::optional<Assignment> choose_segments(const Stack& stack, const CacheShape& shape,
                                          const CostTable& costs, std::int64_t limit) {
  if (shape.num_layers() > kMaxSegmentLayers)
    throw ArgumentError("first and last types are searched for up to " +
                        std::to_string(kMaxSegmentLayers) + " layers, the model has " +
                        std::to_string(shape.num_layers()));
  const SideSegments keys(stack, shape, costs, Side::kKey),
      values(stack, shape, costs, Side::kValue);
  std::optional<Assignment> best;
  std::tuple<double, std::int64_t, int> best_key;
  for (const Alternative& k : keys.alternatives()) {
    const auto& all = values.alternatives();
    // The largest that fits costs least.
    const auto end = std::ranges::upper_bound(all, limit - k.bytes, {},
                                              [](const Alternative& v) { return v.bytes; });
    if (end == all.begin()) continue;
    const Alternative& v = *std::prev(end);
    const std::tuple key(k.cost + v.cost, k.bytes + v.bytes, k.plain + v.plain);
    if (best && !(key < best_key)) continue;
    best_key = key;
    best = Assignment{.segments = {keys.at(k), values.at(v)},
                      .bytes_per_token = k.bytes + v.bytes,
                      .cost = k.cost + v.cost};
  }
  if (!best) return best;
  for (int l = 0; l < shape.num_layers(); ++l) {
    const bool cached = shape.layers[static_cast<std::size_t>(l)].cached();
    const auto format = [&](int side) {
      return cached
                 ? best->segments[static_cast<std::size_t>(side)].format_of(l, shape.num_layers())
                 : LayerFormat::kNone;
    };
    best->layers.push_back({format(0), format(1)});
  }
  return best;
}

}  // namespace

std::optional<Assignment> choose(const Stack& stack, const CacheShape& shape,
                                 const FormatCost& cost, std::int64_t byte_limit) {
  const CostTable costs(stack, shape, cost);
  return stack.segments ? choose_segments(stack, shape, costs, byte_limit)
                        : choose_setting(stack, shape, costs, byte_limit);
}

}  // namespace kvplan::exporters
