#pragma once
// The geometry of a cache as stacks see it: what an exporter needs to know of every layer before
// it looks at widths.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "schemas/plan.h"

namespace kvplan::exporters {

struct LayerShape {
  std::string kind = "full";  // full | sliding | linear | mla
  int kv_heads = 0;
  std::array<int, 2> head_dim = {};  // of K, of V
  int window = 0;                    // tokens that a sliding layer sees
  int head_dim_of(Side side) const { return head_dim[static_cast<std::size_t>(side)]; }
  /// Cached elements of one token on one side.
  std::int64_t elements(Side side) const { return std::int64_t{kv_heads} * head_dim_of(side); }
  /// Linear layers keep a state instead of a cache; no stack quantises it and no exporter counts
  /// it.
  bool cached() const { return kind != "linear"; }
  bool operator==(const LayerShape&) const = default;
};

struct CacheShape {
  std::vector<LayerShape> layers;  // every decoder layer, global index
  int queries_per_kv = 1;

  int num_layers() const { return static_cast<int>(layers.size()); }
  std::int64_t elements() const;  // cached elements per token
  /// Head dims are equal in all cached layers and on both sides.
  bool uniform_head_dim() const;
  bool hybrid() const;  // has a layer that is not "full"
};

/// Shape of a plain model: every layer full attention.
CacheShape shape_of(const ModelSpec& model);
CacheShape shape_of(const Plan& plan);

}  // namespace kvplan::exporters
