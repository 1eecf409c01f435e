#pragma once
// Runtimes by the names that `generate` and `validate` take.

#include <string>

#include "forward/cache_runtime.h"

namespace kvplan::cli {

/// The CUDA runtime on the first GPU. EnvironmentError when this program was built without it; its
/// make_cache fails so without a GPU.
forward::CacheRuntime cuda_runtime();

}  // namespace kvplan::cli
