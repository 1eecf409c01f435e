#pragma once
// The tensors of a plan as kernels read them: one image for the device, and views into it.
// Private to kernels.

#include <cstddef>
#include <span>
#include <vector>

#include "kernels/views.h"
#include "quant/kv_cache.h"

namespace kvplan::kernels {

struct StaticData {
  std::vector<std::byte> image;   // quant::CacheSize::statics bytes
  std::vector<LayerView> layers;  // pointers into the image; pool, sinks, open and shared not set
};

/// Whether the mean of some KV head dwarfs the deviations of its keys, so that the rotary tile
/// needs its low part. In the transformed domain of a calibrated plan every coordinate has unit
/// variance: the energy of the deviations is the sum of squares of the synthesis matrix. A rotated
/// plan does not know it.
bool needs_split_tile(const PlanBundle& bundle, const quant::LayerFormat& format,
                      std::size_t layer);

/// `device`: where the image will be. InputError for a layer with more level tables than the decode
/// kernel holds.
StaticData make_static_data(const PlanBundle& bundle, std::span<const quant::LayerFormat> formats,
                            const quant::CacheGeometry& geometry, const std::byte* device);

}  // namespace kvplan::kernels
