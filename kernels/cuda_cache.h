#pragma once
// The paged cache on the GPU behind quant::KvCache, with host memory in and out.

#include <memory>

#include "quant/kv_cache.h"

namespace kvplan::kernels {

/// Each call copies its vectors to the device and back and waits. Throws the errors of
/// quant::KvCache; InputError for a plan that the runtime cannot hold; EnvironmentError when the
/// device or its driver is missing, too old or refuses; MemoryError when the device has not enough
/// memory.
std::unique_ptr<quant::KvCache> make_cuda_cache(const PlanBundle& bundle,
                                                const quant::CacheGeometry& geometry,
                                                int device = 0);

}  // namespace kvplan::kernels
