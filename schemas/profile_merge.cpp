#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "schemas/error.h"
#include "schemas/plan.h"
#include "schemas/profile.h"
#include "schemas/profile_tensors.h"

namespace kvplan {
namespace {

/// One argument of the merge.
struct Part {
  const Profile* profile;
  double weight;
  std::string name;
};

/// One window of one part, with its row in the per-window tensors.
struct WindowOfPart {
  std::size_t part;
  std::size_t row;
  ProfileWindow window;
  const ProfileSource* source;
};

/// Order of windows over all parts, the same whatever order the parts come in.
auto window_key(const WindowOfPart& w) {
  return std::tie(w.window.index, w.source->sha256, w.source->part_begin, w.source->part_end,
                  w.source->name);
}

std::vector<WindowOfPart> windows_of(const Profile& profile, std::size_t part) {
  std::vector<WindowOfPart> out;
  for (const ProfileWindow& window : profile.windows) {
    out.push_back(
        {part, out.size(), window, &profile.sources.at(static_cast<std::size_t>(window.source))});
  }
  return out;
}

template <class T>
void require_equal(const char* field, const T& expected, const T& found, const std::string& name,
                   const std::string& first) {
  if (expected == found) return;
  throw InputError(name, std::string("/") + field,
                   "cannot be merged with " + first + ": expected " + std::to_string(expected) +
                       ", found " + std::to_string(found) + "; profile both with the same " +
                       field);
}

void require_alike(const Part& first, const Part& other) {
  const Profile &a = *first.profile, &b = *other.profile;
  require_same_model(a.model, b.model, other.name);
  require_equal("window", a.window, b.window, other.name, first.name);
  require_equal("sink_tokens", a.sink_tokens, b.sink_tokens, other.name, first.name);
  require_equal("seed", a.seed, b.seed, other.name, first.name);
  if (a.layers.size() != b.layers.size())
    throw InternalError("merge: profiles of one model with other layer counts");
  for (std::size_t l = 0; l < a.layers.size(); ++l) {
    if (a.layers[l].inv_freq != b.layers[l].inv_freq) {
      throw InputError(other.name, profile_layer_prefix(l) + "inv_freq",
                       "cannot be merged with " + first.name + ": other rotary frequencies");
    }
  }
}

/// Checks the arguments and sorts them by their first window.
std::vector<Part> ordered_parts(std::span<const Profile> profiles, std::span<const double> weights,
                                std::span<const std::string> names) {
  if (profiles.empty()) throw ArgumentError("merge: expected at least one profile");
  if (!weights.empty() && weights.size() != profiles.size()) {
    throw ArgumentError("merge: expected " + std::to_string(profiles.size()) + " weights, found " +
                        std::to_string(weights.size()));
  }
  if (names.size() != profiles.size())
    throw ArgumentError("merge: expected a name for each profile");
  std::vector<Part> parts;
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    const double weight = weights.empty() ? 1 : weights[i];
    if (!(weight > 0) || !std::isfinite(weight)) {
      throw ArgumentError("merge: expected positive weights, found " + std::to_string(weight));
    }
    if (profiles[i].windows.empty())
      throw InputError(names[i], "windows", "expected at least one window");
    parts.push_back({&profiles[i], weight, names[i]});
  }
  for (const Part& part : parts) require_alike(parts.front(), part);
  const auto first_window = [](const Part& part) { return windows_of(*part.profile, 0).front(); };
  std::sort(parts.begin(), parts.end(), [&](const Part& a, const Part& b) {
    const WindowOfPart left = first_window(a), right = first_window(b);
    return window_key(left) < window_key(right);
  });
  return parts;
}

std::vector<WindowOfPart> joined_windows(const std::vector<Part>& parts) {
  std::vector<WindowOfPart> all;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const std::vector<WindowOfPart> windows = windows_of(*parts[p].profile, p);
    all.insert(all.end(), windows.begin(), windows.end());
  }
  std::stable_sort(all.begin(), all.end(), [](const WindowOfPart& a, const WindowOfPart& b) {
    return window_key(a) < window_key(b);
  });
  const auto twice = std::adjacent_find(
      all.begin(), all.end(),
      [](const WindowOfPart& a, const WindowOfPart& b) { return window_key(a) == window_key(b); });
  if (twice != all.end()) {
    throw InputError(parts[std::next(twice)->part].name, "windows",
                     "window " + std::to_string(twice->window.index) + " of " +
                         twice->source->name + " is also in " + parts[twice->part].name +
                         "; merge each shard once");
  }
  return all;
}

/// Sum of weighted values in a binary tree over the parts, the order in which one run adds its
/// windows.
class PairwiseSum {
 public:
  explicit PairwiseSum(const std::vector<Part>& parts) : parts_(parts), values_(parts.size()) {}

  /// value(p): the term of part p.
  template <class Value>
  double operator()(const Value& value) {
    for (std::size_t p = 0; p < parts_.size(); ++p) values_[p] = parts_[p].weight * value(p);
    for (std::size_t step = 1; step < values_.size(); step *= 2) {
      for (std::size_t p = 0; p + step < values_.size(); p += 2 * step)
        values_[p] += values_[p + step];
    }
    return values_.front();
  }

