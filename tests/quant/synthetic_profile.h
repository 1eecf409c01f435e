#pragma once
// Profiles for tests, accumulated from drawn keys, values and gradients exactly as the profiler
// sums them.

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "quant/random.h"
#include "schemas/profile.h"

namespace kvplan::quant::testing {

using Vector = std::vector<double>;

/// x turned by R_t in half style: channel j pairs with j + rotary_dim/2.
inline Vector rotated(const Vector& x, const Vector& inv_freq, double t) {
  Vector out = x;
  const std::size_t half = inv_freq.size();
  for (std::size_t j = 0; j < half; ++j) {
    const double c = std::cos(inv_freq[j] * t), s = std::sin(inv_freq[j] * t);
    out[j] = c * x[j] - s * x[j + half];
    out[j + half] = s * x[j] + c * x[j + half];
  }
  return out;
}

inline Vector normal_vector(RandomStream& random, std::size_t n) {
  Vector out(n);
  for (double& value : out) value = random.next_normal();
  return out;
}

struct SyntheticSpec {
  int layers = 2, kv_heads = 2, head_dim = 32, rotary_dim = 32;
  int windows = 3, window = 40, sink_tokens = 4;
  std::uint64_t seed = 1;
};

/// One token of one head: x before rotary, h after rotary, absolute position in its window.
struct Token {
  int window = 0, position = 0;
  Vector x, h;
};

inline Vector frequencies(int rotary_dim) {
  Vector out;
  for (int j = 0; j < rotary_dim / 2; ++j) out.push_back(std::pow(10000.0, -2.0 * j / rotary_dim));
  return out;
}

/// Non-sink tokens of one layer, side and head: x = mean + spread z with a spread that falls over
/// the channels and mixes neighbours; h likewise the other way round.
inline std::vector<Token> draw_tokens(const SyntheticSpec& spec, int layer, Side side, int head) {
  RandomStream random(spec.seed, StreamPurpose::kTest, static_cast<std::uint32_t>(layer),
                      static_cast<std::uint32_t>(head * 2 + static_cast<int>(side)));
  const auto d = static_cast<std::size_t>(spec.head_dim);
  const Vector mean = normal_vector(random, d);
  std::vector<Token> tokens;
  for (int w = 0; w < spec.windows; ++w) {
    for (int t = spec.sink_tokens; t < spec.window; ++t) {
      const Vector z = normal_vector(random, d), g = normal_vector(random, d);
      Token token{w, t, mean, Vector(d)};
      for (std::size_t i = 0; i < d; ++i) {
        const double along = static_cast<double>(i) / static_cast<double>(d);
        token.x[i] += (2 - along) * (z[i] + 0.6 * z[(i + 1) % d]);
        token.h[i] = (0.02 + 0.1 * along) * (g[i] - 0.5 * g[(i + 3) % d]);
      }
      tokens.push_back(std::move(token));
    }
  }
  return tokens;
}

inline void add_token(SideSums& sums, const Vector& x, const Vector& fisher_h, int head) {
  const std::size_t d = x.size();
  const auto row = static_cast<std::size_t>(head);
  double square = 0;
  for (std::size_t i = 0; i < d; ++i) {
    sums.sum.row(row)[i] += x[i];
    square += x[i] * x[i];
    for (std::size_t j = 0; j < d; ++j) {
      sums.outer.row(row)[i * d + j] += x[i] * x[j];
      sums.fisher.row(row)[i * d + j] += fisher_h[i] * fisher_h[j];
    }
  }
  sums.norm_sum.data[row] += std::sqrt(square);
}

/// Sums of one head: pre-rotary moments, coherence sums after rotary.
inline void add_head(LayerProfile& layer, const SyntheticSpec& spec, Side side, int head,
                     const std::vector<Token>& tokens) {
  SideSums& sums = layer.side(side);
  const auto d = static_cast<std::size_t>(spec.head_dim);
  const bool key = side == Side::kKey;
  const Vector inv_freq = key ? layer.inv_freq : Vector{};
  const std::size_t half = inv_freq.size(), phases = 2 * half + 1;
  for (const Token& token : tokens) {
    const double t = token.position;
    const Vector x = rotated(token.x, inv_freq, t);
    add_token(sums, token.x, rotated(token.h, inv_freq, -t), head);
    Vector phi;
    for (const double theta : inv_freq) phi.push_back(std::cos(theta * t));
    for (const double theta : inv_freq) phi.push_back(std::sin(theta * t));
    phi.push_back(1);
    const auto block = static_cast<std::size_t>(token.window * spec.kv_heads + head);
    for (std::size_t i = 0; i < d; ++i) {
      float& absmax = sums.absmax.row(static_cast<std::size_t>(head))[i];
      absmax = std::max(absmax, static_cast<float>(std::abs(x[i])));
      if (key) {
        layer.k_rotated_sum.row(static_cast<std::size_t>(head))[i] += x[i];
        layer.k_rotated_sumsq.row(static_cast<std::size_t>(head))[i] += x[i] * x[i];
      }
      for (std::size_t j = 0; j < d; ++j)
        sums.cross.data[(block * d + i) * d + j] += static_cast<float>(token.h[i] * x[j]);
      for (std::size_t p = 0; p < phases; ++p)
        sums.phase.data[(block * d + i) * phases + p] += static_cast<float>(token.h[i] * phi[p]);
    }
  }
}

inline Profile synthetic_profile(const SyntheticSpec& spec) {
  const std::int64_t heads = spec.kv_heads, d = spec.head_dim, windows = spec.windows;
  Profile profile;
  ModelSpec& model = profile.model;
  model.architecture = "llama";
  model.num_layers = spec.layers;
  model.query_heads = model.kv_heads = spec.kv_heads;
  model.head_dim = spec.head_dim;
  model.rotary_dim = spec.rotary_dim;
  model.container = "gguf";
  model.kv_weights_sha256 = std::string(64, 'a');
  profile.tokens = profile.fisher_tokens = windows * (spec.window - spec.sink_tokens);
  profile.window = spec.window;
  profile.sink_tokens = spec.sink_tokens;
  for (std::int64_t w = 0; w < windows; ++w) profile.windows.push_back({w, spec.window, 0});
  for (int l = 0; l < spec.layers; ++l) {
    LayerProfile layer;
    layer.kv_heads = spec.kv_heads;
    layer.head_dim = spec.head_dim;
    layer.rotary_dim = spec.rotary_dim;
    layer.inv_freq = frequencies(spec.rotary_dim);
    layer.k_rotated_sum = layer.k_rotated_sumsq = Array<double>({heads, d});
    layer.norm_ratio_sum = Array<double>({heads});
    for (const Side side : kSides) {
      SideSums& sums = layer.side(side);
      sums.sum = Array<double>({heads, d});
      sums.outer = sums.fisher = Array<double>({heads, d, d});
      sums.norm_sum = Array<double>({heads});
      sums.absmax = Array<float>({heads, d});
      sums.cross = Array<float>({windows, heads, d, d});
      sums.phase = Array<float>({windows, heads, d, side == Side::kKey ? spec.rotary_dim + 1 : 1});
      for (int h = 0; h < spec.kv_heads; ++h)
        add_head(layer, spec, side, h, draw_tokens(spec, l, side, h));
    }
    profile.layers.push_back(std::move(layer));
  }
  return profile;
}

}  // namespace kvplan::quant::testing
