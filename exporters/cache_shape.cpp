#include "exporters/cache_shape.h"

#include <algorithm>

namespace kvplan::exporters {

std::int64_t CacheShape::elements() const {
  std::int64_t total = 0;
  for (const LayerShape& layer : layers)
    if (layer.cached()) total += layer.elements(Side::kKey) + layer.elements(Side::kValue);
  return total;
}

bool CacheShape::uniform_head_dim() const {
  int head_dim = 0;
  for (const LayerShape& layer : layers) {
    if (!layer.cached()) continue;
    if (head_dim == 0) head_dim = layer.head_dim[0];
    if (layer.head_dim[0] != head_dim || layer.head_dim[1] != head_dim) return false;
  }
  return true;
}

bool CacheShape::hybrid() const {
  return std::ranges::any_of(layers, [](const LayerShape& layer) { return layer.kind != "full"; });
}

CacheShape shape_of(const ModelSpec& model) {
  CacheShape shape;
  shape.layers.assign(static_cast<std::size_t>(model.num_layers),
                      {.kv_heads = model.kv_heads, .head_dim = {model.head_dim, model.head_dim}});
  shape.queries_per_kv = model.query_heads / std::max(model.kv_heads, 1);
  return shape;
}

CacheShape shape_of(const Plan& plan) {
  CacheShape shape = shape_of(plan.model);
  for (std::size_t l = 0; l < plan.layers.size() && l < shape.layers.size(); ++l)
    shape.layers[l].kind = plan.layers[l].kind;
  return shape;
}

}  // namespace kvplan::exporters