 private:
  const std::vector<Part>& parts_;
  std::vector<double> values_;
};

/// Gathers the arrays of one part in the order of the visit.
template <class T>
struct Collector {
  std::vector<const Array<T>*>& arrays;
  void operator()(const std::string& name, const Array<T>& array,
                  const std::vector<std::int64_t>& shape) const {
    if (array.shape != shape)
      throw InternalError("profile tensor " + name + " has another shape than its model");
    arrays.push_back(&array);
  }
};

LayerProfile merged_layer(const std::vector<Part>& parts, const std::vector<WindowOfPart>& windows,
                          std::size_t l) {
  const ModelSpec& model = parts.front().profile->model;
  const auto layer_of = [&](std::size_t p) -> const LayerProfile& {
    return parts[p].profile->layers[l];
  };

  LayerProfile out;
  out.kv_heads = model.kv_heads;
  out.head_dim = model.head_dim;
  out.rotary_dim = model.rotary_dim;
  out.inv_freq = layer_of(0).inv_freq;
  out.weight_mse = layer_of(0).weight_mse;  // of the weights, which all parts share

  std::vector<std::vector<const Array<double>*>> sums(parts.size());
  std::vector<std::vector<const Array<float>*>> maxima(parts.size()), rows(parts.size());
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const std::int64_t own_windows = coherent_count(*parts[p].profile);
    for_each_sum(layer_of(p), l, model, Collector{sums[p]});
    for_each_maximum(layer_of(p), l, model, Collector{maxima[p]});
    for_each_window_tensor(layer_of(p), l, model, own_windows, Collector{rows[p]});
  }

  PairwiseSum pairwise(parts);
  std::size_t tensor = 0;
  for_each_sum(
      out, l, model,
      [&](const std::string&, Array<double>& target, const std::vector<std::int64_t>& shape) {
        target = Array<double>(shape);
        for (std::size_t i = 0; i < target.data.size(); ++i) {
          target.data[i] = pairwise([&](std::size_t p) { return sums[p][tensor]->data[i]; });
        }
        ++tensor;
      });
  tensor = 0;
  for_each_maximum(
      out, l, model,
      [&](const std::string&, Array<float>& target, const std::vector<std::int64_t>& shape) {
        target = Array<float>(shape);
        for (std::size_t i = 0; i < target.data.size(); ++i) {
          for (std::size_t p = 0; p < parts.size(); ++p) {
            target.data[i] = std::max(target.data[i], maxima[p][tensor]->data[i]);
          }
        }
        ++tensor;
      });
  tensor = 0;
  for_each_window_tensor(
      out, l, model, static_cast<std::int64_t>(windows.size()),
      [&](const std::string&, Array<float>& target, const std::vector<std::int64_t>& shape) {
        target = Array<float>(shape);
        for (std::size_t s = 0; s < windows.size(); ++s) {
          const auto row = rows[windows[s].part][tensor]->row(windows[s].row);
          std::copy(row.begin(), row.end(), target.row(s).begin());
        }
        ++tensor;
      });
  return out;
}

/// Index of `source` among `sources`, added if it is new: shards of one text name it once.
std::int64_t source_index(std::vector<ProfileSource>& sources, const ProfileSource& source) {
  auto found = std::find(sources.begin(), sources.end(), source);
  if (found == sources.end()) found = sources.insert(sources.end(), source);
  return found - sources.begin();
}

}  // namespace

Profile merge_profiles(std::span<const Profile> profiles, std::span<const double> weights,
                       std::span<const std::string> names) {
  const std::vector<Part> parts = ordered_parts(profiles, weights, names);
  std::vector<WindowOfPart> windows = joined_windows(parts);

  const Profile& first = *parts.front().profile;
  Profile out;
  out.model = first.model;
  out.window = first.window;
  out.sink_tokens = first.sink_tokens;
  out.seed = first.seed;
  out.program = first.program;
  PairwiseSum pairwise(parts);
  out.tokens = std::llround(
      pairwise([&](std::size_t p) { return static_cast<double>(parts[p].profile->tokens); }));
  out.fisher_tokens = std::llround(pairwise(
      [&](std::size_t p) { return static_cast<double>(parts[p].profile->fisher_tokens); }));
  // The least count of all: so many first windows have their rows in whichever part they lie.
  out.coherent_windows =
      std::min_element(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
        return a.profile->coherent_windows < b.profile->coherent_windows;
      })->profile->coherent_windows;
  for (const Part& part : parts) {
    for (ProfileSource source : part.profile->sources) {
      source.weight *= part.weight;
      source_index(out.sources, source);
    }
  }
  for (const WindowOfPart& w : windows) {
    ProfileSource source = *w.source;
    source.weight *= parts[w.part].weight;
    out.windows.push_back({w.window.index, w.window.tokens, source_index(out.sources, source)});
  }
  windows.resize(static_cast<std::size_t>(coherent_count(out)));
  for (std::size_t l = 0; l < first.layers.size(); ++l)
    out.layers.push_back(merged_layer(parts, windows, l));
  return out;
}

}  // namespace kvplan
