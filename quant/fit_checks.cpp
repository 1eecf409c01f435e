#include <algorithm>
#include <initializer_list>
#include <string_view>

#include "quant/codebook.h"
#include "quant/fit_impl.h"
#include "schemas/error.h"

namespace kvplan::quant {
namespace {

void require_one_of(const char* option, const std::string& value,
                    std::initializer_list<std::string_view> accepted) {
  if (std::find(accepted.begin(), accepted.end(), value) != accepted.end()) return;
  std::string names;
  for (const std::string_view name : accepted) {
    if (!names.empty()) names += ", ";
    names += name;
  }
  throw ArgumentError(std::string(option) + ": expected one of " + names + "; found '" + value +
                      "'");
}

template <class T>
void require_range(const char* option, T value, T low, T high) {
  if (value >= low && value <= high) return;
  throw ArgumentError(std::string(option) + ": expected " + std::to_string(low) + ".." +
                      std::to_string(high) + ", found " + std::to_string(value));
}

void check_calibrated(const FitOptions& o, int head_dim) {
  if (o.group_size < 8 || o.group_size % 8 != 0 || head_dim % o.group_size != 0)
    throw ArgumentError("group_size: expected a multiple of 8 that divides head_dim = " +
                        std::to_string(head_dim) + ", found " + std::to_string(o.group_size));
  if (!o.outlier_counts.empty())
    throw ArgumentError("outlier_counts: only rotated codes have outlier channels");
  require_one_of("code", o.code, {"scalar", "tcq"});
  require_one_of("norm", o.norm, {"log8", "fp16"});
  require_one_of("rotation.kind of codec calibrated", o.rotation.kind, {"none"});
  for (const auto& [width, name] : o.codebooks)
    require_one_of("codebooks", name, {"lloyd_max", "lloyd_max_byte", "uniform"});
}

void check_rotated(const FitOptions& o, int head_dim) {
  for (std::size_t i = 0; i < o.outlier_counts.size(); ++i) {
    const int count = o.outlier_counts[i];
    if (count < 8 || count % 8 != 0 || count >= head_dim ||
        (i > 0 && count <= o.outlier_counts[i - 1]))
      throw ArgumentError("outlier_counts: expected ascending multiples of 8 below head_dim = " +
                          std::to_string(head_dim) + ", found " + std::to_string(count));
  }
  require_one_of("code of codec rotated", o.code, {"scalar"});
  require_one_of("norm of codec rotated", o.norm, {"fp16"});
  require_one_of("rotation.kind", o.rotation.kind, {"none", "hadamard", "signed_hadamard", "haar"});
  require_one_of("rotation.scope", o.rotation.scope, {"model", "head"});
  require_one_of("rotation.sides", o.rotation.sides, {"kv", "k", "v"});
  for (const auto& [width, name] : o.codebooks)
    require_one_of("codebooks", name, {"lloyd_max", "lloyd_max_beta", "lloyd_max_byte", "uniform"});
}

class ProfileCheck {
 public:
  explicit ProfileCheck(const Profile& profile) : profile_(profile) {}

  /// Everything that the fit reads has the size that it expects.
  void check(bool needs_windows) const {
    const ModelSpec& m = profile_.model;
    require("/model",
            m.num_layers > 0 && m.kv_heads > 0 && m.head_dim > 0 && m.rotary_dim >= 0 &&
                m.rotary_dim <= m.head_dim && m.rotary_dim % 2 == 0,
            "expected positive num_layers, kv_heads and head_dim and an even rotary_dim of at most "
            "head_dim");
    require("/model/rope/style", m.rotary_dim == 0 || m.rope.style == "half",
            "expected style half, found " + m.rope.style);
    require("/tokens", profile_.tokens > 0 && profile_.fisher_tokens > 0,
            "expected at least one token outside the sinks in both passes; profile more text");
    require("/layers", profile_.layers.size() == static_cast<std::size_t>(m.num_layers),
            "expected " + std::to_string(m.num_layers) + " layers, found " +
                std::to_string(profile_.layers.size()));
    for (std::size_t l = 0; l < profile_.layers.size(); ++l) check_layer(l, needs_windows);
  }

