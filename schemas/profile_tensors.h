#pragma once
// Names and shapes of the tensors of profile.safetensors, once for writing, reading and merging.
// Private to schemas.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "schemas/profile.h"

namespace kvplan {

inline std::string profile_layer_prefix(std::size_t layer) {
  return "layers." + std::to_string(layer) + ".";
}

/// S: windows that carry cross and phase rows, the first by index.
inline std::int64_t coherent_count(const Profile& profile) {
  return std::min<std::int64_t>(profile.coherent_windows,
                                static_cast<std::int64_t>(profile.windows.size()));
}

/// Calls visit(name, array, shape) for the F64 sums of a layer, which merging adds. Always in the
/// same order.
template <class Layer, class Visit>
void for_each_sum(Layer& layer, std::size_t index, const ModelSpec& model, const Visit& visit) {
  const std::int64_t heads = model.kv_heads, d = model.head_dim;
  const std::vector<std::int64_t> per_head = {heads}, per_channel = {heads, d},
                                  per_pair = {heads, d, d};
  const std::string prefix = profile_layer_prefix(index);
  visit(prefix + "k_pre.sum", layer.k.sum, per_channel);
  visit(prefix + "k_pre.outer", layer.k.outer, per_pair);
  visit(prefix + "k.norm_sum", layer.k.norm_sum, per_head);
  visit(prefix + "k.fisher", layer.k.fisher, per_pair);
  visit(prefix + "v.sum", layer.v.sum, per_channel);
  visit(prefix + "v.outer", layer.v.outer, per_pair);
  visit(prefix + "v.norm_sum", layer.v.norm_sum, per_head);
  visit(prefix + "v.fisher", layer.v.fisher, per_pair);
  visit(prefix + "k.sum", layer.k_rotated_sum, per_channel);
  visit(prefix + "k.sumsq", layer.k_rotated_sumsq, per_channel);
  visit(prefix + "k.norm_ratio_sum", layer.norm_ratio_sum, per_head);
}

/// The F32 tensors of which merging takes the maximum.
template <class Layer, class Visit>
void for_each_maximum(Layer& layer, std::size_t index, const ModelSpec& model, const Visit& visit) {
  const std::vector<std::int64_t> per_channel = {model.kv_heads, model.head_dim};
  visit(profile_layer_prefix(index) + "k.absmax", layer.k.absmax, per_channel);
  visit(profile_layer_prefix(index) + "v.absmax", layer.v.absmax, per_channel);
}

/// The F32 tensors with one row for each of the first `windows` windows.
template <class Layer, class Visit>
void for_each_window_tensor(Layer& layer, std::size_t index, const ModelSpec& model,
                            std::int64_t windows, const Visit& visit) {
  const std::int64_t heads = model.kv_heads, d = model.head_dim;
  const std::string prefix = profile_layer_prefix(index);
  visit(prefix + "k.cross", layer.k.cross, std::vector<std::int64_t>{windows, heads, d, d});
  visit(prefix + "v.cross", layer.v.cross, std::vector<std::int64_t>{windows, heads, d, d});
  visit(prefix + "k.phase", layer.k.phase,
        std::vector<std::int64_t>{windows, heads, d, model.rotary_dim + 1});
  visit(prefix + "v.phase", layer.v.phase, std::vector<std::int64_t>{windows, heads, d, 1});
}

/// All of the above.
template <class Layer, class Visit>
void for_each_layer_tensor(Layer& layer, std::size_t index, const ModelSpec& model,
                           std::int64_t windows, const Visit& visit) {
  for_each_sum(layer, index, model, visit);
  for_each_maximum(layer, index, model, visit);
  for_each_window_tensor(layer, index, model, windows, visit);
}

}  // namespace kvplan