 private:
  using Shape = std::vector<std::int64_t>;

  static void require(const std::string& field, bool condition, const std::string& message) {
    if (!condition) throw InputError("profile", field, message);
  }

  template <class T>
  static void require_shape(const std::string& name, const Array<T>& array, const Shape& expected) {
    if (array.shape == expected) return;
    const auto text = [](const Shape& shape) {
      std::string out;
      for (const auto n : shape) out += (out.empty() ? "" : ",") + std::to_string(n);
      return "[" + out + "]";
    };
    throw InputError("profile", name,
                     "expected shape " + text(expected) + ", found " + text(array.shape));
  }

  void check_layer(std::size_t l, bool needs_windows) const {
    const ModelSpec& m = profile_.model;
    const LayerProfile& layer = profile_.layers[l];
    const std::string prefix = "layers." + std::to_string(l) + ".";
    const std::int64_t heads = m.kv_heads, d = m.head_dim;
    require("/layers/" + std::to_string(l),
            layer.kv_heads == m.kv_heads && layer.head_dim == m.head_dim &&
                layer.rotary_dim == m.rotary_dim,
            "expected the model's kv_heads, head_dim and rotary_dim");
    require(prefix + "inv_freq", std::ssize(layer.inv_freq) == m.rotary_dim / 2,
            "expected " + std::to_string(m.rotary_dim / 2) + " frequencies, found " +
                std::to_string(layer.inv_freq.size()));
    require_shape(prefix + "k.sum", layer.k_rotated_sum, {heads, d});
    for (const Side side : kSides) {
      const SideSums& sums = layer.side(side);
      const std::string own = prefix + side_name(side) + ".";
      const std::string raw = side == Side::kKey ? prefix + "k_pre." : own;
      require_shape(raw + "sum", sums.sum, {heads, d});
      require_shape(raw + "outer", sums.outer, {heads, d, d});
      require_shape(own + "fisher", sums.fisher, {heads, d, d});
      require_shape(own + "absmax", sums.absmax, {heads, d});
      if (!needs_windows) continue;
      const std::int64_t windows = sums.cross.shape.empty() ? 0 : sums.cross.shape[0];
      require(own + "cross", windows > 0 && windows <= std::ssize(profile_.windows),
              "the calibrated codec needs the coherence sums of at least one listed window; "
              "profile with coherent windows");
      const std::int64_t phases = side == Side::kKey ? m.rotary_dim + 1 : 1;
      require_shape(own + "cross", sums.cross, {windows, heads, d, d});
      require_shape(own + "phase", sums.phase, {windows, heads, d, phases});
      for (std::int64_t s = 0; s < windows; ++s)
        require("windows",
                profile_.windows[static_cast<std::size_t>(s)].tokens > profile_.sink_tokens,
                "window " + std::to_string(s) + " has no token outside the sinks");
    }
  }

  const Profile& profile_;
};

}  // namespace

void check_options(const FitOptions& o, const Profile& profile) {
  require_one_of("codec", o.codec, {"calibrated", "rotated"});
  if (o.context <= profile.sink_tokens)
    throw ArgumentError("context: expected more tokens than the " +
                        std::to_string(profile.sink_tokens) + " sinks of the profile, found " +
                        std::to_string(o.context));
  require_range("max_width", o.max_width, 1, kMaxCodebookBits);
  require_range("threads", o.threads, 0, 1 << 16);
  require_range("fisher_shrinkage", o.fisher_shrinkage, 0.0, 1.0);
  require_range("moment_shrinkage", o.moment_shrinkage, 0.0, 1.0);
  require_one_of("scale_rule", o.scale_rule, {"one", "norm_corrected", "biased", "unbiased"});
  for (const auto& [width, name] : o.codebooks)
    require_range("codebooks, width", width, 1, kMaxCodebookBits);
  if (o.codec == "calibrated") {
    check_calibrated(o, profile.model.head_dim);
  } else {
    check_rotated(o, profile.model.head_dim);
  }
}

void check_profile(const Profile& profile, bool needs_windows) {
  ProfileCheck(profile).check(needs_windows);
}

}  // namespace kvplan::quant
